"""Where each row of a JSON or JSON lines file lies, so that rows are read one at a time."""

import json
import re
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from ..model.errors_emma import EmmaError

LINES_SUFFIXES = (".jsonl", ".ndjson")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANK = re.compile(r"[ \t\r\n]*")


def row_spans(path: Path) -> np.ndarray:
    """First and last byte of each row, int64 (rows, 2).

    Raises:
        EmmaError: a file that holds something other than one list of rows, or, named `.jsonl` or `.ndjson`, rows on
            lines.
    """
    spans = _spans_of_lines(path) if path.suffix.lower() in LINES_SUFFIXES else _spans_of_list(path)
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def read_row(path: Path, start: int, end: int) -> Any:
    """The JSON value in these bytes of a file.

    Raises:
        ValueError: it is not JSON.
    """
    with open(path, "rb") as file:
        file.seek(start)
        try:
            return json.loads(file.read(end - start))
        except RecursionError as error:
            raise EmmaError("A row must not be nested this deeply.") from error


def _spans_of_lines(path: Path) -> array:
    spans, position = array("q"), 0
    with open(path, "rb") as file:
        for line in file:
            text = line.removeprefix(BYTE_ORDER_MARK).strip() if position == 0 else line.strip()
            if text.startswith(b"[") and not spans:
                raise EmmaError(f"{path} must hold one row a line: it begins with a list. Name it .json.")
            if text:
                spans.extend((position, position + len(line)))
            position += len(line)
    return spans


def _spans_of_list(path: Path) -> array:
    data = path.read_bytes()
    offset = len(BYTE_ORDER_MARK) if data.startswith(BYTE_ORDER_MARK) else 0
    try:
        # Decoded here and not by `read_text`, which reads "\r\n" as one character.
        text = data[offset:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise EmmaError(f"{path} must be JSON in UTF-8: {error}. Unpack it, or save it in UTF-8.") from error
    spans, decoder, last = array("q"), json.JSONDecoder(), 0
    index = _after_blank(text, 0)
    try:
        if text[index] != "[":
            raise EmmaError(f"{path} must hold a JSON list of rows: {_other_layout(text, index, decoder)}")
        index = _after_blank(text, index + 1)
        while spans or text[index] != "]":
            _, end = decoder.raw_decode(text, index)
            offset += len(text[last:index].encode())
            size = len(text[index:end].encode())
            spans.extend((offset, offset + size))
            offset, last, index = offset + size, end, _after_blank(text, end)
            if text[index] == "]":
                break
            if text[index] != ",":
                raise ValueError(f"no comma after a row: char {index}")
            index = _after_blank(text, index + 1)
    except EmmaError:
        raise
    except (ValueError, IndexError, RecursionError) as error:
        raise EmmaError(
            f"{path} must hold a JSON list of rows ({error}). Is it complete? Name JSON lines .jsonl."
        ) from error
    if _after_blank(text, index + 1) != len(text):
        raise EmmaError(
            f"{path} must hold one JSON list of rows: more follows its end at character {index + 1}. Write all rows "
            "into one list."
        )
    return spans


def _after_blank(text: str, index: int) -> int:
    match = _BLANK.match(text, index)
    return match.end() if match else index


def _other_layout(text: str, index: int, decoder: json.JSONDecoder) -> str:
    """What a JSON file that does not begin with a list looks like, and what to do about it."""
    value, end = decoder.raw_decode(text, index)
    if not isinstance(value, dict):
        return f"it holds {type(value).__name__} {text[index:end][:40]}."
    if _after_blank(text, end) < len(text) or "conversations" in value:
        return "it looks like JSON lines. Name it .jsonl."
    return f"it holds an object with the keys {sorted(value)[:10]}. Write the rows of one key into a file of their own."
