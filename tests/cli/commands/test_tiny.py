"""`emma-hf tiny`: what it refuses."""

import pytest

from emma_hf.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["draw", "x.png", "--side", "2"], "`--side` must be at least 16 pixels: got 2."),
        (["draw", "x.png", "--side", "100000"], "`--side` must be at most 4096 pixels: got 100000."),
        (["evaluate", "--model", "m", "--questions", "0"], "`--questions` must be at least 1"),
        (["draw", "no/such/folder/x.png"], "no/such/folder"),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    assert main(["tiny", *arguments]) == 2
    assert message in capsys.readouterr().err
