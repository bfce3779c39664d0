"""`emma-hf train`: every stage learns, and what it saves loads again."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from support.rows import save_rows

from emma_hf import EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.cli import main
from emma_hf.data import ConversationDataset, DataCollator
from emma_hf.training.finetune import parse

peft = pytest.importorskip("peft")


@pytest.fixture
def train(trainable, reference, tmp_path):
    def run(stage: str, *options: str, model: Path = trainable) -> int:
        rows = save_rows(tmp_path / f"{stage}.json", plain=stage == "pretrain")
        return main(
            f"train --stage {stage} --model {model} --train_data {rows} --image_folder {reference / 'images'} "
            f"--output_dir {tmp_path / 'out'} --global_batch_size 8 --use_cpu --disable_tqdm 1 --save_strategy no".split()
            + list(options)
        )

    return run


def options(epochs: int, rate: float) -> list[str]:
    rates = f"--learning_rate {rate} --projector_learning_rate {rate} --num_train_epochs {epochs}"
    return rates.split()


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("pretrain", options(20, 3e-3)),
        ("finetune", options(100, 3e-3)),
        pytest.param(
            "lora",
            [*options(130, 5e-3), "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "qlora",
            [*options(130, 5e-3), "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_each_stage_learns_eight_rows(train, tmp_path, stage, more):
    rows = str(tmp_path / f"{stage}.json")
    assert train(stage, "--eval_data", rows, "--eval_strategy", "no", *more) == 0
    out = tmp_path / "out"
    state = json.loads((out / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    final = json.loads((out / "eval_results.json").read_text())["eval_loss"]
    assert losses[-1] < losses[0]
    assert final < (losses[0] if stage == "pretrain" else 0.05)
    assert (out / "loss.png").stat().st_size > 5000
    samples = [json.loads(line) for line in (out / "sample_answers.jsonl").read_text().splitlines()]
    assert len(samples) == 3
    assert stage == "pretrain" or all(sample["answer"] == sample["expected"] for sample in samples)


def test_fewer_visual_tokens(train, tmp_path, trainable):
    # The first step warms up.
    assert train("lora", "--visual-tokens", "2", *options(3, 1e-3), "--lora_r", "2") == 0
    merged = tmp_path / "out" / "merged"
    model = EmmaForConditionalGeneration.from_pretrained(merged)
    assert model.config.visual_tokens == 2
    for folder in (merged, tmp_path / "out"):
        processor = EmmaProcessor.from_pretrained(folder)
        assert (processor.image_seq_length, processor.vision_seq_length) == (2, 16)
    whole = EmmaForConditionalGeneration.from_pretrained(trainable)
    before, after = (each.model.modality_adaptation.visual_alignment.weight for each in (whole, model))
    # Rows of tokens that were never chosen are as they were.
    assert 2 <= (before != after).any(1).sum() < 16


@pytest.mark.parametrize("stage", ["finetune", "lora"])
def test_what_a_stage_saves_loads_through_the_auto_classes(train, tmp_path, stage, processor, reference):
    rows = tmp_path / f"{stage}.json"
    assert (
        train(stage, "--eval_data", str(rows), *options(6, 3e-3), "--eval_strategy", "no", "--lora_dropout", "0") == 0
    )
    out = tmp_path / "out"
    folder = out / "merged" if stage == "lora" else out
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    loaded = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    dataset = ConversationDataset(rows, processor, reference / "images")
    with torch.no_grad():
        loss = model(**DataCollator(loaded)([dataset[row] for row in range(8)])).loss
    final = json.loads((out / "eval_results.json").read_text())["eval_loss"]
    assert abs(loss.item() - final) < 2e-3 * final


def test_an_adapter_loads_on_its_base(train, tmp_path, trainable, monkeypatch):
    """Also one that is pushed, which `Trainer` saves once more."""
    pushed = []
    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(transformers.Trainer, "_push_from_checkpoint", lambda self, folder: None)

    def push(self, *args, **kwargs):
        self.save_model(_internal_call=True)
        pushed.append(True)

    monkeypatch.setattr(transformers.Trainer, "push_to_hub", push)
    assert train("lora", "--push-to-hub", *options(4, 3e-3)) == 0
    assert pushed
    out = tmp_path / "out"
    base = transformers.AutoModelForImageTextToText.from_pretrained(trainable, trust_remote_code=True)
    adapted = peft.PeftModel.from_pretrained(base, out).merge_and_unload()
    merged = transformers.AutoModelForImageTextToText.from_pretrained(out / "merged", trust_remote_code=True)
    expected = dict(merged.named_parameters())
    for name, parameter in adapted.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=0, msg=name)


def test_the_defaults_are_the_authors(tmp_path):
    common = ["--model", "m", "--train_data", "d", "--output_dir", str(tmp_path), "--use_cpu"]
    for stage, rate, projector, rows in (
        ("pretrain", 1e-3, 1e-3, 256),
        ("finetune", 2e-5, 2e-5, 128),
        ("lora", 2e-4, 2e-5, 128),
    ):
        script, args = parse([*common, "--stage", stage, "--per_device_train_batch_size", "16"])
        assert (args.learning_rate, script.projector_learning_rate) == (rate, projector)
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == rows
        assert (args.lr_scheduler_type, args.weight_decay, args.get_warmup_steps(200)) == ("cosine", 0.0, 6)
        assert (script.lora_r, script.lora_alpha) == (128, 256)
    script, args = parse([*common, "--gradient-accumulation-steps", "3", "--eval_data", "e", "--learning_rate", "0.5"])
    assert (args.gradient_accumulation_steps, args.eval_strategy, args.learning_rate) == (3, "epoch", 0.5)


@pytest.mark.parametrize(
    ("stage", "more", "message"),
    [
        ("sft", [], "`stage` must be one of 'pretrain', 'finetune', 'lora', 'qlora': got 'sft'"),
        ("finetune", ["--train_data", "none.json"], "There is no file of rows at none.json"),
        ("finetune", ["--global_batch_size", "12"], "must be a multiple of the rows .* got 12 and 8 (1 times 8)"),
        ("pretrain", ["--image_folder", "."], "of pretrain.json: .*no picture at"),
        ("pretrain", ["--visual_tokens", "17"], "`visual_tokens` must be a whole number from 1 to 16, .* got 17."),
        ("finetune", ["--global_batch_size", "0"], "`--global_batch_size` must be at least 1: got 0."),
        (
            "finetune",
            ["--per_device_train_batch_size", "0"],
            "`--per_device_train_batch_size` must be at least 1: got 0.",
        ),
        ("finetune", ["--gradient_accumulation_steps", "2"], "both say how many rows a step has. Give one."),
        ("finetune", ["--eval_strategy", "steps"], "need rows to evaluate on. Name them by `--eval_data`."),
        ("finetune", ["--eval_on_start"], "need rows to evaluate on. Name them by `--eval_data`."),
        (
            "finetune",
            ["--resume_from_checkpoint", "none"],
            "must be the folder of a checkpoint: there is none at none.",
        ),
        (
            "finetune",
            ["--resume_from_checkpoint", "."],
            "must be a complete checkpoint: of ., trainer_state.json is missing or cut off. .*pass it as `--model`.",
        ),
        ("lora", ["--lora_r", "0"], "`--lora_r` must be at least 1: got 0."),
        ("lora", ["--lora_dropout", "1.5"], "`--lora_dropout` must be at least 0 and below 1: got 1.5."),
        ("finetune", ["--save_only_model", "--save_strategy", "epoch"], "`save_only_model` leaves that out"),
    ],
)
def test_mistakes_are_told_in_a_line(train, capsys, stage, more, message):
    assert train(stage, *more) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("emma-hf: ")
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), error), error


def test_what_is_not_installed_is_told_before_training(train, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train("finetune", *options(1, 1e-4)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        'emma-hf: Plots need matplotlib: install it with `pip install "emma-hf[train]"`.'
    )
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_skipped_rows_of_the_evaluation_are_named_once(train, caplog, tmp_path):
    """Whether they are evaluated during training or after it alone."""
    rows = json.loads(save_rows(tmp_path / "eval.json").read_text())
    rows[0]["image"] = "none.jpg"
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    for strategy in ("epoch", "no"):
        more = ["--eval_data", str(tmp_path / "eval.json"), "--on_error", "skip", "--eval_strategy", strategy]
        assert train("finetune", "--output_dir", str(tmp_path / strategy), *more, *options(1, 1e-4)) == 0
        assert caplog.text.count("rows were skipped") == 1
        caplog.clear()


def test_the_result_can_be_pushed(train, monkeypatch):
    pushed = []
    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(transformers.Trainer, "_push_from_checkpoint", lambda self, folder: None)
    monkeypatch.setattr(transformers.Trainer, "push_to_hub", lambda self, *args, **kwargs: pushed.append(True))
    assert train("finetune", "--push-to-hub", *options(1, 1e-4)) == 0
    assert pushed


def test_the_merged_model_of_an_earlier_start_is_not_pushed(train, monkeypatch, tmp_path):
    merged, seen = tmp_path / "out" / "merged", []
    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(transformers.Trainer, "_push_from_checkpoint", lambda self, folder: None)
    monkeypatch.setattr(transformers.Trainer, "push_to_hub", lambda self, *args, **kwargs: seen.append(merged.exists()))
    for _ in range(2):
        assert train("lora", "--push-to-hub", "--lora_r", "2", *options(1, 1e-4)) == 0
        assert (merged / "config.json").is_file()
    assert seen
    assert not any(seen)


def test_the_help_names_the_arguments(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "--stage" in text
    assert "--gradient_accumulation_steps" in text


@pytest.mark.parametrize("option", ["--train_data", "--eval_data"])
def test_an_empty_file_of_rows_is_told_before_training(train, capsys, tmp_path, option):
    (tmp_path / "none.jsonl").write_text("")
    assert train("finetune", option, str(tmp_path / "none.jsonl")) == 2
    assert f"`{option}` must hold at least one row: " in capsys.readouterr().err.splitlines()[-1]


def test_a_run_goes_on_from_the_checkpoint_that_is_named_and_of_its_stage_alone(train, capsys, tmp_path, monkeypatch):
    steps, training_step = [], transformers.Trainer.training_step

    def counted(trainer, *args, **kwargs):
        steps.append(trainer.state.global_step)
        return training_step(trainer, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", counted)
    saving = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "3"]
    assert train("pretrain", *options(2, 1e-4), *saving) == 0
    # Not from the last one, of step 2.
    named = ["--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-1")]
    assert train("pretrain", *options(3, 1e-4), *saving, *named) == 0
    assert sorted(set(steps)) == [0, 1, 2]
    assert steps.count(1) == 2 * steps.count(0)
    assert train("finetune", *options(3, 1e-4), *saving) == 2
    mistake = r"of its own stage: .* is of pretrain, this one is finetune\. "
    assert re.search(mistake + "Name another `--output_dir`", capsys.readouterr().err)
    assert train("finetune", "--output_dir", str(tmp_path / "new"), *options(3, 1e-4), *saving, *named) == 2
    assert re.search(mistake + "Pass it as `--model`", capsys.readouterr().err)


def test_another_sampling_needs_the_own_one_off(tmp_path):
    common = f"--model m --train_data d --output_dir {tmp_path} --use_cpu --global_batch_size 8".split()
    new = "train_sampling_strategy" in vars(transformers.TrainingArguments(str(tmp_path), use_cpu=True))
    sampling = ["--train_sampling_strategy", "sequential"] if new else ["--group_by_length"]
    with pytest.raises(ValueError, match="pass `--group_by_modality false` too"):
        parse([*common, *sampling])
    script, _ = parse([*common, *sampling, "--group_by_modality", "false"])
    assert not script.group_by_modality


class Code:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_code_in_a_checkpoint_is_not_run_and_told(train, capsys, tmp_path):
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    assert train("finetune", *options(1, 1e-4), *saving) == 0
    torch.save({"state": Code()}, tmp_path / "out" / "checkpoint-1" / "optimizer.pt")
    assert train("finetune", *options(2, 1e-4), *saving) == 2
    out, err = capsys.readouterr()
    assert "this must never run" not in out
    assert re.fullmatch(
        "emma-hf: A checkpoint must hold what this command wrote: a file of .*checkpoint-1 holds something else, and none "
        "of it is run .*Remove that checkpoint.*",
        err.splitlines()[-1],
    )
