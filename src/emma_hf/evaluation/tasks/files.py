"""The files of benchmarks as rows; an error names the file and the row."""

import base64
import binascii
import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ...model.errors_emma import EmmaError, MissingPackageError


class Row:
    """One row of a benchmark's file.

    Args:
        values: its fields.
        where: the file and the row's place in it, for errors.
    """

    def __init__(self, values: Any, where: str):
        if not isinstance(values, Mapping):
            raise EmmaError(f"{where} must be an object with named fields: got {type(values).__name__}.")
        self.values = values
        self.where = where

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """A field that must be there.

        Raises:
            EmmaError: it is missing, or of another type than `kind`.
        """
        if key not in self.values:
            raise EmmaError(f"{self.where} must have the field {key!r}: got {', '.join(map(str, self.values))}.")
        value = self.values[key]
        if not isinstance(value, kind):
            raise EmmaError(f"{self.where}: the field {key!r} is of an unexpected type: got {value!r:.80}.")
        return value

    def text(self, key: str) -> str:
        """A field that must be text or a whole number, as text."""
        return str(self.get(key, (str, int)))

    def one_of(self, key: str, allowed: Iterable[str]) -> str:
        """A field that must be one of some texts, whatever its case; returned as `allowed` writes it."""
        value = self.text(key).strip()
        for choice in allowed:
            if value.lower() == choice.lower():
                return choice
        raise EmmaError(f"{self.where}: the field {key!r} must be one of {', '.join(allowed)}: got {value!r:.80}.")

    def optional(self, key: str) -> str:
        """A field as text, empty where it is missing, `None` or the `nan` that pandas writes for it."""
        value = self.values.get(key)
        return "" if value is None or str(value).strip().lower() == "nan" else str(value)

    def rows(self, key: str) -> list["Row"]:
        """A field that must be a list of objects."""
        return rows_of(self.get(key, list), f"{self.where}, {key}")


def rows_of(values: Any, where: str | Path) -> list[Row]:
    """A list of objects as rows that know their place."""
    if not isinstance(values, list):
        raise EmmaError(f"{where} must be a list of rows: got {type(values).__name__}.")
    return [Row(value, f"{where}, row {number}") for number, value in enumerate(values, 1)]


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    # Lists nested too deeply are a RecursionError.
    except (ValueError, RecursionError) as error:
        raise EmmaError(f"{path} is not JSON ({error}). Get it again.") from error


def read_object(path: Path) -> Row:
    """A JSON file that holds one object."""
    return Row(read_json(path), str(path))


def read_objects(path: Path) -> dict[str, Row]:
    """A JSON file that holds an object of objects, by their keys."""
    return {key: Row(value, f"{path}, row {key!r}") for key, value in read_object(path).values.items()}


def read_list(path: Path) -> list[Row]:
    """A JSON file that holds a list of objects."""
    return rows_of(read_json(path), path)


def read_lines(path: Path) -> list[Row]:
    """A file with a JSON object on each line."""
    rows = []
    # Text may hold characters that end a line elsewhere than in a file of bytes.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, row {number}"
        try:
            rows.append(Row(json.loads(line), where))
        except (ValueError, RecursionError) as error:
            raise EmmaError(f"{where} is not JSON ({error}). Get the file again.") from error
    return rows


def read_table(path: Path, delimiter: str) -> list[Row]:
    """A file of comma- or tab-separated values whose first line names the fields."""
    # Images of any size stand in a field, in base64.
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            return rows_of(list(csv.DictReader(file, delimiter=delimiter)), path)
        except (csv.Error, UnicodeDecodeError) as error:
            raise EmmaError(f"{path} is not a table of values ({error}). Get it again.") from error


def read_words(path: Path) -> list[str]:
    """The words of a text file."""
    try:
        return path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise EmmaError(f"{path} is not text in UTF-8 ({error}). Get it again.") from error


def read_parquet(folder: Path, pattern: str) -> list[Row]:
    """The rows of all parquet files of a pattern, in the order of the files' names.

    Raises:
        MissingPackageError: pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table as read_parquet_table
    except ImportError as error:
        raise MissingPackageError(
            "Parquet files need the package pyarrow, which is not installed: pip install 'emma-hf[evaluation]'."
        ) from error
    rows = []
    for path in sorted(folder.glob(pattern)):
        try:
            rows += rows_of(read_parquet_table(path).to_pylist(), path)
        except ArrowException as error:
            raise EmmaError(f"{path} is not a parquet file ({error}). Get it again.") from error
    return rows


def image_of_bytes(row: Row, value: Any) -> Callable[[], Image.Image]:
    """An image that a parquet file holds as `{"bytes": ..., "path": ...}`, to be decoded when it is needed."""
    if not isinstance(value, Mapping) or not isinstance(value.get("bytes"), bytes):
        raise EmmaError(f"{row.where}: an image must be an object with `bytes`: got {value!r:.80}.")
    content = value["bytes"]
    return lambda: Image.open(io.BytesIO(content))


def image_of_base64(row: Row, key: str) -> Callable[[], Image.Image]:
    """An image that a table holds in base64, to be decoded when it is needed."""
    content = row.text(key)

    def decoded() -> Image.Image:
        try:
            return Image.open(io.BytesIO(base64.b64decode(content)))
        except binascii.Error as error:
            raise OSError(f"The image is not base64: {error}.") from error

    return decoded


__all__ = [
    "Row",
    "image_of_base64",
    "image_of_bytes",
    "read_json",
    "read_lines",
    "read_list",
    "read_object",
    "read_objects",
    "read_parquet",
    "read_table",
    "read_words",
    "rows_of",
]
