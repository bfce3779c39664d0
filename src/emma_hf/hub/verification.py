"""Whether a folder, or a repository on the Hub, is a complete and undamaged EMMA that loads without this package."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, ModelCard

from ..model.code_files_emma import AUTO_MAP, HUB_FILES
from ..model.errors_emma import EmmaError
from ..storage.hub_access import hub_errors, parse_repo_id, resolve
from ..storage.tensors import read_checkpoint

MANIFEST_NAME = "manifest.json"
WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
# What a repository must hold besides the weights; Transformers 4.57 saves more of the tokenizers than 5 does.
REQUIRED_FILES = (
    *HUB_FILES,
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "handler.py",
    "instruction_tokenizer/config.json",
    "instruction_tokenizer/tokenizer.json",
    "instruction_tokenizer/tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "requirements.txt",
    "tokenizer.json",
    "tokenizer_config.json",
)
BLOCK = 1 << 20


@dataclass
class Row:
    """One line of a report: a file or a property, its bytes, the start of its sha256, and what was found."""

    name: str
    found: str
    size: int | None = None
    sha256: str = ""
    right: bool = True


@dataclass
class Report:
    """What [`check`] found, in the order in which it looked."""

    source: str
    rows: list[Row] = field(default_factory=list)

    @property
    def wrong(self) -> list[Row]:
        """The rows that are not as they must be."""
        return [row for row in self.rows if not row.right]

    def add(self, name: str, problem: str, found: str = "ok", size: int | None = None, sha256: str = "") -> None:
        """One more row; it is right if `problem` is empty."""
        self.rows.append(Row(name, problem or found, size, sha256, not problem))

    def table(self) -> str:
        """The report in Markdown."""
        lines = ["| file | bytes | sha256 | found |", "|---|---|---|---|"]
        for row in self.rows:
            size = "" if row.size is None else str(row.size)
            lines.append(f"| {row.name} | {size} | {row.sha256[:12]} | {'' if row.right else 'WRONG: '}{row.found} |")
        return "\n".join(lines) + "\n"


def check(
    source: str | Path, revision: str | None = None, token: str | None = None, trust_remote_code: bool = False
) -> Report:
    """Check every file of a Hub folder by size and hash, and answer one question where this package is not importable.

    Args:
        source: a folder, or a Hub id (`org/name`), which is downloaded into the cache.
        revision: branch, tag or commit of a Hub id. Default: its main branch.
        token: for a Hub id. Default: the one of the environment.
        trust_remote_code: run code files that are not those of this version of the package, too.

    Returns:
        The report; nothing is wrong with the source if its `wrong` is empty.

    Raises:
        FileNotFoundError: no such folder, repository or revision.
        HubError: no network, no right to read.
        EmmaError: a folder with a `revision`.
    """
    report = Report(str(source))
    remote = None
    if not Path(source).is_dir():
        repo_id = parse_repo_id(source)
        with hub_errors(repo_id, revision):
            remote = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
    folder = resolve(source, revision=remote.sha if remote else revision, token=token)
    _check_files(report, folder, {file.rfilename: file for file in remote.siblings or ()} if remote else None)
    _check_contents(report, folder)
    missing = [name for name in HUB_FILES if not (folder / name).is_file()]
    foreign = _foreign_code(folder)
    if missing:
        names = ", ".join(missing)
        report.add("answer", f"not asked: it lacks {names}, the code files. `emma-hf export` adds them")
    elif foreign and not trust_remote_code:
        names = ", ".join(foreign)
        report.add(
            "answer",
            f"not asked: this version of emma-hf has other code than {names}. Read it, and pass `--trust-remote-code`",
        )
    else:
        _check_answer(report, str(source) if remote else str(folder.resolve()), remote.sha if remote else None)
    return report


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a folder: version of the package, and size and sha256 of every file but itself."""
    from .. import __version__

    files = {name: {"size": size_of(folder / name), "sha256": sha256_of(folder / name)} for name in files_of(folder)}
    files.pop(MANIFEST_NAME, None)
    return {"format": 1, "emma_hf": __version__, "files": files}


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Name to size and sha256 of the files that a folder's manifest lists; None where there is no manifest.

    Raises:
        EmmaError: a manifest that is damaged or names a file outside the folder.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        entries = {str(name): {"size": int(one["size"]), "sha256": str(one["sha256"])} for name, one in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EmmaError(f"{path} is not a manifest of this package ({error!r}). Export the model again.") from error
    for name in entries:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\\" in name:
            raise EmmaError(f"A manifest must name files of its own folder: {path} names {name!r}.")
    return entries


def files_of(folder: Path) -> list[str]:
    """Names of all files in a folder, with `/`, sorted; hidden ones, caches and links to folders stay out."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        relative = Path(where).relative_to(folder)
        found += [(relative / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def size_of(path: Path) -> int:
    """Bytes of a file."""
    return path.stat().st_size


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as the Hub's large file storage names it."""
    return _digest(path, hashlib.sha256())


def git_hash_of(path: Path) -> str:
    """Git's name of a file's contents, as the Hub names its small files."""
    return _digest(path, hashlib.sha1(b"blob %d\0" % size_of(path), usedforsecurity=False))


def is_remote_file(path: Path, remote: Any, sha256: str | None = None) -> bool:
    """Whether a local file has the contents of a file of the Hub, by what the Hub itself says of it.

    Args:
        remote: the file in `model_info(files_metadata=True).siblings`.
        sha256: of the local file, if it is known.
    """
    if remote.lfs is not None:
        return (sha256 or sha256_of(path)) == remote.lfs.sha256
    return git_hash_of(path) == remote.blob_id


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _check_files(report: Report, folder: Path, remote: dict[str, Any] | None) -> None:
    names = set(files_of(folder))
    try:
        listed = read_manifest(folder)
        problem = "" if listed is not None else "missing: `emma-hf export` writes it"
    except ValueError as error:
        listed, problem = None, str(error)
    report.add(MANIFEST_NAME, problem, f"lists {len(listed or ())} files")
    weights = {name for name in names if name.endswith(".safetensors")} or {WEIGHTS_NAME}
    public = {name for name in remote or () if not name.startswith(".")}
    expected = sorted({*REQUIRED_FILES, *weights, *(listed or ()), *public})
    for name in expected:
        if name == MANIFEST_NAME:
            continue
        path = folder / name
        if name not in names:
            report.add(name, "missing")
            continue
        if remote is None and not is_own_file(path, folder):
            report.add(name, "a link: a folder must hold the file itself")
            continue
        size, sha256 = size_of(path), sha256_of(path)
        problems = []
        if listed is not None and name not in listed:
            problems.append("not in the manifest")
        elif listed is not None and listed[name]["size"] != size:
            problems.append(f"the manifest says {listed[name]['size']} bytes")
        elif listed is not None and listed[name]["sha256"] != sha256:
            problems.append(f"the manifest says sha256 {listed[name]['sha256'][:12]}")
        if remote is not None and not is_remote_file(path, remote[name], sha256):
            problems.append("the Hub says another hash")
        report.add(name, "; ".join(problems), "ok", size, sha256)
    for name in sorted(names - set(expected) - {MANIFEST_NAME}):
        report.add(name, "", "not in the manifest: would not be pushed", size_of(folder / name))


def is_own_file(path: Path, folder: Path) -> bool:
    """Whether neither the file nor a folder on its way is a link."""
    return path.resolve() == folder.resolve() / path.relative_to(folder) and path.is_file()


def _check_contents(report: Report, folder: Path) -> None:
    for name, look in (("weights", _weights), ("config", _config), ("card", _card)):
        try:
            problem, found = look(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem, found = _line(error), ""
        report.add(name, problem, found)


def _weights(folder: Path) -> tuple[str, str]:
    return "", f"{len(read_checkpoint(folder))} tensors in whole files"


def _config(folder: Path) -> tuple[str, str]:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if values.get("model_type") != "emma":
        return f"model_type must be 'emma': got {values.get('model_type')!r}", ""
    return "" if values.get("auto_map") == AUTO_MAP else "`auto_map` does not name this package's classes", "ok"


def _card(folder: Path) -> tuple[str, str]:
    data = ModelCard.load(folder / "README.md").data.to_dict()
    lacking = [] if data.get("library_name") == "transformers" else ["library_name: transformers"]
    lacking += [key for key in ("pipeline_tag", "tags") if not data.get(key)]
    # Which licence is the owner's to say.
    found = "ok" if data.get("license") else "ok, but it names no license"
    return f"the YAML of README.md lacks {', '.join(lacking)}" if lacking else "", found


def _foreign_code(folder: Path) -> list[str]:
    """The Python files of a folder that differ from this package's, those that are missing left out."""
    room = Path(__file__).parent
    own = {name: room.parent / "model" / name for name in HUB_FILES}
    own["handler.py"] = room / "template" / "handler.py"
    return [
        name
        for name in files_of(folder)
        if name.endswith(".py") and (name not in own or sha256_of(folder / name) != sha256_of(own[name]))
    ]


def _check_answer(report: Report, source: str, revision: str | None) -> None:
    script = Path(__file__).with_name("answer_without_package.py")
    with tempfile.TemporaryDirectory() as place:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(place) / "modules")}
        command = [sys.executable, "-P", str(script), source, *([revision] if revision else [])]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["the process was killed"]
        report.add("answer", f"cannot be loaded without this package: {lines[-1][:300]}")
        return
    found = json.loads(done.stdout.splitlines()[-1])
    problems = []
    if found["weights"]:
        problems.append(f"{len(found['weights'])} weights are missing or foreign, first {found['weights'][0]}")
    if not found["finite"]:
        problems.append("not all logits are finite")
    if not found["tokens"]:
        problems.append("no token was generated")
    answer = f"{found['answer']!r} on Transformers {found['transformers']}"
    report.add("answer", "; ".join(problems), answer)
