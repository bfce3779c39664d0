"""`emma-hf evaluate`: what it refuses before a model is loaded."""

import pytest

from emma_hf import EMMA_TINY
from emma_hf.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "wrong"], "`--task` must be one of "),
        (["--task", "wrong"], "emma-tiny: got 'wrong'."),
        (["--task", "emma-tiny", "--limit", "0"], "`--limit` must be at least 1: got 0."),
        (["--task", "emma-tiny", "--batch-size", "-1"], "`--batch-size` must be at least 1: got -1."),
        (
            ["--task", "emma-tiny", "--instruction", "none"],
            "`--instruction` must be one of own, first-line, question, ",
        ),
        (["--task", "emma-tiny", "--dtype", "int8"], "`--dtype` must be auto, float32"),
        (["--task", "emma-tiny"], "no/such-model"),
    ],
)
def test_mistakes_are_told(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "no/such-model", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_prints_what_it_writes_and_refuses_another_run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = ["evaluate", str(EMMA_TINY), "--task", "emma-tiny", "--limit", "3"]
    assert main([*arguments, "--instruction", "question"]) == 0
    out, _ = capsys.readouterr()
    assert out == (tmp_path / "evaluation" / "emma-tiny" / "results.md").read_text()
    assert "| figure | question | of |" in out
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert 'its instruction is ["question"], that of this run is ["own", "swapped", "empty"]' in error
