"""Figures and their intervals against values computed by other means."""

import math

import pytest

from emma_hf.evaluation.tasks.base import Figure


def test_a_share_has_wilsons_interval():
    # Newcombe (1998), table I, method 3.
    figure = Figure.of_hits([True] * 15 + [False] * 133)
    assert (figure.value, figure.of) == (15 / 148, 148)
    assert (figure.low, figure.high) == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_a_mean_of_halves_has_the_interval_of_its_variance():
    # Mean 0.5, sum of squared deviations 0.5, so a variance of 0.5 / 4 and a standard error of sqrt(0.125 / 5).
    figure = Figure.of_values([0.0, 0.5, 1.0, 0.5, 0.5])
    half = 1.959964 * math.sqrt(0.125 / 5)
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_scores_of_0_and_1_are_a_share():
    assert Figure.of_values([1.0, 0.0, 1.0]) == Figure.of_hits([True, False, True])


def test_a_ratio_counts_its_cases_and_not_what_they_count():
    # 3 of 10 words; residuals 1 - 0.3 * 2, 0 - 0.3 * 4 and 2 - 0.3 * 4.
    figure = Figure.of_ratio([1, 0, 2], [2, 4, 4])
    half = 1.959964 * math.sqrt((0.4**2 + 1.2**2 + 0.8**2) * 3 / 2) / 10
    assert (figure.value, figure.of) == (pytest.approx(0.3), 3)
    assert (figure.low, figure.high) == (0.0, pytest.approx(0.3 + half))
    wide = Figure.of_ratio([10, 0, 20], [20, 40, 40])
    assert (wide.value, wide.high) == pytest.approx((figure.value, figure.high))


def test_f1_and_its_interval_come_from_the_share_of_true_positives():
    # Precision 3/4, recall 3/5: F1 = 2 * 0.45 / 1.35 = 2/3, of six positives on either side.
    figure = Figure.of_f1(3, 1, 2)
    share = Figure.of_hits([True] * 3 + [False] * 3)
    assert (figure.value, figure.of) == (pytest.approx(2 / 3), 6)
    assert figure.low == pytest.approx(2 * share.low / (1 + share.low))
    assert figure.high == pytest.approx(2 * share.high / (1 + share.high))


@pytest.mark.parametrize(
    "figure", [Figure.of_hits([]), Figure.of_values([]), Figure.of_ratio([0], [0]), Figure.of_f1(0, 0, 0)]
)
def test_a_figure_of_nothing_is_zero_and_says_so(figure):
    assert figure == Figure(0.0, 0.0, 1.0, 0)
