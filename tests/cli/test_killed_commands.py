"""Commands that are killed while they write a folder: nothing that looks complete is left, nor anything after the next."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import OFFLINE

from emma_hf.conversion import reverse

SCRIPT = Path(__file__).parents[1] / "support" / "killed_commands.py"
KILLS = 10


@pytest.fixture(scope="module")
def authors(trainable, converted, tmp_path_factory):
    """The authors' layout of a model whose widths can be quantized."""
    folder = tmp_path_factory.mktemp("authors")
    shutil.copytree(trainable, folder / "model")
    shutil.copy(converted / "tokenizer.model", folder / "model")
    return reverse(folder / "model", folder / "authors", progress=False)


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("command", ["convert", "convert --reverse", "convert --quantization 4bit", "export"])
def test_a_killed_run_leaves_nothing_complete_and_the_next_one_nothing_at_all(command, authors, converted, tmp_path):
    pytest.importorskip("bitsandbytes")
    source = {"convert --reverse": converted, "export": "emma-tiny"}.get(command, authors)
    (tmp_path / "here").mkdir()
    output = tmp_path / "here" / "model"
    clip = ["--clip", authors / "clip"] if source == authors else []
    arguments = [KILLS, 0, output, *command.split(), source, output, *clip]
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        capture_output=True, text=True, env={**OFFLINE, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, *runs, last = json.loads(done.stdout)
    for complete in (first, last):
        assert (complete["code"], complete["left"]) == (0, ["model"]), done.stderr
    assert last["files"] == first["files"]
    assert sum(run["killed"] for run in runs) == KILLS
    for run in runs:
        # Between its last file and its end it may be killed, too.
        assert run["files"] in ({}, first["files"])
        hidden = [name for name in run["left"] if name != "model"]
        assert all(re.fullmatch(r"\.model-\w{8}\.incomplete", name) for name in hidden), run
        assert len(hidden) <= 1, run
    assert any(run["left"] for run in runs)
