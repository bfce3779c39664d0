"""A small task of yes/no questions and models that only answer, for what the runner does around them."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from emma_hf.evaluation.runner import Run, run_header, run_task
from emma_hf.evaluation.tasks.base import Sample, Task


class StubTask(Task):
    """Yes/no questions about plain images, of two kinds that alternate; the truth of every third is no."""

    name, title, files = "stub", "Stub", {"questions.txt": "https://example.org/questions"}

    def read(self, folder: Path) -> list[Sample]:
        return samples(len((folder / "questions.txt").read_text().split()))

    def parse(self, answer: str, sample: Sample) -> str | None:
        word = answer.strip(".").lower()
        return word if word in ("yes", "no") else None

    def score(self, parsed: str | None, sample: Sample) -> float:
        return float(parsed == sample.target)


def samples(count: int) -> list[Sample]:
    return [
        Sample(
            id=f"q{index}",
            images=(lambda: Image.new("RGB", (8, 8), "red"),),
            prompt=f"Is thing {index} there?\nAnswer yes or no.",
            question=f"Is thing {index} there?",
            authors_instruction=f"thing {index}",
            target="no" if index % 3 == 0 else "yes",
            kind="even" if index % 2 == 0 else "odd",
        )
        for index in range(count)
    ]


def always(answer: Callable[[Sample, str], str] | str, asked: list | None = None):
    """An answerer that gives the same text, or what a function makes of a sample and its instruction."""

    def answerer(batch, images, columns):
        assert len(batch) == len(images) == len(columns[0])
        if asked is not None:
            asked.extend((sample.id, text) for column in columns for sample, text in zip(batch, column))
        return [
            [answer if isinstance(answer, str) else answer(sample, text) for sample, text in zip(batch, column)]
            for column in columns
        ]

    return answerer


def run_stub(
    output: Path, answerer, task=None, asked=None, columns=("own", "swapped", "empty"), **options
) -> Run | None:
    task = task or StubTask()
    asked = samples(12) if asked is None else asked
    header = run_header(task, asked, columns) | options.pop("header", {})
    return run_task(task, asked, columns, lambda: answerer, output, header, **options)
