"""Shares and their differences, each with its 95% interval."""

import math
from collections.abc import Iterable, Sequence

from ..model.errors_emma import EmmaError

# The normal distribution's quantile at 0.975.
QUANTILE = 1.959964


def share(hits: Iterable[bool]) -> dict[str, float]:
    """A share and its 95% interval (Wilson 1927).

    Returns:
        `right` (how many hits), `of`, `share`, and `low` and `high`, the interval's ends. Of no rows the last three are
        not a number.
    """
    hits = list(hits)
    count = len(hits)
    if not count:
        return {"right": 0, "of": 0, "share": math.nan, "low": math.nan, "high": math.nan}
    observed = sum(hits) / count
    square = QUANTILE * QUANTILE
    center = (observed + square / (2 * count)) / (1 + square / count)
    spread = math.sqrt(observed * (1 - observed) / count + square / (4 * count * count))
    half = QUANTILE * spread / (1 + square / count)
    return {"right": sum(hits), "of": count, "share": observed, "low": center - half, "high": center + half}


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float]:
    """Share of hits in `first` less that in `second`, of the same rows, and its 95% interval (Agresti and Min 2005).

    Only rows on which the two differ carry information. The interval adds half a row to each of the four cells of the
    table of both, so that it has a width even where no row differs.

    Args:
        first: hits of one condition, a row each.
        second: those of the other, in the same order.

    Returns:
        `difference`, `low`, `high`, `of`, `only_first` and `only_second` (rows that one alone has right).

    Raises:
        EmmaError: the numbers of rows differ, or there is none.
    """
    if len(first) != len(second) or not len(first):
        raise EmmaError(
            f"A paired difference needs the same rows twice, one at least: got {len(first)} and {len(second)}."
        )
    count = len(first)
    only_first = sum(bool(a and not b) for a, b in zip(first, second))
    only_second = sum(bool(b and not a) for a, b in zip(first, second))
    # The two cells that differ have half a row more each, the whole table two rows.
    center = (only_first - only_second) / (count + 2)
    half = QUANTILE * math.sqrt(max(0.0, (only_first + only_second + 1) / (count + 2) - center**2) / (count + 2))
    return {
        "difference": (only_first - only_second) / count,
        "low": center - half,
        "high": center + half,
        "of": count,
        "only_first": only_first,
        "only_second": only_second,
    }


def paired_mean_difference(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Mean of `first` less that of `second`, of scores in [0, 1] of the same rows, and its 95% interval.

    Scores that are all 0 or 1 have the interval of [`paired_difference`], others that of the normal distribution.

    Returns:
        `difference`, `low`, `high`, `of`, `only_first` and `only_second` (rows that one alone has higher).

    Raises:
        EmmaError: the numbers of rows differ, or there is none.
    """
    if all(score in (0, 1) for score in (*first, *second)) or len(first) != len(second):
        return paired_difference([score == 1 for score in first], [score == 1 for score in second])
    differences = [a - b for a, b in zip(first, second)]
    count = len(differences)
    mean = math.fsum(differences) / count
    variance = math.fsum((each - mean) ** 2 for each in differences) / max(1, count - 1)
    # Of one row nothing is known about the spread.
    half = QUANTILE * math.sqrt(variance / count) if count > 1 else 1.0
    return {
        "difference": mean,
        "low": max(-1.0, mean - half),
        "high": min(1.0, mean + half),
        "of": count,
        "only_first": sum(each > 0 for each in differences),
        "only_second": sum(each < 0 for each in differences),
    }


__all__ = ["paired_difference", "paired_mean_difference", "share"]
