"""Whether a folder, or a repository on the Hub, is a complete and undamaged EMMA that loads without this package."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.utils import SAFE_WEIGHTS_NAME

from .. import __version__
from ..model.code_files_emma import AUTO_MAP, HUB_FILES
from ..model.errors_emma import EmmaError
from ..storage.folders import read_json
from ..storage.hub_access import hub_errors, parse_repo_id, resolve
from ..storage.tensors import read_checkpoint
from .manifest import (
    MANIFEST_NAME,
    REQUIRED_FILES,
    files_of,
    is_own_file,
    is_remote_file,
    read_manifest,
    sha256_of,
)
from .model_card import CARD_NAME, read_card
from .untrusted_code import find_untrusted_code, is_packaged_code, kernel_settings, python_files


@dataclass
class Row:
    """One line of a report: a file or a property, its size in bytes, its SHA-256, and what was found."""

    name: str
    found: str
    size: int | None = None
    sha256: str = ""
    ok: bool = True


@dataclass
class Report:
    """The result of [`check`]: a row per file and property, in the order of the checks.

    `code` maps each Python file of the source to its SHA-256: what `trust_remote_code=True`, or an endpoint, can run.
    """

    source: str
    rows: list[Row] = field(default_factory=list)
    code: dict[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> list[Row]:
        """The rows that are not as they must be."""
        return [row for row in self.rows if not row.ok]

    def add(self, name: str, problem: str, found: str = "ok", size: int | None = None, sha256: str = "") -> None:
        """Append a row, which is a failure unless `problem` is empty."""
        self.rows.append(Row(name, problem or found, size, sha256, not problem))

    def table(self) -> str:
        """The report in Markdown."""
        lines = ["| file | bytes | sha256 | found |", "|---|---|---|---|"]
        for row in self.rows:
            size = "" if row.size is None else str(row.size)
            lines.append(f"| {row.name} | {size} | {row.sha256[:12]} | {'' if row.ok else 'WRONG: '}{row.found} |")
        lines += ["", "Python files that run with `trust_remote_code=True` or as an endpoint:", ""]
        lines += ["| code | sha256 | origin |", "|---|---|---|"]
        for name, sha256 in self.code.items():
            origin = f"emma-hf {__version__}" if is_packaged_code(name, sha256) else "other code"
            lines.append(f"| {name} | {sha256} | {origin} |")
        return "\n".join(lines) + "\n"


def check(
    source: str | Path, revision: str | None = None, token: str | None = None, trust_remote_code: bool = False
) -> Report:
    """Check every file of a Hub folder by size and hash, and answer one question where this package is not importable.

    Args:
        source: a folder, or a Hub id (`org/name`), which is downloaded into the cache.
        revision: branch, tag or commit of a Hub id. Default: its main branch.
        token: for a Hub id. Default: the one of the environment.
        trust_remote_code: ask the question although other code runs than this version of the package writes.

    Returns:
        The report; the source is as it must be if its `failures` are empty.

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
    report.code = python_files(folder)
    missing = [name for name in HUB_FILES if not (folder / name).is_file()]
    untrusted = find_untrusted_code(folder)
    if missing:
        names = ", ".join(missing)
        report.add("answer", f"not asked: it lacks {names}, the code files. `emma-hf export` adds them")
    elif untrusted and not trust_remote_code:
        names = ", ".join(untrusted)
        report.add(
            "answer",
            f"not asked: this version of emma-hf has other code than {names}. Read it, and pass `--trust-remote-code`",
        )
    else:
        _check_answer(report, str(source) if remote else str(folder.resolve()), remote.sha if remote else None)
    return report


def _check_files(report: Report, folder: Path, remote: dict[str, Any] | None) -> None:
    names = set(files_of(folder))
    try:
        listed = read_manifest(folder)
        problem = "" if listed is not None else "missing: `emma-hf export` writes it"
    except EmmaError as error:
        listed, problem = None, str(error)
    report.add(MANIFEST_NAME, problem, f"lists {len(listed or ())} files")
    weights = {name for name in names if name.endswith(".safetensors")} or {SAFE_WEIGHTS_NAME}
    public = {name for name in remote or () if not name.startswith(".")}
    expected = {*REQUIRED_FILES, *weights, *(listed or ()), *public} - {MANIFEST_NAME}
    for name in sorted(expected):
        path = folder / name
        if name not in names:
            report.add(name, "missing")
        elif remote is None and not is_own_file(path, folder):
            report.add(name, "a link: a folder must hold the file itself")
        else:
            size, sha256 = path.stat().st_size, sha256_of(path)
            problems = [] if listed is None else _differences(listed.get(name), size, sha256)
            if remote is not None and not is_remote_file(path, remote.get(name), sha256):
                problems.append("the Hub says another hash")
            report.add(name, "; ".join(problems), "ok", size, sha256)
    for name in sorted(names - expected - {MANIFEST_NAME}):
        report.add(name, "", "not in the manifest: would not be pushed", (folder / name).lstat().st_size)


def _differences(entry: dict[str, Any] | None, size: int, sha256: str) -> list[str]:
    """How a file differs from its entry in the manifest."""
    if entry is None:
        return ["not in the manifest"]
    if entry["size"] != size:
        return [f"the manifest says {entry['size']} bytes"]
    if entry["sha256"] != sha256:
        return [f"the manifest says sha256 {entry['sha256'][:12]}"]
    return []


def _check_contents(report: Report, folder: Path) -> None:
    for name, look in (("weights", _weights), ("config", _config), ("card", _card)):
        try:
            problem, found = look(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem, found = " ".join(str(error).split())[:200] or type(error).__name__, ""
        report.add(name, problem, found)


def _weights(folder: Path) -> tuple[str, str]:
    return "", f"{len(read_checkpoint(folder))} tensors in whole files"


def _config(folder: Path) -> tuple[str, str]:
    values = read_json(folder / "config.json")
    if values.get("model_type") != "emma":
        return f"model_type must be 'emma': got {values.get('model_type')!r}", ""
    problems = [f"{setting} loads code from elsewhere: remove it" for setting in kernel_settings(values)]
    if values.get("auto_map") != AUTO_MAP:
        problems.append("`auto_map` does not name this package's classes")
    return "; ".join(problems), "ok"


def _card(folder: Path) -> tuple[str, str]:
    data = read_card(folder / CARD_NAME).data.to_dict()
    missing = [] if data.get("library_name") == "transformers" else ["library_name: transformers"]
    missing += [key for key in ("pipeline_tag", "tags") if not data.get(key)]
    # The license is the owner's to name.
    found = "ok" if data.get("license") else "ok, but it names no license"
    return f"the YAML of README.md lacks {', '.join(missing)}" if missing else "", found


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
    result = json.loads(done.stdout.splitlines()[-1])
    problems = []
    if result["weights"]:
        problems.append(f"{len(result['weights'])} weights are missing or unexpected, first {result['weights'][0]}")
    if not result["finite"]:
        problems.append("not all logits are finite")
    if not result["tokens"]:
        problems.append("no token was generated")
    answer = f"{result['answer']!r} on Transformers {result['transformers']}"
    report.add("answer", "; ".join(problems), answer)
