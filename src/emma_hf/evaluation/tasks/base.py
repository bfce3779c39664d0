"""What a benchmark is to the runner: samples, answers, scores and figures."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ...model.errors_emma import EmmaError
from ..statistics import QUANTILE, share

# A file, or a function that gives the image: bytes in a row of a table, or several images pasted into one.
ImageSource = Path | Callable[[], Image.Image]


@dataclass(frozen=True)
class Sample:
    """One question of a benchmark.

    Attributes:
        id: unique within the task.
        images: none for a question without an image.
        prompt: what the language model reads after the images, or with an `<image>` where each image stands if it holds
            any.
        question: the question alone, which the instruction rules `question` and `own` encode.
        authors_instruction: the text that the authors' script gives to the instruction encoder.
        target: the truth, in the form that the task's `score` reads.
        kind: a category: within it instructions are swapped, and tables have a line for it.
        extra: what else the task's metric needs.
    """

    id: str
    images: tuple[ImageSource, ...]
    prompt: str
    question: str
    authors_instruction: str
    target: Any
    kind: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredRow:
    """An answer, what was read from it (`None`: nothing could be) and its score in [0, 1]."""

    sample: Sample
    answer: str
    parsed: str | None
    score: float


@dataclass(frozen=True)
class Figure:
    """A share or a mean in [0, 1], the ends of its 95% interval, and the number of cases it is of.

    Of no cases the value is 0 and the interval [0, 1], so that a precision without predictions is defined.
    """

    value: float
    low: float
    high: float
    of: int

    @classmethod
    def of_hits(cls, hits: Iterable[bool]) -> "Figure":
        """The share of hits with Wilson's interval."""
        shares = share(hits)
        if not shares["of"]:
            return cls(0.0, 0.0, 1.0, 0)
        # An end of 0 or 1 is so but for rounding.
        return cls(shares["share"], max(0.0, shares["low"]), min(1.0, shares["high"]), int(shares["of"]))

    @classmethod
    def of_ratio(cls, parts: Sequence[float], wholes: Sequence[float]) -> "Figure":
        """The sum of `parts` over the sum of `wholes`, a pair a case; its interval is the linearized ratio estimator's.

        The cases, not what they count, are drawn at random: words of one answer are not independent of each other.
        """
        count, whole = len(parts), math.fsum(wholes)
        if not whole:
            return cls(0.0, 0.0, 1.0, 0)
        value = math.fsum(parts) / whole
        spread = math.sqrt(math.fsum((part - value * of) ** 2 for part, of in zip(parts, wholes)))
        half = QUANTILE * spread * math.sqrt(count / max(1, count - 1)) / whole
        return cls(value, max(0.0, value - half), min(1.0, value + half), count)

    @classmethod
    def of_values(cls, values: Sequence[float]) -> "Figure":
        """The mean of scores in [0, 1]; its interval is Wilson's where all are 0 or 1, else by their variance."""
        if all(value in (0.0, 1.0) for value in values):
            return cls.of_hits(value == 1.0 for value in values)
        return cls.of_ratio(values, [1.0] * len(values))

    @classmethod
    def of_f1(cls, both: int, only_predicted: int, only_true: int) -> "Figure":
        """F1 of a class from the counts of true positives, false positives and false negatives.

        F1 = 2J / (1 + J) with J the share of true positives among the three, so J's interval gives that of F1.
        """
        shares = cls.of_hits([True] * both + [False] * (only_predicted + only_true))
        value, low, high = (2 * end / (1 + end) for end in (shares.value, shares.low, shares.high))
        return cls(value, low, high, shares.of)


class Task(ABC):
    """A benchmark: reads its official files, asks, reads answers and scores them. All methods are pure.

    Attributes:
        name: what `--task` takes.
        title: the benchmark's name in tables.
        files: the path below `--data` of each needed file or folder (with a slash at its end), or a pattern of paths,
            and its official source.
        max_new_tokens: the longest answer.
        authors_rule: how the authors' script differs, in a sentence; empty where it does not.
        constants: answers that need no image; the summary says what a model that always gives each of them would get.
    """

    name: str
    title: str
    files: Mapping[str, str]
    max_new_tokens: int = 128
    authors_rule: str = ""
    constants: tuple[str, ...] = ()

    def load(self, folder: Path, authors: bool = False) -> list[Sample]:
        """Read the samples in the order of the official files.

        Args:
            folder: the folder that holds `files`.
            authors: whether to ask as the authors' script does, where it asks differently (MathVista: no image).

        Raises:
            EmmaError: a file is missing or a row is not of the benchmark's format; the text names the file and its
                official source, or the row.
        """
        for name, source in self.files.items():
            if not any(folder.glob(name)):
                raise EmmaError(f"The task {self.name} needs {name} in {folder}, which has none. Get it from {source}.")
        samples = self.read(folder)
        return [self.ask_as_authors(sample) for sample in samples] if authors else samples

    @abstractmethod
    def read(self, folder: Path) -> list[Sample]:
        """Read the samples from files that exist."""

    def ask_as_authors(self, sample: Sample) -> Sample:
        """The sample as the authors' script shows it to the model."""
        return sample

    @abstractmethod
    def parse(self, answer: str, sample: Sample) -> str | None:
        """What an answer says, or `None` where it cannot be told."""

    @abstractmethod
    def score(self, parsed: str | None, sample: Sample) -> float:
        """The score of one answer in [0, 1]; 0 for `None`."""

    def figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        """The benchmark's own figures, the headline first: here the mean score. Each kind's is the report's to give."""
        return {"accuracy": Figure.of_values([row.score for row in rows])}

    def compared(self, figures: Mapping[str, Figure]) -> list[str]:
        """The names of the figures that are also given for a constant answer."""
        return [next(iter(figures))]

    def authors_figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        """The same answers by the authors' scoring; empty where it is the same.

        Args:
            rows: in the order of `load`, on which their rule for AMBER depends.
        """
        return {}

    def answered(self, sample: Sample, answer: str) -> ScoredRow:
        """The row of one answer."""
        parsed = self.parse(answer, sample)
        return ScoredRow(sample, answer, parsed, self.score(parsed, sample))

    def summarize(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        """All figures of a run: the headline first, what constant answers would get, and the share not parsed.

        Args:
            rows: in the order of `load`.
        """
        figures = self.figures(rows)
        compared = self.compared(figures)
        for constant in self.constants:
            always = self.figures([self.answered(row.sample, constant) for row in rows])
            figures |= {f'{name} of always "{constant}"': always[name] for name in compared}
        figures["answers not parsed"] = Figure.of_hits(row.parsed is None for row in rows)
        return figures


__all__ = ["Figure", "ImageSource", "Sample", "ScoredRow", "Task"]
