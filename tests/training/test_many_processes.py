"""Several processes train as one does with the same global batch, by every engine that `examples` configures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.answering_run import answer_and_train
from support.models import make_attentive
from support.processes import OFFLINE, WITH_SUPPORT, run_processes, run_python
from support.rows import save_rows

from emma_hf.model.chat_template_emma import SYSTEM_PROMPT
from emma_hf.model.compat_emma import TRANSFORMERS_5
from emma_hf.model.modeling_emma import EmmaForConditionalGeneration
from emma_hf.training.checkpoints import incomplete_checkpoints

EXAMPLES = Path(__file__).parents[2] / "examples"
# `torchrun -m emma_hf train`, and so with `accelerate launch`.
TRAIN = ("-m", "emma_hf", "train")
RUN = "from support.answering_run import main; main()"
SHARDED = Path(__file__).parents[1] / "support" / "sharded_run.py"


@pytest.fixture
def options(trainable, reference, tmp_path):
    def of(output: Path, stage: str, rows_at_once: int) -> list[str]:
        rows = tmp_path / "rows.json"
        if not rows.exists():
            save_rows(rows)
        # Rows are not grouped: in some steps one process has a picture and the other has none.
        return (
            f"--stage {stage} --model {trainable} --train_data {rows} --image_folder {reference / 'images'} "
            f"--output_dir {output} --max_steps 6 --logging_steps 1 --learning_rate 1e-3 --save_steps 3 "
            f"--save_strategy steps --global_batch_size 4 --per_device_train_batch_size {rows_at_once} "
            "--group_by_modality 0 --lora_dropout 0 --lora_r 4 --disable_tqdm 1"
        ).split()

    return of


def curve(folder: Path) -> list[tuple[int, float, float]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]


def assert_same_run(one: Path, other: Path, weights: str = "model.safetensors") -> None:
    assert len(curve(one)) == 6
    for ours, theirs in zip(curve(one), curve(other), strict=True):
        # 4.57 logs four decimals.
        assert ours == pytest.approx(theirs, rel=1e-5)
    expected = load_file(one / weights)
    actual = load_file(other / weights)
    assert set(actual) == set(expected)
    for name, tensor in actual.items():
        # Adam divides by the gradient's size, so a weight whose gradient is noise moves by noise: at most 6 steps' rates.
        assert (tensor - expected[name]).abs().max() < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "rows_at_once"), [("finetune", 1), ("lora", 1)])
def test_two_processes_have_the_curve_of_one(options, tmp_path, stage, rows_at_once):
    one, two = tmp_path / "one", tmp_path / "two"
    for output, processes, rows in ((one, 1, 4), (two, 2, rows_at_once)):
        result = run_processes(*TRAIN, *options(output, stage, rows), "--use_cpu", processes=processes)
        assert result.returncode == 0, result.stderr
    weights = f"{'adapter_' if stage == 'lora' else ''}model.safetensors"
    assert_same_run(one, two, weights)
    # On a CPU, 4.57 asks torch to load the optimizer of a run of many processes to `cpu:0`, which torch does not know.
    if stage == "lora" and TRANSFORMERS_5:
        # Both processes kept their random states; without one of them the run goes on from the checkpoint before.
        assert incomplete_checkpoints(two) == []
        (two / "checkpoint-6" / "rng_state_1.pth").unlink()
        again = run_processes(*TRAIN, *options(two, stage, rows_at_once), "--use_cpu")
        assert again.returncode == 0, again.stderr
        assert "it holds the random states of 1 of 2 processes" in again.stderr
        assert (two / "_incomplete-checkpoint-6").is_dir()
        assert_same_run(one, two, weights)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed_zero3"])
def test_sharded_weights_have_the_curve_of_one_process(options, tmp_path, engine):
    if engine == "deepspeed_zero3":
        pytest.importorskip("deepspeed", reason="not part of the test extra: it compiles on first use")
    one, two = tmp_path / "one", tmp_path / "two"
    result = run_processes(*TRAIN, *options(one, "finetune", 4), "--use_cpu", processes=1)
    assert result.returncode == 0, result.stderr
    # The file as it ships, but for what needs a GPU or eight of them.
    config = (EXAMPLES / "accelerate" / f"{engine}.yaml").read_text()
    config = config.replace("num_processes: 8\n", "num_processes: 2\n").replace("precision: bf16", 'precision: "no"')
    path = tmp_path / "accelerate.yaml"
    path.write_text(config)
    rows = str(tmp_path / "rows.json")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path, SHARDED]
    command += [*options(two, "finetune", 1), "--eval_data", rows, "--eval_strategy", "steps", "--eval_steps", "3"]
    paths = {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, env={**OFFLINE, **paths}, timeout=300)
    assert result.returncode == 0, result.stderr
    assert_same_run(one, two)
    assert len((two / "sample_answers.jsonl").read_text().splitlines()) == 6
    # What was saved by every process together is one model.
    EmmaForConditionalGeneration.from_pretrained(two)


@pytest.mark.slow
def test_two_processes_answer_and_train_as_one_does(trainable, processor, reference, tmp_path):
    model = make_attentive(EmmaForConditionalGeneration.from_pretrained(trainable))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    # One process has all images, two of them in a row, and the other has none.
    rows = [
        (["photo.jpg"], "<image>\nWhat is this?", "A person."),
        ([], "Hello there", "Good morning."),
        (["wide.png", "photo.jpg"], "<image>\n<image>\nWhich is wider?", "One."),
        ([], "Who?", "I."),
        (["tiny.png"], "<image>\nWhat?", "A dot."),
        ([], "Where?", "Here and there."),
    ]
    rows = [
        {"image": images, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        for images, question, answer in rows
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    paths = (tmp_path, tmp_path / "model", reference / "images")
    # The first answer ends at once, that of the other process does not.
    inputs = processor(
        images=reference / "images" / "photo.jpg",
        text=f"{SYSTEM_PROMPT} USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt",
    )  # fmt: skip
    end = int(model.eval().generate(**inputs, max_new_tokens=1)[0, -1])
    one = answer_and_train(*paths, end, sharded=False, processes=1)
    assert one["answers"][0].tolist() == [end] + [-100] * 5
    assert (one["answers"][1] != -100).all()
    assert len({tuple(answer) for answer in one["answers"].tolist()}) == len(rows) - 1

    done = run_python(RUN, *paths, str(end), PYTHONPATH=WITH_SUPPORT)
    assert done.returncode == 0, done.stderr
    sharded, two = (torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("sharded", "ddp"))
    for name in ("answers", "expected"):
        np.testing.assert_array_equal(sharded[name], one[name])
        np.testing.assert_array_equal(two[name], one[name])
    assert two["training_loss"] == pytest.approx(one["training_loss"], rel=1e-5)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, atol=1e-5, rtol=0, msg=name)
    np.testing.assert_array_equal(two["labels"], one["labels"])
    has_label = one["labels"] != -100
    np.testing.assert_allclose(two["logits"][has_label], one["logits"][has_label], atol=1e-3)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
