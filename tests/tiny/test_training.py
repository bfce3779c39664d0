"""emma-tiny's training from nothing, in small."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel

from emma_hf import EmmaError, EmmaForConditionalGeneration
from emma_hf.tiny.recipe import SMOKE, Budget, SequentialTrainer
from emma_hf.tiny.training import train_tiny


def logged(folder, name: str = "loss") -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


@pytest.mark.once
@pytest.mark.slow
def test_smoke_training_learns_in_every_phase_and_does_none_twice(tmp_path):
    folder = train_tiny(tmp_path, SMOKE, disable_tqdm=True)
    for phase in ("clip", "pretrain", "finetune"):
        seen = logged(tmp_path / phase)
        assert np.mean(seen[-2:]) < 0.97 * seen[0], (phase, seen)
        assert (tmp_path / phase / "loss.png").is_file()
    assert (tmp_path / "curve.png").is_file()
    rates = logged(tmp_path / "finetune", "learning_rate")
    assert rates[2:5] == [Budget().finetune_rate] * 3
    assert rates[-1] < Budget().finetune_rate
    model = EmmaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 12_000_000
    # The towers are CLIP's, unmoved.
    clip = CLIPModel.from_pretrained(tmp_path / "clip")
    ours = dict(model.named_parameters())
    for name, weight in clip.named_parameters():
        tower, _, rest = name.partition(".")
        if tower in ("vision_model", "text_model"):
            module = "vision_tower" if tower == "vision_model" else "instruction_encoder"
            (found,) = [key for key in ours if key.startswith(f"model.{module}.") and key.endswith(f".{rest}")]
            assert torch.equal(ours[found], weight.bfloat16()), name
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/model.safetensors") if path.parent != folder}
    train_tiny(tmp_path, SMOKE)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


LITTLE = Budget(clip_steps=6, clip_groups=2, pictures=6, pretrain_rows=24, finetune_rows=24, batch_size=4)


@pytest.mark.once
@pytest.mark.slow
def test_a_run_that_is_stopped_in_every_phase_ends_with_the_same_weights(tmp_path, monkeypatch):
    settings = {"disable_tqdm": True, "dataloader_num_workers": 0, "logging_steps": 2}
    train_tiny(tmp_path / "whole", LITTLE, **settings)
    steps, training_step = [], SequentialTrainer.training_step

    def stopped(trainer, *args, **kwargs):
        steps.append(trainer.state.global_step)
        # Behind a checkpoint by a step, so that a step is repeated.
        if len(steps) in (4, 10, 16):
            raise KeyboardInterrupt
        return training_step(trainer, *args, **kwargs)

    monkeypatch.setattr(SequentialTrainer, "training_step", stopped)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train_tiny(tmp_path / "stopped", LITTLE, **settings)
    train_tiny(tmp_path / "stopped", LITTLE, **settings)
    assert steps == [0, 1, 2, 3, 2, 3, 4, 5, 0, 1, 0, 1, 2, 3, 4, 5, 4, 5, 0, 1, 2, 3, 4, 5]
    for phase in ("clip", "pretrain", "finetune", "emma-tiny"):
        whole, found = (load_file(tmp_path / run / phase / "model.safetensors") for run in ("whole", "stopped"))
        assert whole.keys() == found.keys()
        assert all(torch.equal(whole[name], found[name]) for name in whole), phase
    curves = [
        [json.loads(line) for line in (tmp_path / run / "curve.jsonl").read_text().splitlines()]
        for run in ("whole", "stopped")
    ]
    for line in (*curves[0], *curves[1]):
        assert line.pop("seconds") >= 0
    assert curves[0] == curves[1]
    assert [(line["phase"], line["step"]) for line in curves[0]] == [
        (phase, step) for phase in ("clip", "pretrain", "finetune") for step in (1, 2, 4, 6)
    ]
    assert [line["step"] for line in curves[0] if "accuracy" in line] == [6]
    with pytest.raises(EmmaError, match=r"was begun with seed=0: got 1\. Choose another folder"):
        train_tiny(tmp_path / "whole", LITTLE, seed=1)


def test_a_process_that_sees_several_gpus_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(EmmaError, match=r"One process must see one GPU, .*: got 2\. Start a process for each"):
        train_tiny(tmp_path, LITTLE)


def test_its_linear_layers_can_be_packed_in_4_bit(untrained):
    _, model = untrained
    for name, module in model.model.language_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert (module.in_features % 64, module.out_features % 64) == (0, 0), name
