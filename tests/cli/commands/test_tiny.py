"""`emma-hf tiny`: what it refuses."""

import pytest
from support.processes import run_python

import emma_hf.tiny
from emma_hf.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["draw", "x.png", "--side", "2"], "`--side` must be at least 16 pixels: got 2."),
        (["draw", "x.png", "--side", "100000"], "`--side` must be at most 4096 pixels: got 100000."),
        (["evaluate", "--model", "m", "--questions", "0"], "`--questions` must be at least 1"),
        (["draw", "no/such/folder/x.png"], "a folder that exists: there is none at no/such/folder. Create it first."),
        (["draw", "x.png", "--seed", "-1"], "`--seed` must be at least 0: got -1."),
        (["train", "x", "--seed", "3472"], "`--seed` must be 0 to 3471: got 3472."),
        (["evaluate", "--seed", "50"], "`--seed` must be 0 to 49: got 50."),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    assert main(["tiny", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_drawing_a_scene_imports_no_trainer():
    # As the command does, which imports Transformers itself, later.
    code = "import sys; sys.argv = ['emma-hf']; from emma_hf.tiny import Scene, caption, draw; print(*sys.modules)"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert not {"emma_hf.training", "matplotlib", "torch", "transformers"} & set(done.stdout.split())


def test_the_trainer_and_the_evaluation_of_emma_tiny_are_imported_when_asked_for():
    assert emma_hf.tiny.train_tiny is emma_hf.tiny.training.train_tiny
    assert emma_hf.tiny.evaluate_tiny is emma_hf.tiny.evaluation.evaluate_tiny
    with pytest.raises(AttributeError, match="'emma_hf.tiny' has no attribute 'unknown'"):
        emma_hf.tiny.unknown  # noqa: B018
