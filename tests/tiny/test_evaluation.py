"""Counting right answers: intervals, yes and no, inventions of captions, the table and the picture."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emma_hf import EMMA_TINY
from emma_hf.tiny.curve import read_curve
from emma_hf.tiny.evaluation import (
    accuracy,
    fresh_questions,
    hallucinations,
    plot,
    share,
    table,
    yes_no,
)
from emma_hf.tiny.questions import FAMILIES, Question
from emma_hf.tiny.recipe import Budget
from emma_hf.tiny.rows import CLIP_SEEDS, TEST_SEEDS, TRAIN_SEEDS
from emma_hf.tiny.scenes import HELD_OUT_PAIRS, Scene, Thing


def thing(colour: str, shape: str) -> Thing:
    return Thing(shape, colour, "small", "filled", 0.5, 0.5, 0.1, 0.0)


def test_questions_are_fresh_of_every_family_and_partly_held_out():
    asked = fresh_questions(800)
    assert [question.family for _, question in asked[:16]] == [*FAMILIES] * 2
    assert len({scene.seed for scene, _ in asked}) == 800
    # No scene of training or of another evaluation.
    assert all(scene.seed > TEST_SEEDS > TRAIN_SEEDS > CLIP_SEEDS for scene, _ in asked)
    assert not {scene.seed for scene, _ in asked} & {scene.seed for scene, _ in fresh_questions(800, seed=1)}
    # Pairs that training never showed are asked about in scenes of any size.
    assert {len(scene.things) for scene, question in asked if question.held_out_pair} == set(range(1, 7))
    assert 0.25 < np.mean([question.held_out_wording for _, question in asked]) < 0.42
    assert 0.15 < np.mean([question.held_out_pair for _, question in asked]) < 0.42
    for scene, question in asked:
        if question.held_out_pair:
            assert {each.pair for each in scene.things} & HELD_OUT_PAIRS


def test_shares_have_wilson_intervals():
    # By hand, from the formula, for 8 of 10.
    found = share([True] * 8 + [False] * 2)
    z = 1.959963984540054
    centre, root = 0.8 + z**2 / 20, z * math.sqrt(0.8 * 0.2 / 10 + z**2 / 400)
    assert found["low"] == pytest.approx((centre - root) / (1 + z**2 / 10), abs=1e-6)
    assert found["high"] == pytest.approx((centre + root) / (1 + z**2 / 10), abs=1e-6)
    assert (found["right"], found["of"], found["share"]) == (8, 10, 0.8)
    assert share([True] * 5)["high"] == pytest.approx(1.0)
    assert math.isnan(share([])["share"])


def test_accuracy_is_by_family_and_by_what_was_held_out():
    scene = Scene((thing("red", "circle"),))
    asked = [
        (scene, Question("", "Red", "colour")),
        (scene, Question("", "Red", "colour", held_out_wording=True)),
        (scene, Question("", "2", "count", held_out_pair=True)),
    ]
    figures = accuracy(asked, [True, False, True])
    counts = {name: (row["right"], row["of"]) for name, row in figures.items() if row["of"]}
    assert counts == {
        "all": (2, 3),
        "colour": (1, 2),
        "count": (1, 1),
        "seen pairs": (1, 2),
        "held-out pairs": (1, 1),
        "seen wordings": (2, 2),
        "held-out wordings": (0, 1),
    }


def test_yes_and_no():
    scene = Scene((thing("red", "circle"),))
    answers = ["Yes", "Yes", "Yes", "No", "No"]
    asked = [(scene, Question("", answer, "existence")) for answer in answers]
    asked.append((scene, Question("", "Red", "colour")))
    figures = yes_no(asked, ["yes", "Yes.", "No", "Yes", "No", "Yes"])
    expected = {"questions": 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes": 3 / 5}
    assert figures == pytest.approx(expected)
    # The first four families have no such question.
    assert yes_no(asked[-1:], ["Red"]) == {"questions": 0, "precision": 0, "recall": 0, "f1": 0, "yes": 0}


def test_what_captions_invent():
    scene = Scene((thing("red", "circle"), thing("blue", "star"), thing("blue", "star")))
    good = "A small red circle at the top, a large blue star at the left and a small blue star in the middle."
    # The second green star, and a third blue one, are not there.
    bad = "A small green star at the top, a large blue star, a small blue star and a small blue star."
    figures = hallucinations([scene, scene], [good, bad])
    counts = {name: (row["right"], row["of"]) for name, row in figures.items()}
    assert counts == {
        "named things that are not there": (2, 7),
        "captions that name such a thing": (1, 2),
        "things that are named": (5, 6),
    }


def test_the_table_and_the_picture(tmp_path):
    scene = Scene((thing("red", "circle"),))
    asked = [(scene, Question("", "Yes", family)) for family in FAMILIES]
    result = {"accuracy": accuracy(asked, [True] * 6 + [False] * 2), "yes_no": yes_no(asked, ["Yes"] * 8)}
    result["captions"] = hallucinations([scene], ["A small red circle."])
    text = table(json.loads(json.dumps(result)))
    assert "| all | 6 | 8 | 75.0% | 40.9% to 92.9% |" in text
    assert "Of 3 yes/no questions: precision 1.000, recall 1.000, F1 1.000; 100.0% of the answers are yes." in text
    assert "| named things that are not there | 0 | 1 | 0.0% |" in text
    plot(result, tmp_path / "evaluation.png")
    picture = np.asarray(Image.open(tmp_path / "evaluation.png").convert("RGB")).reshape(-1, 3).astype(int)
    assert (np.abs(picture - (0x48, 0x78, 0xA8)).sum(-1) < 10).sum() > 1000


def test_the_page_says_how_far_the_command_gets():
    page = Path(__file__).parents[2] / "docs" / "emma-tiny"
    text = (page / "README.md").read_text(encoding="utf-8")
    for name, folder in (("the command", page / "command"), ("the shipped weights", EMMA_TINY)):
        figures = json.loads((folder / "evaluation.json").read_text())["accuracy"]
        shares = [f"{figures[group]['share']:.1%}" for group in ("all", *FAMILIES)]
        assert f"| {name} | {' | '.join(shares)} |" in text
    last = read_curve(page / "command" / "curve.jsonl")[-1]
    assert last["step"] == last["steps"] == Budget().finetune_rows // Budget().batch_size
