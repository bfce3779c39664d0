"""Folders that appear when they are complete, and the JSON files in them."""

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..model.errors_emma import EmmaError

try:
    import fcntl
except ImportError:
    # Windows has none.
    fcntl = None  # type: ignore[assignment]


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `output` that is renamed to `output` at the end, and removed after an error.

    What a killed run for the same `output` left there is removed first.

    Raises:
        EmmaError: `output` exists.
    """
    output = Path(output)
    refuse_existing(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(output.parent, output.name) as folder:
        folder.chmod(0o755)
        yield folder
        folder.rename(output)


def refuse_existing(output: str | Path) -> None:
    """Raise `EmmaError` where `output` exists; a long run calls this at its beginning."""
    # A link that leads nowhere would fail at the end only.
    if os.path.lexists(output):
        raise EmmaError(f"OUTPUT must not exist yet: {output} does. Name another folder, or remove it.")


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a hidden folder in `parent`, `.NAME-<random>.incomplete`, which is removed at the end.

    Folders of that name whose process was killed are removed first: a process locks its folder as long as it runs.
    Where the file system knows no such locks, they stay.
    """
    for abandoned in parent.glob(f".{glob.escape(name)}-????????.incomplete"):
        lock = _try_lock(abandoned)
        if lock is not None:
            shutil.rmtree(abandoned, ignore_errors=True)
            os.close(lock)
    folder = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=parent))
    lock = _try_lock(folder)
    # Not before it is locked does it get the name that others look for.
    folder = folder.rename(f"{folder}.incomplete")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _try_lock(folder: Path) -> int | None:
    """Descriptor that locks a folder until it is closed; None if that cannot be, as when another process has it."""
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


@contextmanager
def damaged_files_named(source: str | Path) -> Iterator[None]:
    """Say which folder or repository it is whose files cannot be used, whatever a library says of them.

    Raises:
        EmmaError: in place of any error but those that a user can read already, and a lack of memory or of a package.
    """
    try:
        yield
    except (EmmaError, ImportError, MemoryError, OSError, torch.OutOfMemoryError):
        raise
    # Damaged or missing configs, tokenizers and vocabularies raise nearly anything, also KeyError.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise EmmaError(
            f"The files of a checkpoint must be complete: those of {source} cannot be used ({type(error).__name__}: "
            f"{reason}). Save or fetch them again."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        EmmaError: the file is not JSON, or holds something other than an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Fetch it with the checkpoint.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    # Lists nested too deeply are a RecursionError.
    except (ValueError, RecursionError) as error:
        raise EmmaError(f"{path} is not JSON ({error}). Fetch it again.") from error
    if not isinstance(values, dict):
        raise EmmaError(f"{path} must hold a JSON object: got {type(values).__name__}. Fetch it again.")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write one JSON object, indented, with a newline at the end."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
