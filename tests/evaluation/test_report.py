"""The report: figures in columns, their differences, what could not be read, and what is printed elsewhere."""

import json

import numpy as np
import pytest
from PIL import Image
from support.benchmark_stubs import StubTask, always, run_stub, samples

from emma_hf.evaluation.published import Published
from emma_hf.evaluation.report import plot, summarize, write_report
from emma_hf.evaluation.statistics import paired_difference, paired_mean_difference, share
from emma_hf.evaluation.tasks.base import Figure


@pytest.fixture
def run(tmp_path, monkeypatch):
    printed = (
        Published("Stub", "stub", 40.0, 66.6, made="By hand."),
        Published("Stub hard", "stub", 12.5, figure="", made="Below chance."),
        Published("Another", "pope", 99.0),
    )
    monkeypatch.setattr("emma_hf.evaluation.report.PUBLISHED", printed)
    # Right with its own instruction; with another or none it says yes.
    answerer = always(lambda sample, text: sample.target if text == sample.question else "Yes" if text else "maybe")
    return run_stub(tmp_path / "run", answerer)


def test_figures_and_differences(run):
    summary = summarize(run)
    figures = {
        rule: {name: row["value"] for name, row in column.items()} for rule, column in summary["figures"].items()
    }
    assert figures == {
        "own": {"accuracy": 1.0, "answers not parsed": 0.0},
        "swapped": {"accuracy": pytest.approx(8 / 12), "answers not parsed": 0.0},
        "empty": {"accuracy": 0.0, "answers not parsed": 1.0},
    }
    wilson = share([True] * 8 + [False] * 4)
    assert summary["figures"]["swapped"]["accuracy"]["low"] == pytest.approx(wilson["low"])
    # Of six even questions and of six odd ones two are denied.
    assert {kind: row["value"] for kind, row in summary["by kind"]["swapped"].items()} == pytest.approx(
        {"even": 4 / 6, "odd": 4 / 6}
    )
    truths = [sample.target == "yes" for sample in samples(12)]
    expected = paired_difference([True] * 12, truths) | {"answers that differ": 12}
    assert summary["differences"]["own - swapped"] == pytest.approx(expected)
    assert list(summary["differences"]) == ["own - swapped", "own - empty"]


def test_the_files(run, tmp_path):
    write_report(run, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "12 questions to a model" in text
    assert "| accuracy | 100.0 (75.8 to 100.0) | 66.7 (39.1 to 86.2) | 0.0 (0.0 to 24.2) | 12 |" in text
    assert "| own - swapped | +33.3 (" in text
    mark = "(printed in the paper, not measured here)"
    assert f"| Stub | 40.0 {mark} | 66.6 {mark} | By hand. |" in text
    assert f"| Stub hard | 12.5 {mark} |  | Below chance. |" in text
    assert "Another" not in text
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(summarize(run)))
    picture = np.asarray(Image.open(tmp_path / "results.png").convert("RGB")).reshape(-1, 3).astype(int)
    for color in ((0x48, 0x78, 0xA8), (0xC8, 0x78, 0x38)):
        assert (np.abs(picture - color).sum(-1) < 10).sum() > 1000


def test_what_could_not_be_read_is_counted_and_named(tmp_path):
    from dataclasses import replace

    asked = [replace(sample, images=(tmp_path / f"none-{sample.id}.png",)) for sample in samples(23)]
    run = run_stub(tmp_path / "run", None or always("no"), asked=asked)
    write_report(run, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert (
        "23 of 23 questions have an image that is missing or broken. They were not asked, and count as wrong." in text
    )
    assert "- `q19`: FileNotFoundError: There is no picture at" in text
    assert "- `q20`" not in text
    assert "- and 3 more, in results.json" in text
    assert len(json.loads((tmp_path / "results.json").read_text())["unreadable"]) == 23


def test_the_authors_scoring_stands_beside_ours(tmp_path):
    class Task(StubTask):
        authors_rule = "Turns every answer around."

        def authors_figures(self, rows):
            return {"accuracy": Figure.of_hits(row.score == 0 for row in rows)}

    run = run_stub(tmp_path, always(lambda sample, text: sample.target), task=Task())
    text = (write_report(run, tmp_path), (tmp_path / "results.md").read_text())[1]
    assert "## By the authors' scoring\n\n| figure | own | swapped | empty | of |" in text
    assert "| accuracy | 0.0 (" in text.split("## By the authors' scoring")[1]
    assert "- The authors' script: Turns every answer around." in text


def test_one_column_has_no_difference(tmp_path):
    summary = summarize(run_stub(tmp_path, always("no"), columns=("whole",)))
    assert list(summary["figures"]) == ["whole"]
    assert summary["differences"] == {}
    plot(summary, tmp_path / "one.png")


def test_differences_of_scores_between_0_and_1():
    found = paired_mean_difference([1.0, 0.3, 0.6, 0.0], [0.4, 0.3, 0.0, 0.2])
    differences = np.array([0.6, 0.0, 0.6, -0.2])
    half = 1.959964 * differences.std(ddof=1) / 2
    expected = {"difference": 0.25, "low": 0.25 - half, "high": 0.25 + half, "of": 4, "only_first": 2, "only_second": 1}
    assert found == pytest.approx(expected)
    assert paired_mean_difference([0.5], [0.25]) == pytest.approx(
        {"difference": 0.25, "low": -0.75, "high": 1.0, "of": 1, "only_first": 1, "only_second": 0}
    )
    assert paired_mean_difference([1.0, 0.0], [0.0, 0.0]) == paired_difference([True, False], [False, False])
