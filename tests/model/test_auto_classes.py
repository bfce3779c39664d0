"""Loading as users do: through the Auto classes and the pipeline, from a folder, an offline cache, and the package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.models import tiny_inputs, tiny_model
from support.processes import run_python

import emma_hf
from emma_hf import EmmaForConditionalGeneration
from emma_hf.model.code_files_emma import AUTO_MAP, HUB_FILES

# Python of an environment with the other supported Transformers; `make test` sets it.
OTHER_PYTHON = os.environ.get("EMMA_OTHER_PYTHON")

QUESTION = """
messages = [{"role": "user", "content": [{"type": "image", "url": "photo.jpg"}, {"type": "text", "text": "Who is it?"}]}]
def answer(model, processor):
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return tokens[0, inputs["input_ids"].shape[1]:].tolist()
"""

EVERY_CLASS = """
import sys, torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
# Before Transformers 5.20, `transformers` has a placeholder of that name without torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
source, trust = sys.argv[1], {"trust_remote_code": sys.argv[2] == "remote"}
module = "transformers_modules" if sys.argv[2] == "remote" else "emma_hf"
classes = [AutoModelForImageTextToText]
for name in ("AutoModelForMultimodalLM", "AutoModelForVision2Seq"):
    if hasattr(transformers, name):
        classes.append(getattr(transformers, name))
assert len(classes) == 2, classes
config = AutoConfig.from_pretrained(source, **trust)
processor = AutoProcessor.from_pretrained(source, **trust)
image_processor = AutoImageProcessor.from_pretrained(source, **trust)
base = AutoModel.from_pretrained(source, **trust)
assert [type(x).__name__ for x in (config, processor, image_processor, base)] == [
    "EmmaConfig", "EmmaProcessor", "EmmaImageProcessor", "EmmaModel"
]
for loaded in (config, processor, image_processor, base):
    assert type(loaded).__module__.startswith(module), type(loaded)
answers = []
for cls in classes:
    model = cls.from_pretrained(source, dtype=torch.float32, **trust).eval()
    assert type(model).__name__ == "EmmaForConditionalGeneration"
    answers.append(answer(model, processor))
assert len({str(tokens) for tokens in answers}) == 1
print("ANSWER", answers[0])
"""

PIPELINE = """
import sys, torch
from transformers import pipeline
if sys.argv[2] == "any-to-any":
    # It asks for torchvision whatever the model takes; this environment has none, and pictures need none.
    from transformers.pipelines import any_to_any
    any_to_any.requires_backends = lambda pipeline, backends: None
pipe = pipeline(sys.argv[2], model=sys.argv[1], trust_remote_code=True, dtype=torch.float32)
settings = {"generate_kwargs": {"max_new_tokens": 8, "do_sample": False}, "return_full_text": False}
one = pipe(text=messages, **settings)[0]["generated_text"]
many = pipe(text=[messages, messages], batch_size=2, **settings)
assert [row[0]["generated_text"] for row in many] == [one, one], many
prompt = pipe.processor.apply_chat_template(messages, add_generation_prompt=True)
assert pipe(images="photo.jpg", text=prompt, **settings)[0]["generated_text"] == one
print("ANSWER", pipe.tokenizer(one, add_special_tokens=False)["input_ids"][-3:], repr(one))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, reference) -> Path:
    """An empty folder with a photo, where processes without the package run."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copy(reference / "images" / "photo.jpg", folder)
    return folder


@pytest.fixture(scope="module")
def expected(model, processor, reference) -> list[int]:
    scope: dict = {}
    exec(QUESTION.replace("photo.jpg", str(reference / "images" / "photo.jpg")), scope)
    return scope["answer"](model, processor)


def run(code: str, *arguments, place: Path, importable: bool = False, **environment: str) -> str:
    done = run_python(
        QUESTION + code,
        *arguments,
        cwd=place,
        importable=importable,
        HF_MODULES_CACHE=str(place / "modules"),
        **environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("ANSWER ")[-1].strip()


def test_every_class_from_the_folder_alone(converted, place, expected):
    assert run(EVERY_CLASS, converted, "remote", place=place) == str(expected)


def test_every_class_from_an_offline_cache(converted, place, expected, tmp_path):
    repository = tmp_path / "models--org--emma-random"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(converted, repository / "snapshots" / ("0" * 40))
    assert run(EVERY_CLASS, "org/emma-random", "remote", place=place, HF_HUB_CACHE=str(tmp_path)) == str(expected)


def test_every_class_from_the_installed_package(converted, place, expected):
    code = "import emma_hf\n" + EVERY_CLASS
    assert run(code, converted, "local", place=place, importable=True) == str(expected)


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_the_pipeline(converted, place, expected, processor, task, installed):
    if task == "any-to-any" and not hasattr(transformers, "AutoModelForMultimodalLM"):
        pytest.skip("Transformers 4.57 has no pipeline of this task")
    text = processor.tokenizer.decode(expected, skip_special_tokens=True)
    said = run(("import emma_hf\n" * installed) + PIPELINE, converted, task, place=place, importable=installed)
    assert repr(text).strip("'\"").split()[-1] in said


def test_a_model_that_was_loaded_from_a_folder_saves_all_of_it(converted, place, expected, tmp_path):
    code = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
trust = {"trust_remote_code": True}
for source, target in ((sys.argv[1], sys.argv[2]), (sys.argv[2], sys.argv[3])):
    AutoModelForImageTextToText.from_pretrained(source, **trust).save_pretrained(target, max_shard_size="400KB")
    AutoProcessor.from_pretrained(source, **trust).save_pretrained(target)
AutoModel.from_pretrained(sys.argv[3], **trust).save_pretrained(sys.argv[4])
"""
    run(code, converted, tmp_path / "a", tmp_path / "b", tmp_path / "base", place=place)
    for folder in ("a", "b", "base"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["auto_map"] == AUTO_MAP
        assert str(tmp_path) not in json.dumps(config)
    assert {path.name for path in (tmp_path / "b").iterdir()} >= set(HUB_FILES)
    assert run(EVERY_CLASS, tmp_path / "b", "remote", place=place) == str(expected)


def test_the_alias_of_4_57_exists_on_every_version(converted):
    model = emma_hf.AutoModelForVision2Seq.from_pretrained(converted)
    assert isinstance(model, EmmaForConditionalGeneration)
    if transformers.__version__ >= "5":
        assert emma_hf.AutoModelForVision2Seq is transformers.AutoModelForImageTextToText


SAVE_AND_ANSWER = """
import sys, torch
sys.modules["emma_hf"] = None
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
trust = {"trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32, **trust).eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(sys.argv[3])).logits}, sys.argv[4])
model.save_pretrained(sys.argv[2])
if len(sys.argv) > 5:
    processor = AutoProcessor.from_pretrained(sys.argv[1], **trust)
    processor.save_pretrained(sys.argv[2])
    inputs = processor(images=sys.argv[5], text="USER: <image>\\nWhat’s this? ASSISTANT: x</s>", return_tensors="pt")
    save_file({name: value.contiguous() for name, value in inputs.items()}, sys.argv[4] + ".inputs")
"""


@pytest.mark.skipif(not OTHER_PYTHON, reason="EMMA_OTHER_PYTHON names no environment with the other Transformers")
@pytest.mark.parametrize("model_type", ["reference", "qwen2"])
def test_what_one_version_saves_the_other_loads(converted, place, tmp_path, model_type, photo):
    arguments = []
    if model_type == "reference":
        source = converted
        model = EmmaForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
        inputs = tiny_inputs(model, images=(1, 1))
        arguments = [str(photo.resolve())]
    else:
        # A rotary base other than the default, which the versions store differently.
        model = tiny_model(text={"model_type": "qwen2", "num_key_value_heads": 2, "rope_theta": 1e6})
        source = tmp_path / "source"
        model.save_pretrained(source)
        inputs = tiny_inputs(model, images=(1, 1))
    save_file(inputs, tmp_path / "inputs")
    with torch.no_grad():
        logits = [model(**inputs).logits]
    folders, prepared = [source], []
    # This version's folder to the other, what that saves to this, and what this saves to the other once more.
    for step, python in enumerate((OTHER_PYTHON, sys.executable, OTHER_PYTHON)):
        target, output = tmp_path / f"folder{step}", tmp_path / f"logits{step}"
        done = subprocess.run(
            [python, "-c", SAVE_AND_ANSWER, folders[-1], target, tmp_path / "inputs", output, *arguments],
            cwd=place,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(place / f"modules{step}")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert "newly initialized" not in done.stderr
        folders.append(target)
        logits.append(load_file(output)["logits"])
        if arguments:
            prepared.append(load_file(str(output) + ".inputs"))
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=1e-5, rtol=1e-5)
    for other in prepared[1:]:
        for name, value in prepared[0].items():
            assert other[name].tolist() == value.tolist(), name
    first, last = (load_file(folder / "model.safetensors") for folder in (folders[1], folders[-1]))
    assert first.keys() == last.keys()
    assert all(torch.equal(value, last[name]) for name, value in first.items())
