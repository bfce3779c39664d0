"""MathVista: mathematics in images; an option's letter, a number or a list is extracted from the answer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from .answers import LETTERS, lettered, parse_letter
from .base import Figure, Sample, ScoredRow, Task
from .files import Row, read_objects

_NUMBER = r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|-?\d+(?:\.\d+)?|-?\.\d+"
_HINTS = {
    "integer": "requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.",
    "float1": "requiring a floating-point number with one decimal place and provide the final value, "
    "e.g., 1.2, 1.3, 1.4, at the end.",
    "float2": "requiring a floating-point number with two decimal places and provide the final value, "
    "e.g., 1.23, 1.34, 1.45, at the end.",
    "list": "requiring a Python list as an answer and provide the final list, "
    "e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.",
}


def query_of(row: Row, options: Mapping[str, str]) -> str:
    """The prompt of MathVista's own evaluation: a hint, the question and its choices."""
    kind = row.text("answer_type")
    if kind == "float":
        kind = f"float{_precision(row)}"
    hint = "and provide the correct option letter, e.g., A, B, C, D, at the end." if options else _HINTS.get(kind, "")
    unit = f" (Unit: {row.optional('unit')})" if row.optional("unit") else ""
    lines = [f"Hint: Please answer the question {hint}".strip(), f"Question: {row.text('question')}{unit}"]
    if options:
        lines += ["Choices:", *(f"({letter}) {text}" for letter, text in options.items())]
    return "\n".join(lines)


def _precision(row: Row) -> int:
    return int(float(row.optional("precision") or 1))


def parse_number(answer: str) -> str | None:
    """The first number after the last "answer is", "answer:" or "=", or else the only number of the answer."""
    last = re.split(r"answer is|answer:|=", answer, flags=re.IGNORECASE)
    told = re.findall(_NUMBER, last[-1]) if len(last) > 1 else []
    numbers = told[:1] or list(dict.fromkeys(re.findall(_NUMBER, answer)))
    return numbers[0].replace(",", "") if len(numbers) == 1 else None


def parse_list(answer: str) -> str | None:
    """The last list in brackets, its items as numbers where they are."""
    lists = re.findall(r"\[([^\[\]]*)\]", answer)
    return f"[{', '.join(_item(item) for item in lists[-1].split(','))}]" if lists else None


def _item(text: str) -> str:
    text = text.strip().strip("'\"")
    try:
        return repr(float(text))
    except ValueError:
        return text


class MathVista(Task):
    """MathVista's testmini questions, with their images."""

    name, title = "mathvista", "MathVista (testmini)"
    source = "https://huggingface.co/datasets/AI4Math/MathVista"
    files = {"annot_testmini.json": source, "images/": f"images.zip of {source}"}
    max_new_tokens = 1024
    authors_rule = (
        "Shows the model no image, and takes an answer for right where it holds the target's text anywhere "
        "(of options their text, though the prompt asks for a letter)."
    )
    constants = ("A",)

    def read(self, folder: Path) -> list[Sample]:
        rows = read_objects(folder / "annot_testmini.json")
        return [self.sample(folder, identity, row) for identity, row in rows.items()]

    def sample(self, folder: Path, identity: str, row: Row) -> Sample:
        answer = row.text("answer")
        choices = row.values.get("choices") or []
        options = lettered([str(choice) for choice in choices])
        chosen = row.one_of("question_type", ("multi_choice", "free_form")) == "multi_choice"
        right = LETTERS[[*options.values()].index(row.one_of("answer", options.values()))] if chosen else answer
        prompt = row.optional("query") or query_of(row, options)
        form = "choice" if chosen else row.one_of("answer_type", ("integer", "float", "list", "text"))
        extra = {"options": options, "answer": answer, "form": form, "precision": _precision(row)}
        metadata = row.values.get("metadata")
        kind = str(metadata.get("task", "")) if isinstance(metadata, dict) else ""
        image = folder / row.text("image")
        return Sample(identity, (image,), prompt, row.text("question"), prompt.split("\n")[0], right, kind, extra)

    def ask_as_authors(self, sample: Sample) -> Sample:
        return replace(sample, images=())

    def parse(self, answer: str, sample: Sample) -> str | None:
        form = sample.extra["form"]
        if form == "choice":
            return parse_letter(answer, sample.extra["options"])
        if form == "list":
            return parse_list(answer)
        return parse_number(answer) if form in ("integer", "float") else answer.strip() or None

    def score(self, parsed: str | None, sample: Sample) -> float:
        if parsed is None:
            return 0.0
        form, target = sample.extra["form"], sample.target
        if form == "integer":
            return float(int(Decimal(parsed)) == int(Decimal(target)))
        if form == "float":
            return float(round(float(parsed), sample.extra["precision"]) == float(target))
        return float(parsed == (parse_list(target) if form == "list" else target))

    def authors_figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        return {"accuracy": Figure.of_hits(row.sample.extra["answer"] in row.answer for row in rows)}


__all__ = ["MathVista", "parse_list", "parse_number", "query_of"]
