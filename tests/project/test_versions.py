"""The supported versions of Transformers: said to pip, to users of the Hub files and by the command, and the same."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import transformers
from packaging.requirements import Requirement
from support.processes import run_python

import emma_hf
from emma_hf.cli import main
from emma_hf.hub.model_card import TEMPLATE
from emma_hf.model.compat_emma import NEWEST_TESTED_TRANSFORMERS, TRANSFORMERS_5, untested_warning

ROOT = Path(__file__).parents[2]
NEWER = f"5.{int(NEWEST_TESTED_TRANSFORMERS.removeprefix('5.')) + 1}.0"
SUPPORTED = [
    "4.57.6",
    "5.16.1",
    "5.17.0",
    "5.20.2",
    f"{NEWEST_TESTED_TRANSFORMERS}.0",
    f"{NEWEST_TESTED_TRANSFORMERS}.9",
]
UNSUPPORTED = ["3.5.1", "4.57.5", "5.0.0", "5.1.0", "5.9.0", "5.10.2", "5.15.1", "5.16.0", NEWER, "5.100.0", "6.0.0"]


@pytest.fixture
def dependencies() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


@pytest.fixture
def makefile_versions() -> list[str]:
    """Every Transformers version that the Makefile gives an environment."""
    return re.findall(r"^VERSION_\w+ *:?= *([\d.]+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def requirement(lines) -> Requirement:
    (found,) = [Requirement(line) for line in lines if Requirement(line).name == "transformers"]
    return found


def test_pip_and_the_hub_files_draw_the_same_limits(dependencies):
    for version in SUPPORTED + UNSUPPORTED:
        supported = version in SUPPORTED
        assert requirement(dependencies).specifier.contains(version) == supported, version
        assert (untested_warning(version) is None) == supported, version


def test_the_cap_the_makefile_and_what_an_endpoint_installs_agree(makefile_versions):
    newest = max(makefile_versions, key=lambda version: tuple(map(int, version.split("."))))
    assert newest.rpartition(".")[0] == NEWEST_TESTED_TRANSFORMERS
    assert [version for version in makefile_versions if untested_warning(version)] == []
    endpoint = requirement((TEMPLATE / "requirements.txt").read_text().splitlines()).specifier
    assert endpoint.contains(newest)
    assert not endpoint.contains(NEWER)


@pytest.mark.parametrize("version", [f"{NEWER[:-2]}.0.dev0", f"{NEWER[:-2]}.0rc1"])
def test_a_development_version_counts_as_its_release(version):
    assert "newer than" in untested_warning(version)


# Of several copies of the code in one process, one warns.
IMPORTS = {"folders": "load(sys.argv[1]); load(sys.argv[2])", "package": "import emma_hf; load(sys.argv[1])"}
PRETEND = """
import sys
from transformers import AutoConfig, AutoProcessor
# Importing those can import `transformers` anew, with the version that it has.
sys.modules["transformers"].__version__ = sys.argv[3]
def load(folder):
    for cls in (AutoConfig, AutoProcessor):
        loaded = cls.from_pretrained(folder, trust_remote_code=True)
        assert "emma_hf" in sys.modules or type(loaded).__module__.startswith("transformers_modules")
"""


def load_pretending(version: str, imported: str, converted: Path, folder: Path) -> list[str]:
    """The lines that a user of this version sees; of the folders alone, the package cannot be imported."""
    second = folder / "second"
    second.symlink_to(converted)
    run = run_python(
        PRETEND + IMPORTS[imported], converted, second, version,
        importable=imported == "package", HF_MODULES_CACHE=str(folder / "modules"),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    return [line.removeprefix("[transformers] ") for line in run.stderr.splitlines() if "EMMA" in line]


@pytest.mark.parametrize("imported", IMPORTS)
def test_an_untested_version_is_warned_of_once(converted, tmp_path, imported):
    # 4.57 cannot pass for a later version.
    version = NEWER if TRANSFORMERS_5 else "4.57.5"
    assert load_pretending(version, imported, converted, tmp_path) == [untested_warning(version)]


def test_a_tested_version_is_not_warned_of(converted, tmp_path):
    assert load_pretending(transformers.__version__, "package", converted, tmp_path) == []


def test_the_warning_names_both_versions_and_what_to_do():
    warning = untested_warning(NEWER)
    assert f"This is Transformers {NEWER}, which is newer than {NEWEST_TESTED_TRANSFORMERS}, the newest" in warning
    assert "pip install --upgrade emma-hf" in warning
    assert "newest revision of the model)" in warning
    assert f'pip install "transformers=={NEWEST_TESTED_TRANSFORMERS}.*"' in warning
    assert "tell its authors" in warning
    older = untested_warning("4.57.5")
    assert "4.57.5, which is older than 4.57.6, the oldest 4.x that" in older
    assert older.endswith(f'Update Transformers: `pip install "transformers=={NEWEST_TESTED_TRANSFORMERS}.*"`.')
    assert "5.3.0, which is older than 5.16.1, the oldest 5.x that" in untested_warning("5.3.0")


def test_the_command_prints_the_versions(capsys, monkeypatch, dependencies):
    versions = {"transformers": transformers.__version__, "torch": metadata.version("torch")}
    monkeypatch.setattr(metadata, "version", versions.get)
    # An editable installation keeps the limits that it was made with.
    monkeypatch.setattr(metadata, "requires", {"emma-hf": [*dependencies, "transformers>=5; extra == 'app'"]}.get)
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    lines = [f"emma-hf {emma_hf.__version__}", f"transformers {transformers.__version__}", f"torch {versions['torch']}"]
    assert capsys.readouterr().out.splitlines() == lines

    for versions["transformers"] in (NEWER, f"{NEWER}.dev0"):
        with pytest.raises(SystemExit):
            main(["--version"])
        lines[1] = (
            f"transformers {versions['transformers']} (newer than emma-hf is tested on, <{NEWER[:-2]}: update emma-hf)"
        )
        assert capsys.readouterr().out.splitlines() == lines


def test_printing_the_versions_imports_neither_transformers_nor_torch():
    # `import emma_hf` itself loads both, so a bare package stands in its place.
    code = """
import sys, types
from importlib import metadata
package = types.ModuleType("emma_hf")
package.__path__, package.__version__, package.EMMA_TINY = [sys.argv[1]], "0.0.1", "emma-tiny"
sys.modules |= {"emma_hf": package, "torch": None, "transformers": None}
metadata.requires = lambda name: ["transformers<99"]
from emma_hf.cli import main
main(["--version"])
"""
    run = run_python(code, Path(emma_hf.__file__).parent)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("emma-hf 0.0.1\ntransformers ")
