"""Runs that are killed: which checkpoints count as complete, and that going on from them changes nothing."""

import json
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import OFFLINE
from support.rows import save_rows
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from emma_hf import EmmaForConditionalGeneration
from emma_hf.data import ConversationDataset, DataCollator
from emma_hf.training import prepare
from emma_hf.training.checkpoints import IncompleteCheckpointCallback, incomplete_checkpoints, last_complete_checkpoint

SCRIPT = Path(__file__).parents[1] / "support" / "killed_runs.py"


@pytest.fixture(scope="module")
def written(trainable, processor, reference, tmp_path_factory):
    """An output folder with the checkpoints of steps 9 and 10."""
    folder = tmp_path_factory.mktemp("written")
    model = prepare(EmmaForConditionalGeneration.from_pretrained(trainable), "pretrain")
    rows = ConversationDataset(save_rows(folder / "rows.json"), processor, reference / "images")
    trainer(folder / "out", model=model, rows=rows, processor=processor).train()
    return folder / "out"


@pytest.fixture
def output(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "out"))


def trainer(output: Path, model=None, rows=None, processor=None) -> Trainer:
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=10,
        save_steps=1,
        save_total_limit=2,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    return Trainer(
        model=model or torch.nn.Linear(1, 1),
        args=args,
        train_dataset=rows,
        data_collator=DataCollator(processor) if processor else None,
        processing_class=processor,
        callbacks=[IncompleteCheckpointCallback()],
    )


def test_the_last_checkpoint_is_complete(output):
    assert last_complete_checkpoint(output) == str(output / "checkpoint-10")
    assert incomplete_checkpoints(output) == []
    assert last_complete_checkpoint(output / "nowhere") is None


FILES = [
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "config.json",
    "tokenizer.json",
    "training_args.bin",
    "trainer_state.json",
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut_off_is_found(output, name):
    path = output / "checkpoint-10" / name
    content = path.read_bytes()
    for share in (0, 0.5, 0.99):
        path.write_bytes(content[: int(len(content) * share)])
        assert incomplete_checkpoints(output) == [(path.parent, f"{name} is missing or cut off")], share
    assert last_complete_checkpoint(output) == str(output / "checkpoint-9")


def test_an_archive_that_torch_did_not_write_is_found(output):
    with zipfile.ZipFile(output / "checkpoint-10" / "optimizer.pt", "w") as archive:
        archive.writestr("x", "y")
    assert [reason for _, reason in incomplete_checkpoints(output)] == ["optimizer.pt is missing or cut off"]


def test_a_checkpoint_has_its_optimizer(output):
    (output / "checkpoint-10" / "optimizer.pt").unlink()
    assert [reason for _, reason in incomplete_checkpoints(output)] == ["it holds no state of the optimizer"]
    # Those of FSDP and of DeepSpeed.
    for name in ("optimizer_0", "global_step10"):
        (output / "checkpoint-10" / name).mkdir()
        assert incomplete_checkpoints(output) == []
        (output / "checkpoint-10" / name).rmdir()


def test_what_never_got_its_last_file_is_set_aside(output):
    (output / "checkpoint-10" / "trainer_state.json").unlink()
    (output / "checkpoint-12").mkdir()
    (output / "checkpoint-best").mkdir()
    (output / "checkpoint-11").write_text("a file, no checkpoint")
    assert get_last_checkpoint(output) == str(output / "checkpoint-12")
    trainer(output)
    # Where `Trainer` itself looks there is only the complete one.
    assert get_last_checkpoint(output) == str(output / "checkpoint-9")
    names = {path.name for path in output.iterdir() if path.is_dir()}
    aside = {"_incomplete-checkpoint-10", "_incomplete-checkpoint-12"}
    assert names >= {"checkpoint-9", "checkpoint-best", *aside}
    # A second crash at the same step finds the name taken.
    (output / "checkpoint-12").mkdir()
    trainer(output)
    assert (output / "_incomplete-checkpoint-12-2").is_dir()


def test_each_of_many_processes_must_have_kept_its_random_state(output):
    folder = output / "checkpoint-10"
    state = json.loads((folder / "trainer_state.json").read_text())
    noted = state["stateful_callbacks"]["IncompleteCheckpointCallback"]
    assert noted == {"args": {"stage": None}, "attributes": {"processes": 1}}
    state["stateful_callbacks"]["IncompleteCheckpointCallback"]["attributes"] = {"processes": 2}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    reason = "it holds the random states of 1 of 2 processes"
    assert incomplete_checkpoints(output) == [(folder, reason)]
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert incomplete_checkpoints(output) == []


def test_a_plain_trainer_goes_on_from_the_last_complete_one(output, trainable, processor, reference, tmp_path):
    (output / "checkpoint-10" / "trainer_state.json").unlink()
    model = prepare(EmmaForConditionalGeneration.from_pretrained(trainable), "pretrain")
    rows = ConversationDataset(save_rows(tmp_path / "rows.json"), processor, reference / "images")
    resumed = trainer(output, model, rows, processor)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 10
    expected = load_file(output / "_incomplete-checkpoint-10" / "model.safetensors")
    for name, tensor in load_file(output / "checkpoint-10" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def train(kind: str, model: Path, rows: Path, images: Path, output: Path, kills: list[float | str]) -> list[dict]:
    output.mkdir()
    command = [SCRIPT, kind, model, rows, images, output, STEPS, 3, json.dumps(kills)]
    result = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env={**OFFLINE, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    log = (output / "log.txt").read_text()
    runs = json.loads(result.stdout)
    assert runs[-1]["code"] == 0, log
    assert all(run["killed"] for run in runs[:-1]), (runs, log)
    return runs


def curve(output: Path) -> list[tuple]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    columns = ("step", "epoch", "loss", "grad_norm", "learning_rate")
    return [tuple(entry[column] for column in columns) for entry in history if "loss" in entry]


STEPS, KILLS = 160, 10


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("kind", ["plain", "command"])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(kind, trainable, reference, tmp_path):
    rows = save_rows(tmp_path / "rows.json")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(kind, trainable, rows, reference / "images", whole, [])
    checkpoint = whole / f"checkpoint-{STEPS}"
    files = [str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()]
    files.sort(key=lambda name: (checkpoint / name).stat().st_mtime_ns)
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"} < set(files)
    chance = random.Random(0)
    kills = [*files, *(chance.uniform(0.01, 0.8) for _ in range(KILLS))]
    chance.shuffle(kills)
    runs = train(kind, trainable, rows, reference / "images", killed, kills)
    begun = [run["began"] for run in runs]
    assert begun == sorted(begun)
    assert len(set(begun)) > KILLS / 2
    assert any(path.name.startswith("_incomplete-checkpoint-") for path in killed.iterdir())
    assert curve(killed) == curve(whole)
    weights = "adapter_model.safetensors" if kind == "command" else "model.safetensors"
    expected = load_file(whole / weights)
    for name, tensor in load_file(killed / weights).items():
        assert torch.equal(tensor, expected[name]), name
