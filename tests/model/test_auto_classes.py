"""Loading as users do: through the Auto classes and the pipelines, from a folder, an offline cache, and the package."""

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
from support import auto_classes_run
from support.models import tiny_inputs, tiny_model
from support.processes import OFFLINE
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

import emma_hf
from emma_hf import EmmaConfig, EmmaError, EmmaForConditionalGeneration
from emma_hf.model.code_files_emma import AUTO_MAP, HUB_FILES

# Pythons of the environments with the other supported versions of Transformers; `make test-slow` sets them.
OTHER_PYTHONS = os.environ.get("EMMA_OTHER_PYTHONS", "").split()


@pytest.fixture(scope="module")
def place(tmp_path_factory, reference) -> Path:
    """An empty folder with a photo, where processes without the package run."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copy(reference / "images" / "photo.jpg", folder)
    return folder


@pytest.fixture
def expected(model, processor, place, monkeypatch) -> list[int]:
    monkeypatch.chdir(place)
    return auto_classes_run.answer(model, processor)


def test_a_folder_or_an_offline_cache_alone(converted, processor, place, expected, tmp_path):
    repository = tmp_path / "models--org--emma-random"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(converted, repository / "snapshots" / ("0" * 40))
    done = subprocess.run(
        [sys.executable, auto_classes_run.__file__, converted, "org/emma-random", tmp_path],
        env={**OFFLINE, "HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_CACHE": str(tmp_path)},
        cwd=place, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.split("SAID ")[-1])
    text = processor.tokenizer.decode(expected, skip_special_tokens=True)
    assert said == {
        **dict.fromkeys([str(converted), "org/emma-random", "saved anew"], [expected] * 2),
        **dict.fromkeys(auto_classes_run.TASKS, [text] * 4),
    }
    for folder in ("a", "b", "base"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["auto_map"] == AUTO_MAP
        assert str(tmp_path) not in json.dumps(config)
    assert {path.name for path in (tmp_path / "b").iterdir()} >= set(HUB_FILES)


def test_every_class_from_the_installed_package(converted, expected):
    assert auto_classes_run.answers_of_every_class(converted, "emma_hf") == [expected] * 2


@pytest.mark.parametrize("task", auto_classes_run.TASKS)
def test_the_pipeline_beside_the_installed_package(converted, processor, expected, task, monkeypatch):
    if task == "any-to-any":
        from transformers.pipelines import any_to_any

        monkeypatch.setattr(any_to_any, "requires_backends", any_to_any.requires_backends)
        auto_classes_run.without_torchvision()
    text = processor.tokenizer.decode(expected, skip_special_tokens=True)
    questions = []
    monkeypatch.setattr("builtins.input", lambda *args: questions.append(args) or "n")
    for options in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
        assert auto_classes_run.answers_of_the_pipeline(task, converted, **options) == [text] * 4
    assert questions == []


def test_a_video_processor_is_refused_in_words(converted):
    with pytest.raises(EmmaError, match="has no video processor. Pass frames of a video as `images`"):
        AutoVideoProcessor.from_pretrained(converted, config=EmmaConfig.from_pretrained(converted))


def test_the_alias_of_4_57_exists_on_every_version(converted):
    model = emma_hf.AutoModelForVision2Seq.from_pretrained(converted)
    assert isinstance(model, EmmaForConditionalGeneration)
    if transformers.__version__ >= "5":
        assert emma_hf.AutoModelForVision2Seq is transformers.AutoModelForImageTextToText


SAVE_AND_ANSWER = """
import json, sys, torch
sys.modules["emma_hf"] = None
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
trust = {"trust_remote_code": True}
for source, inputs, target in json.loads(sys.argv[1]):
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32, **trust).eval()
    model.save_pretrained(target)
    with torch.no_grad():
        save_file({"logits": model(**load_file(inputs)).logits}, target + ".logits")
    if Path(source, "tokenizer_config.json").exists():
        processor = AutoProcessor.from_pretrained(source, **trust)
        processor.save_pretrained(target)
        text = "USER: <image>\\nWhat’s this? ASSISTANT: x</s>"
        prepared = processor(images="photo.jpg", text=text, return_tensors="pt")
        save_file({name: value.contiguous() for name, value in prepared.items()}, target + ".prepared")
"""


@pytest.mark.slow
@pytest.mark.skipif(not OTHER_PYTHONS, reason="EMMA_OTHER_PYTHONS names no environments with the other Transformers")
def test_what_each_version_saves_each_other_loads(converted, place, processor, photo, tmp_path):
    # A rotary base other than the default, which the versions store differently.
    tiny_model(text={"model_type": "qwen2", "num_key_value_heads": 2, "rope_theta": 1e6}).save_pretrained(
        tmp_path / "qwen2"
    )
    sources = {"reference": converted, "qwen2": tmp_path / "qwen2"}
    logits = {}
    for name, source in sources.items():
        model = EmmaForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
        inputs = tiny_inputs(model, images=(1, 1))
        save_file(inputs, tmp_path / f"{name}.inputs")
        with torch.no_grad():
            logits[name] = model(**inputs).logits
    prepared = processor(images=photo, text="USER: <image>\nWhat’s this? ASSISTANT: x</s>", return_tensors="pt")

    def answer(number: int, python: str, folders: list[tuple[str, Path, Path]]) -> None:
        steps = [[str(source), str(tmp_path / f"{name}.inputs"), str(target)] for name, source, target in folders]
        done = subprocess.run(
            [python, "-c", SAVE_AND_ANSWER, json.dumps(steps)],
            env={**OFFLINE, "HF_MODULES_CACHE": str(tmp_path / f"modules-{number}")},
            cwd=place, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "newly initialized" not in done.stderr
        for name, _, target in folders:
            found = load_file(f"{target}.logits")["logits"]
            torch.testing.assert_close(found, logits[name], atol=1e-5, rtol=1e-5)
            weights, expected = (load_file(folder / "model.safetensors") for folder in (target, sources[name]))
            assert weights.keys() == expected.keys(), target
            assert all(torch.equal(weights[key], value) for key, value in expected.items()), target
            if name == "reference":
                found = load_file(f"{target}.prepared")
                assert found.keys() == prepared.keys()
                for key, value in prepared.items():
                    assert torch.equal(found[key], value), (target, key)

    pythons = list(enumerate([sys.executable, *OTHER_PYTHONS]))
    for number, python in pythons:
        answer(number, python, [(name, source, tmp_path / f"{name}-{number}") for name, source in sources.items()])
    # Each loads, and saves once more, what every version saved.
    for number, python in pythons:
        saved = [(name, tmp_path / f"{name}-{other}") for name in sources for other, _ in pythons]
        answer(number, python, [(name, folder, Path(f"{folder}-{number}")) for name, folder in saved])
