"""Questions in pairs that count together: MMVP's two images, FOIL's two orders of captions."""

import random
import re
from collections.abc import Sequence
from pathlib import Path

from ...model.errors_emma import EmmaError
from .answers import lettered, option_lines
from .base import Figure, Sample, ScoredRow
from .choices import LETTER, LetterTask
from .files import Row, read_object, read_table
from .vqa import COCO_IMAGES

# Rows whose published label is that of the pair's other image (issue 30 of tsb0601/MMVP; lmms-eval has them so, too).
CORRECTED = {"99": "B", "100": "A", "279": "B", "280": "A"}
FOIL_SEED = 0


def pairs_of(rows: Sequence[ScoredRow]) -> list[list[ScoredRow]]:
    """The rows of each pair of which both were asked, in the order of the pairs' first rows."""
    pairs: dict[str, list[ScoredRow]] = {}
    for row in rows:
        pairs.setdefault(row.sample.extra["pair"], []).append(row)
    return [pair for pair in pairs.values() if len(pair) == 2]


class MMVP(LetterTask):
    """MMVP: one question about two images that CLIP takes for the same; a pair counts where both answers are right."""

    name, title = "mmvp", "MMVP"
    source = "https://huggingface.co/datasets/MMVP/MMVP"
    files = {"Questions.csv": source, "MMVP Images/": source}
    authors_rule = (
        'An answer is right where it holds the letter anywhere ("A" is in "And"), by the labels as published.'
    )
    constants = ("A", "B")

    def read(self, folder: Path) -> list[Sample]:
        return [
            self.sample(folder, number, row) for number, row in enumerate(read_table(folder / "Questions.csv", ","))
        ]

    def sample(self, folder: Path, number: int, row: Row) -> Sample:
        texts = re.fullmatch(r"\s*\(a\)(.*)\(b\)(.*)", row.text("Options"), re.DOTALL)
        if texts is None:
            raise EmmaError(f"{row.where}: `Options` must be '(a) ... (b) ...': got {row.text('Options')!r:.80}.")
        options = lettered([text.strip() for text in texts.groups()])
        published = row.one_of("Correct Answer", ("(a)", "(b)"))[1].upper()
        index, question = row.text("Index"), row.text("Question")
        prompt = f"{question}\n{option_lines(options)}{LETTER}"
        extra = {"options": options, "pair": str(number // 2), "published": published}
        image = folder / "MMVP Images" / f"{index}.jpg"
        return Sample(index, (image,), prompt, question, question, CORRECTED.get(index, published), "", extra)

    def figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        return {
            "pair accuracy": Figure.of_hits(all(row.score == 1 for row in pair) for pair in pairs_of(rows)),
            "accuracy": Figure.of_hits(row.score == 1 for row in rows),
        }

    def authors_figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        pairs = pairs_of(rows)
        return {
            "pair accuracy": Figure.of_hits(
                all(row.sample.extra["published"] in row.answer for row in pair) for pair in pairs
            )
        }


class Foil(LetterTask):
    """FOIL: which of two captions fits, one with a wrong word; each pair of captions in both orders."""

    name, title = "foil", "FOIL (test)"
    files = {"foilv1.0_test_2017.json": "https://foilunitn.github.io", "val2014/": COCO_IMAGES}
    authors_rule = (
        "Takes only rows that a file names which was not published, one order of each pair at random without a seed; "
        f"here one order of every pair, drawn with seed {FOIL_SEED}."
    )
    opening = "Which of the following captions better fits the image: "

    def read(self, folder: Path) -> list[Sample]:
        captions: dict[str, list[Row]] = {}
        for row in read_object(folder / "foilv1.0_test_2017.json").rows("annotations"):
            captions.setdefault(row.text("id"), []).append(row)
        samples = []
        for identity, rows in captions.items():
            right = [row for row in rows if not row.get("foil", bool)]
            wrong = [row for row in rows if row.get("foil", bool)]
            if len(right) != 1 or not wrong:
                raise EmmaError(
                    f"{rows[0].where}: the id {identity} must have one right caption and a foil at least: "
                    f"got {len(right)} and {len(wrong)}."
                )
            for number, foil in enumerate(wrong):
                pair = identity if len(wrong) == 1 else f"{identity}-{number + 1}"
                samples += self.orders(folder, pair, right[0], foil)
        return samples

    def orders(self, folder: Path, pair: str, right: Row, foil: Row) -> list[Sample]:
        image = folder / "val2014" / f"COCO_val2014_{right.get('image_id', int):012d}.jpg"
        samples = []
        for target, first, second in (("A", right, foil), ("B", foil, right)):
            options = lettered([first.text("caption"), second.text("caption")])
            prompt = f"{self.opening}\n (A){options['A']} \n (B){options['B']}{LETTER}"
            # The authors encode the first line alone, which is the same for all; the question is both captions.
            question = f"{self.opening}(A) {options['A']} (B) {options['B']}"
            extra = {"options": options, "pair": pair}
            samples.append(Sample(f"{pair}-{target}", (image,), prompt, question, self.opening, target, "", extra))
        return samples

    def figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        pairs = [[row.score for row in pair] for pair in pairs_of(rows)]
        return {
            "accuracy": Figure.of_values([sum(scores) / len(scores) for scores in pairs]),
            "both orders right": Figure.of_hits(min(scores) == 1 for scores in pairs),
            'answers "A"': Figure.of_hits(row.parsed == "A" for row in rows),
        }

    def authors_figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        draw = random.Random(FOIL_SEED)
        drawn = [pair[draw.randint(0, 1)] for pair in pairs_of(rows)]
        return {
            f"accuracy, order by seed {FOIL_SEED}": Figure.of_hits(
                row.answer.strip().lower() == row.sample.target.lower() for row in drawn
            )
        }


__all__ = ["CORRECTED", "MMVP", "Foil"]
