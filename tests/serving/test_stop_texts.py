"""Answers end before the first of their stop texts, however the text arrives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emma_hf.serving.stop_texts import StopTextFilter


def passed(stop: tuple[str, ...], *pieces: str) -> tuple[list[str], str, bool]:
    stop_filter = StopTextFilter(stop)
    shown = [stop_filter.push(piece) for piece in pieces]
    return shown, stop_filter.finish(), stop_filter.stopped


@pytest.mark.parametrize(
    ("stop", "pieces", "shown", "rest", "stopped"),
    [
        ((), ("a", "b"), ["a", "b"], "", False),
        (("x",), ("a", "bxc", "d"), ["a", "b", ""], "", True),
        (("END",), ("aE", "N", "Db"), ["a", "", ""], "", True),
        (("END",), ("aE", "N"), ["a", ""], "EN", False),
        (("END",), ("aEN", "EN", "x"), ["a", "EN", "ENx"], "", False),
        (("aab",), ("a", "a", "a", "b"), ["", "", "a", ""], "", True),
        (("bc", "abcd"), ("ab", "x"), ["", "abx"], "", False),
        (("later", "now"), ("now or later",), [""], "", True),
    ],
)
def test_pieces(stop, pieces, shown, rest, stopped):
    assert passed(stop, *pieces) == (shown, rest, stopped)


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=6),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=1),
)
def test_pieces_give_what_the_whole_gives(pieces, stop):
    whole = "".join(pieces)
    shown, rest, stopped = passed(tuple(stop), *pieces)
    assert "".join(shown) + rest == whole.split(stop[0])[0]
    assert stopped == (stop[0] in whole)
