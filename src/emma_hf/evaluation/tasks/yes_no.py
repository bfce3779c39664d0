"""Questions to be answered with yes or no: POPE, and the counts that it and AMBER share."""

from collections.abc import Sequence
from pathlib import Path

from .answers import parse_yes_no
from .base import Figure, Sample, ScoredRow, Task
from .files import read_lines
from .vqa import COCO_IMAGES, SHORT


class YesNoTask(Task):
    """A task whose target is `yes` or `no`."""

    constants = ("yes", "no")

    def parse(self, answer: str, sample: Sample) -> str | None:
        return parse_yes_no(answer)

    def score(self, parsed: str | None, sample: Sample) -> float:
        return float(parsed == sample.target)


def class_figures(rows: Sequence[ScoredRow], word: str, ending: str = "") -> dict[str, Figure]:
    """Accuracy, precision, recall and F1 of the answer `word`, and the share of yes among the answers.

    A precision without an answer `word` is 0, as is an F1 of no true positives. An answer that is neither yes nor no is
    wrong, and counts as neither in the share.
    """
    said = [row for row in rows if row.parsed == word]
    true = [row for row in rows if row.sample.target == word]
    right = sum(row.sample.target == word for row in said)
    return {
        f"accuracy{ending}": Figure.of_hits(row.score == 1 for row in rows),
        f'precision of "{word}"{ending}': Figure.of_hits(row.sample.target == word for row in said),
        f'recall of "{word}"{ending}': Figure.of_hits(row.parsed == word for row in true),
        f'F1 of "{word}"{ending}': Figure.of_f1(right, len(said) - right, len(true) - right),
        f'answers "yes"{ending}': Figure.of_hits(row.parsed == "yes" for row in rows),
    }


def of_kind(rows: Sequence[ScoredRow], kind: str) -> list[ScoredRow]:
    """The rows of one kind."""
    return [row for row in rows if row.sample.kind == kind]


class Pope(YesNoTask):
    """POPE: whether an object is in the image, with three ways to choose the objects that are not."""

    name, title = "pope", "POPE (COCO)"
    splits = ("random", "popular", "adversarial")
    files = {
        **dict.fromkeys((f"coco_pope_{split}.json" for split in splits), "https://github.com/RUCAIBox/POPE"),
        "val2014/": COCO_IMAGES,
    }
    authors_rule = (
        'LLaVA\'s script: "no" where the first sentence holds the word No, no or not, else "yes", whatever it says.'
    )

    def read(self, folder: Path) -> list[Sample]:
        samples = []
        for split in self.splits:
            for row in read_lines(folder / f"coco_pope_{split}.json"):
                question, target = row.text("text"), row.one_of("label", ("yes", "no"))
                image = folder / "val2014" / row.text("image")
                identity = f"{split}-{row.text('question_id')}"
                samples.append(Sample(identity, (image,), question + SHORT, question, question, target, split))
        return samples

    def figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        figures = class_figures(rows, "yes")
        for split in self.splits:
            figures |= class_figures(of_kind(rows, split), "yes", f", {split}") if of_kind(rows, split) else {}
        return figures

    def authors_figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        read = [(_llava_says(row.answer), row) for row in rows]
        scored = [ScoredRow(row.sample, row.answer, word, self.score(word, row.sample)) for word, row in read]
        return self.figures(scored)


def _llava_says(answer: str) -> str:
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


__all__ = ["Pope", "YesNoTask", "class_figures", "of_kind"]
