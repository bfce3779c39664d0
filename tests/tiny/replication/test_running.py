"""Rows of the replication end to end, at toy size."""

import json
from dataclasses import replace

import pytest
import torch

from emma_hf import EMMA_TINY, EmmaProcessor
from emma_hf.cli import main
from emma_hf.evaluation.model_identity import model_hash
from emma_hf.tiny.questions import Question
from emma_hf.tiny.replication import running
from emma_hf.tiny.replication.arms import ALL, ARMS, FEW, ReplicationModel, Row
from emma_hf.tiny.replication.questions import (
    SMALLEST,
    TrainingRows,
    collate,
    encode,
    instruction_ids,
    questions_of_test,
    smallest_question,
    training_question,
)
from emma_hf.tiny.replication.running import (
    ReplicationBudget,
    Towers,
    _logits,
    _test_instructions,
    planned_rows,
    read_results,
    replicate,
)
from emma_hf.tiny.scenes import Scene, SeededRandom

TOY = ReplicationBudget(images=16, rows=16, batch_size=4, scenes=4, mean_questions=8)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replication")
    rows = [Row.of(arm, FEW, 0) for arm in "CD"]
    return rows, folder, replicate(rows, folder / "results.jsonl", folder / "work", TOY)


def test_two_rows_are_trained_measured_and_kept(toy_run):
    rows, folder, lines = toy_run
    assert read_results(folder / "results.jsonl") == lines
    asked = questions_of_test(TOY.scenes, TOY.families)
    for row, line in zip(rows, lines, strict=True):
        assert line["row"] == row.name
        assert line["command"] == f"emma-hf tiny replicate {row.name}"
        assert len(line["loss"]) == TOY.steps(FEW) == 4
        assert line["hits"].keys() == {"as trained", "own", "swapped", "empty"}
        hits = [digit == "1" for digit in line["hits"]["as trained"]]
        assert len(hits) == len(asked)
        # Each share, from the digits.
        of_families = [hit for hit, (_, question) in zip(hits, asked) if question.family in TOY.families]
        assert line["accuracy"]["as trained"]["all"]["right"] == sum(of_families)
        assert line["accuracy"]["as trained"]["all"]["of"] == len(of_families)
        smallest = [hit for hit, (_, question) in zip(hits, asked) if question.family == SMALLEST]
        assert (line["smallest"]["right"], line["smallest"]["of"]) == (sum(smallest), len(smallest))
        by_scene = [
            [hit for hit, (scene, question) in zip(hits, asked) if scene == index and question.family != SMALLEST]
            for index in range(TOY.scenes)
        ]
        assert line["images_right"]["right"] == sum(map(all, by_scene))
        assert 0 < line["question_share"] < 1
    # Only C was trained with the question's own instruction.
    assert lines[0]["hits"]["as trained"] == lines[0]["hits"]["own"]
    assert lines[0]["question_share"] != lines[1]["question_share"]


def test_a_row_again_gives_the_same_numbers(toy_run, tmp_path):
    rows, folder, lines = toy_run
    # Named twice, it runs once.
    (again,) = replicate([rows[0], rows[0]], tmp_path / "results.jsonl", folder / "work", TOY)
    assert (again["loss"], again["hits"]) == (lines[0]["loss"], lines[0]["hits"])
    # What is kept of emma-tiny's towers is kept by its weights.
    assert [path.name for path in (folder / "work").iterdir()] == [model_hash(EMMA_TINY)]


@pytest.mark.parametrize(("fast", "trained"), [(True, torch.bfloat16), (False, torch.float32)])
def test_training_uses_bfloat16_where_it_is_fast_and_the_test_never(fast, trained, toy_run, tmp_path, monkeypatch):
    rows, folder, _ = toy_run
    dtypes, logits = {True: set(), False: set()}, _logits

    def noted(*args):
        found = logits(*args)
        dtypes[torch.is_grad_enabled()].add(found[0].dtype)
        return found

    monkeypatch.setattr(running, "_logits", noted)
    monkeypatch.setattr(running, "has_fast_bfloat16", lambda capabilities: fast)
    replicate(rows[:1], tmp_path / "results.jsonl", folder / "work", TOY)
    assert dtypes == {True: {trained}, False: {torch.float32}}


def test_rows_that_are_done_are_left_out_and_another_budget_is_refused(toy_run):
    rows, folder, _ = toy_run
    assert replicate(rows, folder / "results.jsonl", folder / "work", TOY) == []
    with pytest.raises(ValueError, match=r"must be of one budget: row C-k1-d2-s0-r1-w3 has .*'scenes': 4.*'scenes': 5"):
        replicate([Row.of("A", FEW, 9)], folder / "results.jsonl", folder / "work", replace(TOY, scenes=5))


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"row": "A"}\n{"row": \n')
    with pytest.raises(ValueError, match="line 2 is not"):
        read_results(tmp_path / "results.jsonl")


def test_arms_are_paired_by_seed_and_the_shuffled_instructions_are_other_rows():
    processor = EmmaProcessor.from_pretrained(EMMA_TINY)
    rows, again = (TrainingRows.make(3, 20, 16, TOY.families, processor) for _ in range(2))
    assert rows == again
    assert rows != TrainingRows.make(4, 20, 16, TOY.families, processor)
    assert sorted(rows.others) == list(range(20))
    for index, encoded in enumerate(rows.questions(range(20))):
        image, question = training_question(16, TOY.families, SeededRandom((3 << 40) + index))
        assert (rows.images[index], encoded) == (image, encode(question, processor))


def test_training_and_test_ask_about_the_families_of_the_budget_alone():
    processor = EmmaProcessor.from_pretrained(EMMA_TINY)
    assert {question.family for _, question in questions_of_test(20, ("size",))} == {"size", SMALLEST}
    answers = [
        processor.tokenizer.decode(each.after[each.answer :], skip_special_tokens=True).strip()
        for each in TrainingRows.make(0, 40, 16, ("size",), processor).encoded
    ]
    assert {"Small", "Large"} <= set(answers) <= {"Small", "Medium", "Large"}


def test_a_run_that_begins_as_emma_tiny_is_shorter_and_gentler():
    budget = ReplicationBudget(rows=640, batch_size=8, learning_rate=2e-3)
    assert (budget.steps(FEW), budget.steps(ALL)) == (80, 5)
    assert (budget.rate(FEW), budget.rate(ALL)) == pytest.approx((2e-3, 2e-4))
    assert (running.SMOKE.steps(FEW), running.SMOKE.steps(ALL)) == (64, 4)


@pytest.mark.parametrize(("task", "rates"), [(FEW, [2e-3, 6e-3]), (ALL, [2e-4, 6e-4])], ids=str)
def test_a_run_trains_at_the_rates_of_its_task(task, rates, tmp_path, monkeypatch):
    asked = []

    def parameter_groups(self, learning_rate, text_rate):
        asked.extend([learning_rate, text_rate * learning_rate])
        raise KeyboardInterrupt

    monkeypatch.setattr(ReplicationModel, "parameter_groups", parameter_groups)
    with pytest.raises(KeyboardInterrupt):
        replicate([Row.of("C", task, 0, 3.0)], tmp_path / "results.jsonl", tmp_path, TOY)
    assert asked == pytest.approx(rates)


def test_the_swapped_instruction_is_of_the_same_family_and_another_text():
    towers = Towers.load()
    processor = towers.processor
    questions = [question for _, question in questions_of_test(8, TOY.families)]
    ids = _test_instructions(questions, Row("C"), towers)["swapped"].tolist()
    for question, row in zip(questions, ids, strict=True):
        assert row != instruction_ids(question.text, processor)
        family = (other.text for other in questions if other.family == question.family)
        assert any(row == instruction_ids(text, processor) for text in family)


def test_the_question_about_the_smallest_thing_means_it_alone():
    asked = 0
    for seed in range(60):
        scene = Scene.random(seed)
        question = smallest_question(scene, SeededRandom(seed))
        if question is None:
            continue
        asked += 1
        smallest = min(scene.things, key=lambda thing: thing.radius)
        assert question.answer.lower() in (smallest.colour, smallest.shape)
        assert question.answer.lower() not in question.text
    assert asked > 20


def test_an_instruction_is_read_once():
    towers = Towers.load()
    ids = towers.ids(["Is there a star?", "Which color?", "Is there a star?"])
    features, ends = towers.read(ARMS["C"], ids)
    assert torch.allclose(features, towers.tiny.model.get_instruction_features(ids), atol=1e-5)
    assert ids[torch.arange(3), ends].tolist() == [towers.processor.instruction_tokenizer.eos_token_id] * 3
    towers.tiny.model.get_instruction_features = None
    again, _ = towers.read(ARMS["C"], ids[:2])
    assert torch.equal(again, features[:2])
    # An arm without words reads none.
    assert towers.read(ARMS["B"], towers.ids(["What now?"]))[0].numel() == 0


def test_prompts_hold_the_picture_once_and_labels_hold_the_answer():
    processor = EmmaProcessor.from_pretrained(EMMA_TINY)
    tokenizer = processor.tokenizer
    questions = [Question("How many things are there?", "3", "count"), Question("Is there a red star?", "No", "")]
    encoded = [encode(question, processor) for question in questions]
    for arm in ("A", "F"):
        whole = collate(encoded, ARMS[arm], 4, processor, len(encoded[0].before))
        input_ids, attention_mask, is_image, labels = whole
        assert is_image.sum(-1).tolist() == [4, 4]
        # Without the system prompt: what follows the first token is what follows all tokens that rows share.
        for every, part in zip(whole, collate(encoded, ARMS[arm], 4, processor, 1)):
            assert torch.equal(part[:, 0], every[:, 0])
            assert torch.equal(part[:, 1:], every[:, len(encoded[0].before) :])
        for row, question in enumerate(questions):
            ids = input_ids[row][attention_mask[row].bool() & ~is_image[row]].tolist()
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert text.count(question.text) == (2 if arm == "F" else 1)
            answer = tokenizer.decode([label for label in labels[row].tolist() if label >= 0])
            assert answer.strip() == f"{question.answer}{tokenizer.eos_token}"


def test_the_planned_rows():
    rows = planned_rows()
    assert len(rows) == len(set(rows)) == 25 + 4 + 6 + 12 + 18
    assert {row.arm for row in rows[:5]} == set("ABCDE")
    assert {(row.arm, row.rate) for row in rows if row.rate != 1} == {("C", 3), ("D", 3), ("E", 3), ("G", 3)}
    assert planned_rows(["G-k4-d6-s1-r1"]) == [Row("G", seed=1)]


def test_the_command_runs_one_kind_of_job(capsys):
    assert main(["tiny", "replicate"]) == 2
    assert main(["tiny", "replicate", "--all", "--report"]) == 2
    assert capsys.readouterr().err.count("takes one of ROW ..., `--all` and `--report`") == 2


def test_the_command_reports(toy_run, capsys):
    _, folder, lines = toy_run
    assert main(["tiny", "replicate", "--report", "--output", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "**C - D** (primary)" in printed
    share = 100 * lines[0]["accuracy"]["as trained"]["all"]["share"]
    assert f"| C: EMMA | 1 | 1 | {share:.1f} |" in printed
    assert json.loads((folder / "results.jsonl").read_text().splitlines()[0])["row"] == "C-k1-d2-s0-r1-w3"


def test_a_language_model_that_begins_at_random_gets_no_system_prompt(monkeypatch):
    lengths = []

    def forward(self, input_ids, attention_mask, images, is_image, shared):
        lengths.append((shared, int(attention_mask.sum(-1).min()) - self.tokens))
        return torch.zeros(*input_ids[:, shared:].shape, 192)

    monkeypatch.setattr(ReplicationModel, "forward", forward)
    questions = [encode(Question("Is there a star?", "No", ""), EmmaProcessor.from_pretrained(EMMA_TINY))]
    for row in (Row.of("A", FEW, 0), Row.of("A", ALL, 0)):
        towers = Towers.load()
        model = ReplicationModel(towers.tiny, row, torch.zeros(64, 128))
        if row.width is not None:
            model.narrow_tokens(row.width, torch.randn(8, 1, 192), seed=0)
        _logits(model, towers, questions, torch.zeros(1, 64, 128), towers.ids(["Is there a star?"]))
    before, after = len(questions[0].before), len(questions[0].after)
    assert lengths == [(1, 1 + after), (before, before + after)]
