"""The benchmarks' own arithmetic, their runner, and a short run of those that compare with LLaVA."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emma_hf.tiny.recipe import has_fast_bfloat16

ROOT = Path(__file__).parents[2]
# A processor without bfloat16 takes an hour for what float32 does in minutes.
DTYPE = "bfloat16" if has_fast_bfloat16(torch.cpu.get_capabilities()) else "float32"


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import measure

    return measure


def test_a_ratio_is_that_of_neighbours(measure):
    # The machine slowed down tenfold between the rounds; the alternatives differ by 2 all the same.
    assert measure.ratio([2.0, 20.0, 4.0, 40.0], [1.0, 10.0, 2.0, 20.0]) == (2.0, 2.0, 2.0)
    middle, low, high = measure.ratio([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert middle == 2.0
    assert low == 1.0
    assert high == 3.0
    assert measure.shown((1.23456, 1.0, 2.0)) == "1.235 [1.000, 2.000]"


def test_alternatives_run_in_turns_and_the_first_round_does_not_count(measure):
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = measure.in_turns(calls, 2, torch.device("cpu"), "")
    assert order == list("ababab")
    assert {name: len(of) for name, of in times.items()} == {"a": 2, "b": 2}


def test_a_report_is_a_table_json_and_a_plot(measure, tmp_path, capsys):
    report = measure.Report("some", torch.device("cpu"))
    for images in (1, 2):
        report.add(dtype="float32", images=images, s=0.25, against=(1.0 * images, 0.9, 2.5), limit=None)
    report.save(tmp_path / "out", "images", "against", "dtype")
    out = capsys.readouterr().out
    assert "| dtype | images | s | against | limit |" in out
    assert "| float32 | 2 | 0.25 | 2.000 [0.900, 2.500] |  |" in out
    saved = json.loads((tmp_path / "out" / "some.json").read_text())
    assert saved["rows"][1]["against"] == [2.0, 0.9, 2.5]
    assert "torch" in saved["about"]
    assert (tmp_path / "out" / "some.png").stat().st_size > 5000


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)


def test_the_runner_names_its_parts():
    done = bench("visoin")
    assert done.returncode == 2
    assert "unknown parts ['visoin']: choose from vision, language" in done.stderr
    assert "adaptation" in bench("--help").stdout
    for part in bench("--help").stdout.split("parts:")[1].splitlines():
        assert not part.strip() or (ROOT / "benchmarks" / f"{part.split()[0]}.py").is_file(), part


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "results"),
    [
        ("vision.py", ["--dtypes", DTYPE, "--images", "1", "--questions", "2"], {"vision-path": "EMMA / LLaVA", "questions-per-image": "against one question"}),
        ("language.py", ["--dtype", DTYPE, "--words", "64", "--rows", "1"], {"prefill": "EMMA / LLaVA", "decoding": "LLaVA / it"}),
    ],
)  # fmt: skip
def test_what_is_compared_with_llava_agrees_with_it(script, arguments, results, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--runs", "2", "--output", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    for name, column in results.items():
        rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        assert rows
        assert all(row[column][0] > 0 for row in rows)
