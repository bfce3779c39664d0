"""The printed figures: those of the model card, and each with what is known of how it was made."""

import re

from emma_hf.evaluation.published import MARK, PUBLISHED
from emma_hf.evaluation.tasks import TASKS
from emma_hf.hub.model_card import TEMPLATE


def test_they_are_the_cards():
    text = (TEMPLATE / "MODEL_CARD.md").read_text()
    section = text.split("## Figures of the paper")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    names, figures = rows[0] + rows[3], rows[2] + rows[5]
    printed = [each for each in PUBLISHED if each.emma is not None]
    assert {name: float(figure) for name, figure in zip(names, figures, strict=True)} == {
        each.benchmark: each.emma for each in printed
    }


def test_each_has_a_task_and_a_word_on_how_it_was_made():
    assert MARK == "printed in the paper, not measured here"
    for each in PUBLISHED:
        assert each.task in TASKS, each.benchmark
        assert re.search(r"\.$", each.made), each.benchmark
