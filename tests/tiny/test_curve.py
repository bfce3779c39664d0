"""The curve of a run: its lines, its accuracy without generating, and the time that it says is left."""

import json
from types import SimpleNamespace

import pytest
import torch

from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.evaluation.tasks.answers import is_right
from emma_hf.tiny import curve
from emma_hf.tiny.curve import CURVE_SEED, CurveCallback, QuickAccuracy, plot_curve
from emma_hf.tiny.evaluation import answers, fresh_questions
from emma_hf.tiny.learner import TinyLearner
from emma_hf.tiny.questions import FAMILIES
from emma_hf.training.plots import figure_class


def test_the_quick_accuracy_is_that_of_generated_answers():
    processor = EmmaProcessor.from_pretrained(EMMA_TINY)
    model = TinyLearner.from_pretrained(EMMA_TINY, dtype=torch.float32)
    # Weights that are wrong now and then.
    with torch.no_grad():
        model.lm_head.weight += 0.02 * torch.randn(model.lm_head.weight.shape, generator=torch.manual_seed(0))
    found = QuickAccuracy(model, processor, count=48)(model.train())
    assert model.training
    questions = fresh_questions(48, CURVE_SEED)
    generating = EmmaForConditionalGeneration(model.config).eval()
    generating.load_state_dict(model.state_dict())
    said = answers(generating, processor, [(scene, question.text) for scene, question in questions])
    right = [is_right(text, question.answer) for text, (_, question) in zip(said, questions)]
    assert 0.2 < found["all"] < 1
    assert found["all"] == sum(right) / 48
    for family in ("count", "same"):
        mine = [hit for hit, (_, question) in zip(right, questions) if question.family == family]
        assert found[family] == sum(mine) / 6


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(curve, "time", SimpleNamespace(time=lambda: now.seconds))
    return now


def test_a_run_that_goes_on_takes_back_lines_and_adds_up_its_seconds(tmp_path, clock, capsys):
    path = tmp_path / "curve.jsonl"
    # The last line was cut off when the machine stopped.
    path.write_text(json.dumps({"phase": "clip", "step": 9, "seconds": 5}) + '\n{"phase": "cl')
    state = SimpleNamespace(global_step=0, max_steps=1100, is_world_process_zero=True)

    def steps(begin: int, end: int, accuracy: float) -> None:
        callback = CurveCallback(path, "finetune", lambda model: {"all": accuracy})
        state.global_step = begin
        callback.on_train_begin(None, state, None)
        for state.global_step in range(begin + 1, end + 1):
            clock.seconds += 2
            callback.on_step_end(None, state, None)
            if state.global_step % 100 == 0:
                callback.on_log(None, state, None, logs={"loss": 1 / state.global_step}, model=None)
        callback.on_log(None, state, None, logs={"train_runtime": 1.0})

    steps(0, 650, accuracy=0.5)
    steps(400, 1100, accuracy=0.75)
    clip, *lines = map(json.loads, path.read_text().splitlines())
    assert clip == {"phase": "clip", "step": 9, "seconds": 5}
    assert [line["step"] for line in lines] == list(range(100, 1101, 100))
    # Steps 401 to 650 took time twice, of which the steps up to the last line that stays are known.
    assert [line["seconds"] for line in lines] == list(range(200, 2201, 200))
    measured = {line["step"]: line["accuracy"]["all"] for line in lines if "accuracy" in line}
    assert measured == {500: 0.75, 1000: 0.75, 1100: 0.75}
    assert lines[-1]["loss"] == 1 / 1100
    said = capsys.readouterr().err.strip().splitlines()
    assert said == [
        "finetune: step 25 of 1100, 2.00 s each; this phase ends in about 0 h 36 min",
        "finetune: step 425 of 1100, 2.00 s each; this phase ends in about 0 h 22 min",
    ]


def test_one_process_of_many_writes_the_curve(tmp_path):
    callback = CurveCallback(tmp_path / "curve.jsonl", "finetune", lambda model: {"all": 1.0})
    state = SimpleNamespace(global_step=0, max_steps=1, is_world_process_zero=False)
    callback.on_train_begin(None, state, None)
    callback.on_step_end(None, state, None)
    callback.on_log(None, state, None, logs={"loss": 1.0}, model=None)
    assert list(tmp_path.iterdir()) == []


def test_the_picture_shows_losses_and_accuracy(tmp_path, monkeypatch):
    figures = []

    def figure(**options):
        figures.append(figure_class()(**options))
        return figures[-1]

    monkeypatch.setattr(curve, "figure_class", lambda: figure)
    accuracy = [{"all": share, **dict.fromkeys(FAMILIES, share), "count": 0.25} for share in (0.5, 0.75)]
    lines = [
        {"phase": "clip", "step": 50, "loss": 3.0},
        {"phase": "clip", "step": 100, "loss": 2.0},
        {"phase": "pretrain", "step": 50, "loss": 4.0},
        {"phase": "finetune", "step": 500, "loss": 0.5, "accuracy": accuracy[0]},
        {"phase": "finetune", "step": 550, "loss": 0.4},
        {"phase": "finetune", "step": 1000, "loss": 0.25, "accuracy": accuracy[1]},
    ]
    plot_curve(lines, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    clip, finetune, right = figures[0].axes
    assert clip.lines[0].get_xydata().tolist() == [[50, 3], [100, 2]]
    assert finetune.lines[0].get_xydata().tolist() == [[500, 0.5], [550, 0.4], [1000, 0.25]]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in right.lines}
    assert drawn["count"] == [[500, 25], [1000, 25]]
    assert drawn["all, with 95% interval"] == drawn["side"] == [[500, 50], [1000, 75]]
    # Wilson's interval of 128 and of 192 of 256.
    band = {(x, round(y, 1)) for x, y in right.collections[0].get_paths()[0].vertices}
    assert {(500, 43.9), (500, 56.1), (1000, 69.4), (1000, 79.9)} <= band
