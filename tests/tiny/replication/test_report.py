"""Comparisons of the replication against independent computations."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emma_hf.tiny.replication.arms import FEW, Row
from emma_hf.tiny.replication.questions import SMALLEST, questions_of_test
from emma_hf.tiny.replication.report import Comparison, compare, holm, write_report
from emma_hf.tiny.replication.running import ReplicationBudget

SCENES = 40
BUDGET = ReplicationBudget(scenes=SCENES)
ASKED = questions_of_test(SCENES, BUDGET.families)


def line(arm: str, seed: int, right: float, rate: float = 1.0, **changes) -> dict:
    """A line of results in which a share of the questions is right, drawn with a seed of its own."""
    rng = np.random.default_rng([ord(arm), seed])
    hits = "".join(str(int(value < right)) for value in rng.random(len(ASKED)))
    whole = {"right": 1, "of": 2, "share": 0.5, "low": 0.4, "high": 0.6}
    families = {question.family for _, question in ASKED if question.family != SMALLEST}
    accuracy = {"all": {**whole, "share": right}, **{family: {**whole, "share": right} for family in families}}
    return {
        "row": Row.of(arm, FEW, seed, rate).name, "arm": arm, **vars(FEW), "seed": seed, "rate": rate,
        "budget": BUDGET.as_json(), "seconds": {"training": 60}, "images_right": whole,
        "smallest": whole, "gate_index": 0.1, "question_share": 0.2, "hits": {"as trained": hits},
        "accuracy": {"as trained": accuracy}, **changes,
    }  # fmt: skip


def test_a_comparison_is_paired_by_seed_and_question():
    results = [line(arm, seed, right) for arm, right in (("C", 0.9), ("D", 0.6)) for seed in range(3)]
    results.append(line("C", 7, 0.1))
    figures = compare(results, Comparison(("C", "as trained"), ("D", "as trained"), FEW))
    counted = [index for index, (_, question) in enumerate(ASKED) if question.family != SMALLEST]
    by_seed = []
    for seed in range(3):
        first, second = (results[start + seed]["hits"]["as trained"] for start in (0, 3))
        by_seed.append(100 * np.mean([int(first[index]) - int(second[index]) for index in counted]))
    assert figures["seeds"] == 3
    assert figures["questions"] == len(counted)
    assert figures["difference"] == pytest.approx(np.mean(by_seed))
    assert figures["effect"] == pytest.approx(np.mean(by_seed) / np.std(by_seed, ddof=1))
    assert figures["low"] < figures["difference"] < figures["high"]
    assert figures["p"] < 0.01


def test_the_interval_is_that_of_a_normal_approximation():
    """With one seed, the bootstrap over images alone: the linearized ratio estimator's standard error."""
    results = [line("C", 0, 0.8), line("D", 0, 0.5)]
    figures = compare(results, Comparison(("C", "as trained"), ("D", "as trained"), FEW))
    sums, counts = np.zeros(SCENES), np.zeros(SCENES)
    for index, (scene, question) in enumerate(ASKED):
        if question.family != SMALLEST:
            first, second = (int(each["hits"]["as trained"][index]) for each in results)
            sums[scene] += first - second
            counts[scene] += 1
    ratio = sums.sum() / counts.sum()
    error = np.sqrt(((sums - ratio * counts) ** 2).sum()) / counts.sum()
    assert figures["high"] - figures["low"] == pytest.approx(100 * 2 * 1.96 * error, rel=0.1)


def test_equal_arms_do_not_differ():
    results = [line("C", seed, 0.7) for seed in range(2)]
    results += [{**each, "arm": "D"} for each in results]
    figures = compare(results, Comparison(("C", "as trained"), ("D", "as trained"), FEW))
    assert (figures["difference"], figures["low"], figures["high"], figures["p"]) == (0, 0, 0, 1)


def test_rows_that_lack_a_partner_are_not_compared():
    assert (
        compare([line("C", 0, 0.7), line("D", 1, 0.7)], Comparison(("C", "as trained"), ("D", "as trained"), FEW))
        is None
    )


def test_holm_by_hand():
    # Ordered: 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.9; none smaller than the one before it.
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])


def test_the_report(tmp_path):
    lines = [line(arm, seed, right) for arm, right in (("A", 0.5), ("C", 0.9), ("D", 0.6)) for seed in range(2)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    text = write_report(tmp_path / "results.jsonl", tmp_path / "report")
    assert (tmp_path / "report" / "tables.md").read_text() == text
    assert f"| {FEW} | C: EMMA | 1 | 2 | 90.0 (0.0) | - | - | - | 50.0 | 50.0 | 10.00% | 20.0% | 1.0 |" in text
    assert "**C - D** (primary)" in text
    assert f"| C - A | {FEW} | 2 |" in text
    assert f"| {FEW} | C | 1 | 90.0 (0.0) | 90.0 (0.0) | 0: 90.0, 1: 90.0 |" in text
    for name in ("accuracy.png", "instruction.png"):
        with Image.open(tmp_path / "report" / name) as image:
            assert min(image.size) > 200


def test_what_was_added_afterwards_is_apart(tmp_path):
    lines = [line(arm, seed, right) for arm, right in (("C", 0.9), ("D", 0.6)) for seed in range(2)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    alone = write_report(tmp_path / "results.jsonl", tmp_path)
    lines += [line(arm, 0, right, rate=3.0) for arm, right in (("C", 0.9), ("D", 0.9))]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    text = write_report(tmp_path / "results.jsonl", tmp_path)
    # Rows of another rate neither join the stated comparison nor its correction.
    (stated,) = [row for row in alone.splitlines() if "(primary)" in row]
    assert stated in text
    (added,) = [row for row in text.splitlines() if row.startswith(f"| C - D, rate 3, seeds 0 to 1 | {FEW} | 1 |")]
    assert added.endswith("| exploratory |")


def test_a_second_experiment_has_its_own_seeds_and_correction(tmp_path):
    lines = [
        line(arm, seed, right, rate=3.0) for arm, right in (("C", 0.7), ("D", 0.65), ("E", 0.6)) for seed in range(8)
    ]
    lines += [line(arm, 0, 0.7) for arm in "CDE"]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    text = write_report(tmp_path / "results.jsonl", tmp_path)
    rows = [row.split(" | ") for row in text.splitlines() if ", rate 3, seeds 2 to 7 |" in row]
    alone = [each for each in lines if each["seed"] >= 2]
    expected = [compare(alone, Comparison(("C", "as trained"), (arm, "as trained"), FEW, rate=3.0)) for arm in "DE"]
    assert [row[2] for row in rows] == ["6", "6"]
    assert [row[3].split()[0] for row in rows] == [f"{figures['difference']:+.1f}" for figures in expected]
    assert [row[6].split()[0] for row in rows] == [f"{p:.4f}" for p in holm([figures["p"] for figures in expected])]


def test_the_page_shows_what_its_results_say(tmp_path):
    docs = Path(__file__).parents[3] / "docs"
    text = write_report(docs / "replication" / "results.jsonl", tmp_path)
    assert (docs / "replication" / "tables.md").read_text(encoding="utf-8") == text
    page = (docs / "replication.md").read_text(encoding="utf-8")
    comparisons = text.split("\n\n")[1]
    assert "**C - D** (primary)" in comparisons
    assert comparisons in page


def test_what_cannot_be_reported_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds none. Run `emma-hf tiny replicate ROW` or `--all` first"):
        write_report(tmp_path / "results.jsonl", tmp_path)
    lines = [line("A", 0, 0.5), {**line("A", 1, 0.5), "budget": {"scenes": 3}}]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    with pytest.raises(ValueError, match="Rows of one budget can be compared"):
        write_report(tmp_path / "results.jsonl", tmp_path)
