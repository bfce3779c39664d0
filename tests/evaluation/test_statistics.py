"""Shares and differences against values of the papers that they come from."""

import math

import pytest

from emma_hf.evaluation.statistics import paired_difference, share


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3 (the score interval of Wilson).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_share(right, of, low, high):
    figures = share([True] * right + [False] * (of - right))
    assert (figures["right"], figures["of"]) == (right, of)
    assert figures["share"] == right / of
    assert (figures["low"], figures["high"]) == pytest.approx((low, high), abs=5e-5)


def test_a_share_of_nothing_is_not_a_number():
    figures = share([])
    assert figures["of"] == 0
    assert all(math.isnan(figures[name]) for name in ("share", "low", "high"))


def test_the_interval_of_a_paired_difference():
    # By hand for 10 rows: both right 5, only the first 3, only the second 1. Cells with half a row more: 3.5 and 1.5 of
    # 12; center 2/12, variance (5/12 - 4/144) / 12.
    first = [True] * 8 + [False] * 2
    second = [True] * 5 + [False] * 3 + [True, False]
    figures = paired_difference(first, second)
    assert (figures["only_first"], figures["only_second"], figures["of"]) == (3, 1, 10)
    assert figures["difference"] == pytest.approx(0.2)
    half = 1.959964 * math.sqrt((5 / 12 - 4 / 144) / 12)
    assert (figures["low"], figures["high"]) == pytest.approx((1 / 6 - half, 1 / 6 + half))
    turned = paired_difference(second, first)
    assert (turned["low"], turned["high"]) == pytest.approx((-figures["high"], -figures["low"]))


def test_rows_that_never_differ_leave_a_width():
    figures = paired_difference([True] * 50, [True] * 50)
    assert figures["difference"] == 0
    assert figures["low"] == pytest.approx(-figures["high"])
    assert 0.02 < figures["high"] < 0.05


@pytest.mark.parametrize(("first", "second"), [([True], []), ([], [])])
def test_rows_must_be_the_same(first, second):
    with pytest.raises(
        ValueError, match=f"needs the same rows twice, one at least: got {len(first)} and {len(second)}"
    ):
        paired_difference(first, second)
