"""The three sentences: what they say of which figures."""

import pytest

from emma_hf.analysis.conclusions import dependence, verdict
from emma_hf.analysis.counterfactuals import ANY_OTHER, MEAN, OTHER_KIND, OWN, REMOVED
from emma_hf.evaluation import paired_difference, share


def condition(count: int, changed: int, own_only: int = 0, other_only: int = 0, answers: bool = True) -> dict:
    """Figures of `count` rows, of which `own_only` are right with the own instruction alone."""
    figures = {"changed": share([True] * changed + [False] * (count - changed))}
    if answers:
        both = count - own_only - other_only
        own = [True] * both + [True] * own_only + [False] * other_only
        other = [True] * both + [False] * own_only + [True] * other_only
        figures |= {"accuracy": share(other), "gain": paired_difference(own, other)}
    return figures


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        (condition(200, 0), "same"),
        (condition(200, 3, 2, 1), "same"),
        # Too few questions to exclude a difference of 5 points.
        (condition(48, 0), "undecided"),
        (condition(200, 9, 5, 4), "undecided"),
        (condition(200, 12, 12), "better"),
        (condition(200, 12, 0, 12), "worse"),
        # Other answers, which are right as often.
        (condition(200, 60, 12, 12), "other"),
        (condition(200, 60, answers=False), "other"),
        (condition(200, 2, answers=False), "same"),
    ],
)
def test_intervals_decide(figures, expected):
    assert dependence(figures) == expected


def result(conditions: dict, text_share: float = 0.51, interaction: float | None = 0.0003) -> dict:
    return {
        "counterfactuals": {"conditions": conditions},
        "weights": {"text_share_l1": text_share},
        "terms": {"shares": {"question": {"mean": 0.067}}},
        "gates": {"index": 0.0068},
        "variance": {"question": 0.0014, "interaction": interaction, "image": 0.9983},
    }


def test_answers_that_do_not_depend():
    conditions = {
        OWN: condition(200, 0, 0, 0), OTHER_KIND: condition(200, 2, 1, 1), MEAN: condition(200, 1, 0, 0),
        REMOVED: condition(200, 14, 10, 1),
    }  # fmt: skip
    first, second, third = verdict(result(conditions))
    assert first == (
        "The answers do not depend on the instruction: 100.0% of 200 are right with their own and 99.5% with that of "
        "another question of another kind (difference +0.0 points, 95% interval −1.7 to +1.7); 2 of 200 answers change."
    )
    assert second == (
        "What the text adds is as good as a constant: with its mean over the questions in its place 100.0% are right, "
        "without it 95.0% are right."
    )
    assert third == (
        "The text columns hold 51.0% of the alignment's l1 norm, while 6.7% of |F| varies with the question, 0.68% of "
        "the projector's gates turn from one question to another and 0.17% of the variance of the visual tokens "
        "involves the question, so that large weights are no sign of use here."
    )


def test_answers_that_depend_or_are_not_decided():
    needed = {name: condition(120, 100, 100) for name in (OTHER_KIND, MEAN, REMOVED)}
    first, second, third = verdict(result({OWN: condition(120, 0), **needed}, interaction=None))
    assert first.startswith("The answers depend on the instruction: 100.0% of 120 are right with their own and 16.7%")
    assert second.startswith("What the text adds is more than a constant: ")
    assert "variance" not in third
    assert third.endswith("from one question to another.")
    few = {name: condition(8, 0) for name in (OWN, OTHER_KIND, MEAN, REMOVED)}
    first, second, _ = verdict(result(few))
    assert first.startswith("8 questions do not decide whether the answers depend on the instruction: ")
    assert second.startswith("Whether what the text adds is more than a constant is not decided: ")


def test_without_answers_changes_are_told():
    said = {name: condition(200, 1, answers=False) for name in (OWN, ANY_OTHER, MEAN, REMOVED)}
    first, second, _ = verdict(result(said))
    assert first == (
        "The answers do not depend on the instruction: 1 of 200 answers change with the instruction of another question "
        "(the right answers were not given)."
    )
    assert second == (
        "The answers do not need what the text adds: with its mean over the questions in its place 0.5% of the answers "
        "change, without it 0.5% of the answers change."
    )


def test_text_that_has_no_weights_has_no_part():
    same = {name: condition(100, 0) for name in (OWN, OTHER_KIND, MEAN, REMOVED)}
    first, *_ = verdict(result(same, text_share=0.0))
    assert first.startswith("The text has no part in the visual tokens, as the alignment's text columns are zero: 100")
