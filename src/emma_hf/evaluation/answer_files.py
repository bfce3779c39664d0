"""The answers of a run on disk: written as they come, complete lines only, and of one run only."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..model.errors_emma import EmmaError

try:
    import fcntl
except ImportError:
    # Windows has none.
    fcntl = None  # type: ignore[assignment]

# The answers of a finished run, in the order of the task; while it runs, each process has a part of its own.
MERGED = "answers.jsonl"
PART = "answers-of-process-{}.jsonl"

Answers = dict[tuple[str, str], dict[str, Any]]


def read_answers(folder: Path, header: Mapping[str, Any]) -> Answers:
    """The rows of all files of a run, by id and instruction rule.

    Of a row that is there twice the first counts, but one with an answer before one whose images could not be read.
    A last line without its line break was torn by a kill and does not count; a file whose header is torn is empty.

    Raises:
        EmmaError: a file of another run, or a line that is not a row of a run.
    """
    answers: Answers = {}
    for path in _files(folder):
        lines = _complete_lines(path)
        if lines:
            _check_header(path, _parse(path, 1, lines[0]), header)
        for number, line in enumerate(lines[1:], 2):
            row = _parse(path, number, line)
            try:
                key = row["id"], row["rule"]
                if key not in answers or "unreadable" in answers[key]:
                    answers[key] = row
            except (KeyError, TypeError) as error:
                raise EmmaError(f"{path}, line {number}: a row needs an id and a rule. Remove that line.") from error
    return answers


@contextmanager
def append_answers(folder: Path, header: Mapping[str, Any], process: int) -> Iterator[TextIO]:
    """Open the part of one process to append rows with [`write_rows`]; what a kill tore is cut off first.

    Raises:
        EmmaError: another process is writing it.
    """
    path = folder / PART.format(process)
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise EmmaError(
                    f"{path} is being written by another run. Wait for it, end it, or name another `--output`."
                ) from error
        complete = sum(len(line) + 1 for line in _complete_lines(path))
        file.truncate(complete)
        if not complete:
            write_rows(file, [header])
        yield file


def write_rows(file: TextIO, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows, and hand them to the operating system: they outlive the process."""
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.flush()


def merge_answers(folder: Path, header: Mapping[str, Any], keys: Iterable[tuple[str, str]]) -> Answers:
    """Bring all parts of a run into one file, first the rows of `keys` in this order, and return all rows.

    The file appears complete; a kill at any moment leaves every row in one file at least.
    """
    answers = read_answers(folder, header)
    ordered = {key: answers[key] for key in keys} | answers
    temporary = folder / f".{MERGED}.incomplete"
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        write_rows(file, [header, *ordered.values()])
        os.fsync(file.fileno())
    temporary.replace(folder / MERGED)
    for path in folder.glob(PART.format("*")):
        path.unlink()
    return ordered


def _files(folder: Path) -> list[Path]:
    merged = folder / MERGED
    return [merged] * merged.is_file() + sorted(folder.glob(PART.format("*")))


def _complete_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if isinstance(row, dict):
            return row
        reason = f"it holds a {type(row).__name__}"
    except ValueError as error:
        reason = str(error)
    raise EmmaError(f"{path}, line {number}, is no JSON object ({reason}). Remove that line; it is asked again.")


def _check_header(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if found.get(name) != value:
            raise EmmaError(
                f"{path} holds the answers of another run: its {name} is {_shown(found.get(name))}, that of this run "
                f"is {_shown(value)}. Name another `--output`, or remove the folder."
            )


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


__all__ = ["Answers", "append_answers", "merge_answers", "read_answers", "write_rows"]
