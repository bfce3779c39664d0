"""The wheel, installed alone, is complete."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.once
@pytest.mark.slow
def test_the_wheel_alone_answers(converted, photo, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, str(ROOT)], check=True, cwd=tmp_path
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    # All that the package needs at run time lies in the package.
    sources = [path for path in (ROOT / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert names >= {path.relative_to(ROOT / "src").as_posix() for path in sources if "egg-info" not in str(path)}
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"emma_hf"}

    # A new environment that sees this one's third-party packages, but not this checkout.
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    others = tmp_path / "others"
    others.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "emma_hf" not in path.name and path.suffix != ".pth":
            (others / path.name).symlink_to(path)
    Path(site, "others.pth").write_text(f"{others}\n")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = subprocess.run(
        [python, "-c", "import emma_hf; print(emma_hf.__file__)"],
        cwd=tmp_path, env=clean, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert where.startswith(str(environment))
    answer = subprocess.run(
        [environment / "bin" / "emma-hf", "ask", "--model", converted, "--max-new-tokens", "6", photo, "Who is this?"],
        cwd=tmp_path, env=clean, capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()
    usage = subprocess.run(
        [environment / "bin" / "emma-hf", "train", "--help"], cwd=tmp_path, env=clean, capture_output=True, text=True
    )
    assert usage.returncode == 0, usage.stderr
    assert "--projector_learning_rate" in usage.stdout
