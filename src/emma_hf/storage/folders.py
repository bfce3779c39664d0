"""Folders that appear when they are complete, and the JSON files in them."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..model.errors_emma import EmmaError


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `output` that is renamed to `output` at the end, and removed after an error.

    Raises:
        EmmaError: `output` exists.
    """
    output = Path(output)
    if output.exists():
        raise EmmaError(f"OUTPUT must not exist yet: {output} does. Name another folder, or remove it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        folder.chmod(0o755)
        yield folder
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
