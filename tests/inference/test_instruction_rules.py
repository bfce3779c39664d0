"""The instruction as a variable: what each rule gives, and with whose instruction one is swapped."""

import random

import pytest

from emma_hf.inference.instruction_rules import CONSTANT, RULES, instruction_by_rule, swap_instructions
from emma_hf.model.errors_emma import EmmaError

PROMPT = "\n<image>\nHint: Think.\nHow many?\nAnswer with a number."


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("own", "Hint: Think."),
        # The authors' `text.split("\n")[0]`, verbatim.
        ("first-line", ""),
        ("question", "How many?"),
        ("whole", "Hint: Think.\nHow many?\nAnswer with a number."),
        ("empty", ""),
        ("constant", CONSTANT),
    ],
)
def test_each_rule(rule, text):
    assert instruction_by_rule(rule, PROMPT, "How many?") == text
    assert rule in RULES


def test_the_first_line_keeps_a_placeholder_that_own_removes():
    assert instruction_by_rule("first-line", "<image> Which?\nBe brief.", "Which?") == "<image> Which?"
    assert instruction_by_rule("own", "<image> Which?\nBe brief.", "Which?") == "Which?"


def test_an_unknown_rule():
    with pytest.raises(EmmaError, match="one of own, first-line, .*, constant: got 'wrong'"):
        instruction_by_rule("wrong", "a", "a")


def test_a_swapped_instruction_is_another_ones_of_the_same_kind_in_any_order():
    rows = {f"id{index}": ("ab"[index % 2], f"Question {index // 4}?") for index in range(40)}
    swapped = swap_instructions(rows)
    for each, (kind, text) in rows.items():
        assert swapped[each] != text
        assert swapped[each] in {other for same, other in rows.values() if same == kind}
    names = list(rows)
    random.Random(0).shuffle(names)
    assert swap_instructions({name: rows[name] for name in names}) == swapped
    # Nearly each question's text is another's once: no text stands for all.
    assert len(set(swapped.values())) > 8


def test_a_kind_of_one_text_takes_those_of_others():
    rows = {"1": ("a", "Same?"), "2": ("a", "same? "), "3": ("b", "Other?")}
    assert swap_instructions(rows) == {"1": "Other?", "2": "Other?", "3": swap_instructions(rows)["3"]}
    assert swap_instructions(rows)["3"] in ("Same?", "same? ")


def test_one_text_for_all_cannot_be_swapped():
    with pytest.raises(EmmaError, match="the same for all 2 questions, 'Same.'. Use the rule empty or constant"):
        swap_instructions({"1": ("a", "Same?"), "2": ("b", "Same?")})
