"""Questions about images: where they come from, and which other question's instruction stands beside each."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.row_files import read_row, row_spans
from ..model.errors_emma import EmmaError
from ..model.instruction_emma import instruction_from_turn

NAMES = ("image", "question", "answer", "kind")


class TooFewQuestionsError(EmmaError):
    """Fewer questions, images or answers than a figure compares."""


@dataclass(frozen=True)
class Row:
    """A question about an image.

    Args:
        image: anything that the processor takes. Equal paths are one image, which is encoded once.
        question: the user's turn as the language model reads it.
        answer: the right answer, or None where it is not known.
        kind: the name of the kind of question, or None.
    """

    image: Any
    question: str
    answer: str | None = None
    kind: str | None = None

    @property
    def instruction(self) -> str:
        """What the instruction encoder reads: the question up to its first line break."""
        return instruction_from_turn(self.question)


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a file: an object with `image` and `question`, and if known `answer` and `kind`, on each line.

    Args:
        path: file of JSON lines (`.jsonl`, `.ndjson`), or of one JSON list. Paths of images are relative to its folder.

    Raises:
        EmmaError: another format; a row without an image or a question; answers in some rows alone. The text names
            the row, counted from 1.
        FileNotFoundError: no such file, or no image where a row says.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`--questions` must be a file of JSON lines: there is none at {path}.")
    rows = []
    for number, (start, end) in enumerate(row_spans(path), 1):
        try:
            value = read_row(path, int(start), int(end))
        except ValueError as error:
            raise EmmaError(f"Row {number} of {path.name} must be JSON, one object a line: {error}.") from error
        rows.append(_read_row(value, path.parent, f"Row {number} of {path.name}"))
    for number, row in enumerate(rows, 1):
        if row.answer is None and any(other.answer is not None for other in rows):
            raise EmmaError(
                f"Either every row has an `answer` or none: row {number} of {path.name} has none, others have. Add it, "
                "or remove the row."
            )
    return rows


def _read_row(value: Any, folder: Path, name: str) -> Row:
    if not isinstance(value, dict):
        raise EmmaError(
            f'{name} must be an object such as {{"image": "a.jpg", "question": "Who?"}}: got {type(value).__name__}.'
        )
    for key in NAMES:
        text = value.get(key)
        if key in ("image", "question") and (not isinstance(text, str) or not text.strip()):
            raise EmmaError(f"{name} must have `{key}`, a text: got {text!r}. Its keys are {sorted(value)[:10]}.")
        if text is not None and not isinstance(text, str):
            raise EmmaError(f"{name}: `{key}` must be a text: got {text!r}.")
    image = value["image"]
    if "://" not in image and not image.startswith("data:"):
        image = str(folder / image)
        if not Path(image).is_file():
            raise FileNotFoundError(f"{name}: there is no image at {image}.")
    return Row(image, value["question"], value.get("answer"), value.get("kind"))


def other_instructions(rows: Sequence[Row], seed: int = 0, same_kind: bool | None = None) -> list[str]:
    """For each row the instruction of another row, of a different text.

    Args:
        rows: two different instructions at least.
        seed: seed of the choice.
        same_kind: True: of a row of the same kind. False: of another kind. None: of any row.

    Raises:
        TooFewQuestionsError: a row for which there is none.
    """
    choose = random.Random(seed).choice
    instructions = sorted({(row.kind or "", row.instruction) for row in rows})
    chosen = []
    for number, row in enumerate(rows, 1):
        others = [
            text
            for kind, text in instructions
            if text != row.instruction and (same_kind is None or (kind == (row.kind or "")) == same_kind)
        ]
        if not others:
            which = {None: "", True: f" of the kind {row.kind!r}", False: " of another kind"}[same_kind]
            raise TooFewQuestionsError(
                f"A question is compared with a different one{which}, so there must be 2 at least: row {number} "
                f"({row.instruction!r}) has none. Add questions{which}."
            )
        chosen.append(choose(others))
    return chosen


__all__ = ["Row", "TooFewQuestionsError", "other_instructions", "read_rows"]
