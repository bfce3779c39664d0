"""MMMU: questions of thirty college subjects, most with options, some with a free answer."""

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...model.errors_emma import EmmaError
from .answers import LETTERS, first_line, lettered, option_lines
from .base import Figure, ImageSource, Sample, ScoredRow, Task
from .choices import LETTER, paste
from .files import Row, image_of_bytes, read_parquet
from .vqa import SHORT

# The forms in which an answer may name a letter, and how the last of several is found, as MMMU's own evaluation has it.
_FORMS = (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} "))
_KEY_WORDS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def parse_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that MMMU's evaluation reads; where that draws a letter at random, `None`."""
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    text = f" {answer} "
    for form, place in _FORMS:
        named = [letter for letter in options if form.format(letter) in text]
        if named:
            return max(named, key=lambda letter: text.rfind(place.format(letter)))
    lower = text.lower()
    said = [letter for letter, option in options.items() if option.lower() in lower] if len(text.split()) > 5 else []
    return max(said, key=lambda letter: lower.rfind(options[letter].lower())) if said else None


def normalize(text: str) -> list[str | float]:
    """A number rounded to two places, or lower-case text; one letter stands at the edge of a word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def candidates(answer: str) -> list[str | float]:
    """What a free answer may mean: the ends of its sentences after words such as "is", and the numbers in them."""
    answer = answer.strip().strip(".").lower()
    parts = answer.split("\n")
    keys = []
    for number, part in enumerate(parts):
        words = (*_KEY_WORDS, "=") if number == len(parts) - 1 else _KEY_WORDS
        ends = [part.split(word)[-1].strip() for word in words if word in part]
        shortest = ""
        for end in ends:
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in tuple(":,.!?;'"):
            keys.append(shortest)
    keys = keys or [answer]
    numbers = [number for key in keys for pattern in _NUMBERS for number in re.findall(pattern, key)]
    return [meaning for text in keys + numbers for meaning in normalize(text)]


def is_right(answer: str, truths: Sequence[str]) -> bool:
    """Whether a free answer holds one of the truths: text within text, numbers by value."""
    true = [meaning for truth in truths for meaning in normalize(truth)]
    texts = [meaning for meaning in true if isinstance(meaning, str)]
    return any(
        any(text in said for text in texts) if isinstance(said, str) else said in true for said in candidates(answer)
    )


class MMMU(Task):
    """MMMU's validation questions, the images given one by one or, as in the paper, pasted into one.

    The target is a letter, or the list of free answers that are right.
    """

    source = "https://huggingface.co/datasets/MMMU/MMMU"
    files = {"*/validation-*.parquet": source}
    constants = ("A",)

    def __init__(self, pasted: bool):
        self.pasted = pasted
        self.name = "mmmu-pasted" if pasted else "mmmu"
        self.title = f"MMMU (validation, {'images pasted into one' if pasted else 'several images'})"
        self.authors_rule = (
            "An answer is right where it is the target exactly, which free answers nearly never are."
            + ("" if pasted else " The images are pasted into one, as in the task mmmu-pasted.")
        )

    def read(self, folder: Path) -> list[Sample]:
        return [self.sample(row) for row in read_parquet(folder, "*/validation-*.parquet")]

    def sample(self, row: Row) -> Sample:
        identity, question = row.text("id"), row.text("question")
        options = lettered([str(option) for option in _list_of(row, "options")])
        free = row.one_of("question_type", ("multiple-choice", "open")) == "open"
        listed = options and not free
        asked = f"{question}\n{option_lines(options)}" if listed else question
        if self.pasted:
            prompt = asked + LETTER
            numbers: Sequence[int] = [number for number in range(1, 7) if row.values.get(f"image_{number}")]
        else:
            # As lmms-eval asks: an empty line before what to do, and the images that the text names.
            prompt = f"{asked}\n{SHORT if free else LETTER}"
            numbers = sorted({int(number) for number in re.findall(r"<image (\d)>", asked)})
        images = [image_of_bytes(row, row.values.get(f"image_{number}")) for number in numbers]
        shown: tuple[ImageSource, ...] = (paste(images),) if self.pasted and images else tuple(images)
        answer = row.text("answer")
        if free:
            target: Any = _list_of(row, "answer") if answer.startswith("[") else [answer]
            target = [str(truth) for truth in target]
        else:
            target = row.one_of("answer", LETTERS[: len(options)])
        bare = re.sub(r"\s*<image \d>\s*", " ", question).strip()
        kind = re.sub(r"^[^_]*_|_\d+$", "", identity)
        extra = {"options": options, "answer": answer, "free": free}
        return Sample(identity, shown, prompt, bare, first_line(question), target, kind, extra)

    def parse(self, answer: str, sample: Sample) -> str | None:
        return answer.strip() or None if sample.extra["free"] else parse_choice(answer, sample.extra["options"])

    def score(self, parsed: str | None, sample: Sample) -> float:
        if parsed is None or not sample.extra["free"]:
            return float(parsed == sample.target)
        return float(is_right(parsed, sample.target))

    def authors_figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        return {"accuracy": Figure.of_hits(row.answer.strip() == row.sample.extra["answer"] for row in rows)}


def _list_of(row: Row, key: str) -> list[Any]:
    """A field that holds a list as Python writes it."""
    try:
        value = ast.literal_eval(row.text(key))
    except (ValueError, SyntaxError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise EmmaError(
            f"{row.where}: the field {key!r} must be a list as Python writes it: got {row.values[key]!r:.80}."
        )
    return value


MMMU_TASKS: tuple[Task, ...] = (MMMU(pasted=False), MMMU(pasted=True))

__all__ = ["MMMU", "MMMU_TASKS", "candidates", "is_right", "normalize", "parse_choice"]
