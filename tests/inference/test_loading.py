"""Loading a model: what is read first, and what a wrong source is told."""

import shutil
import subprocess
import sys

import pytest
import torch

from emma_hf import EMMA_TINY
from emma_hf.inference import load_model
from emma_hf.model.errors_emma import EmmaError
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.scenes import Scene


def test_the_model_and_its_processor(converted, model):
    loaded, processor = load_model(converted, dtype="float32")
    assert not loaded.training
    assert loaded.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert type(processor).__name__ == "EmmaProcessor"
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor.cpu(), state[name]) for name, tensor in loaded.state_dict().items())
    assert load_model(str(converted), device="cpu", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_quantized_weights():
    loaded, _ = load_model(EMMA_TINY, device="cpu", quantization="8bit")
    assert loaded.is_quantized
    assert loaded.device.type == "cpu"


def test_fewer_visual_tokens_in_the_model_and_its_processor():
    for quantization in (None, "8bit"):
        loaded, processor = load_model(EMMA_TINY, "cpu", quantization=quantization, visual_tokens=12)
        prompt = "USER: <image>\nHow many things are there? ASSISTANT:"
        inputs = processor(images=draw(Scene.random(4)), text=prompt, return_tensors="pt")
        assert inputs["input_ids"].tolist()[0].count(processor.image_token_id) == 12
        with torch.no_grad():
            assert loaded(**inputs).image_hidden_states.shape[1] == 12
            assert loaded.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"visual_tokens": 17}, "`visual_tokens` must be a whole number from 1 to 16, .* got 17. Leave it out"),
        ({"dtype": "int"}, "`dtype` must be auto, float32, float16 or bfloat16: got 'int'"),
        ({"device": "tpu9"}, "`device` must be a device of this machine: got 'tpu9'"),
        ({"quantization": "2bit"}, "must be 4bit or 8bit: got '2bit'"),
    ],
)
def test_wrong_arguments(converted, arguments, message):
    with pytest.raises(EmmaError, match=message):
        load_model(converted, **arguments)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json, weights and processor: .* `emma-hf convert"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("{,"), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "must hold a JSON object: got list"),
        (lambda folder: (folder / "processor_config.json").write_text("[" * 100_000), "RecursionError.*emma-hf convert"),
        (lambda folder: (folder / "tokenizer.json").write_text("{,"), "processor's files must be complete"),
        (lambda folder: shutil.rmtree(folder / "instruction_tokenizer"), "processor's files must be complete"),
        (
            lambda folder: [(folder / f"{name}_config.json").unlink(missing_ok=True) for name in ("processor", "preprocessor")],
            "needs its processor beside it: .* lacks processor_config.json. `emma-hf convert",
        ),
        (
            lambda folder: (folder / "instruction_tokenizer" / "tokenizer_config.json").unlink(),
            # 4.57 cannot tell the tokenizer's class then.
            "know its tokens of start and end: .*`instruction_tokenizer/tokenizer_config.json`|files must be complete: .*copy",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "needs its weights beside it: .* lacks model.safetensors. `emma-hf convert",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("[" * 100_000),
            "index.json is not JSON .*Fetch it again",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
            "must map the names of weights to files, in `weight_map`: got None",
        ),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_reported_before_the_weights_are_read(converted, tmp_path, damage, message):
    folder = shutil.copytree(converted, tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(b"never read")
    damage(folder)
    with pytest.raises(EmmaError, match=message):
        load_model(folder)


def test_the_authors_layout(reference):
    with pytest.raises(EmmaError, match=r"model_type 'emma': .*original has 'llava.*`emma-hf convert SOURCE OUTPUT`"):
        load_model(reference / "original")


def test_a_source_that_is_not_there(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(link)
    for source in (tmp_path / "none", "none", "a/b/c", link, __file__):
        with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub id"):
            load_model(source)


def test_a_hub_id_without_network_fails_at_once(tmp_path):
    code = "from emma_hf.inference import load_model\nimport time\nstart = time.time()\n"
    code += "try:\n    load_model('none/none')\nexcept OSError as error:\n    print(error)\n"
    code += "print(time.time() - start)"
    # Nobody listens on port 9.
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = run(code, environment)
    message, seconds = done.splitlines()
    assert message.startswith("The Hub cannot be reached to read none/none (")
    assert float(seconds) < 10


def test_a_cached_model_without_network_is_loaded_at_once(converted, tmp_path):
    repository = tmp_path / "hub" / "models--org--name"
    commit = "0" * 40
    shutil.copytree(converted, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = "from emma_hf.inference import load_model\nimport time\nstart = time.time()\n"
    code += "print(type(load_model('org/name')[0]).__name__)\nprint(time.time() - start)"
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    name, seconds = run(code, environment).splitlines()
    assert name == "EmmaForConditionalGeneration"
    assert float(seconds) < 20


def run(code: str, environment: dict[str, str]) -> str:
    """What a process of its own prints: the variables of the Hub's client are read on import."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
