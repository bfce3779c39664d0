"""Exporting a model's complete Hub repository to a folder."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from PIL import Image
from support.models import answer
from transformers import pipeline

from emma_hf import EMMA_TINY, EmmaConfig, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.hub import export
from emma_hf.hub.manifest import MANIFEST_NAME, REQUIRED_FILES, files_of, manifest_of, read_manifest
from emma_hf.hub.model_card import TEMPLATE
from emma_hf.hub.verification import _card
from emma_hf.model.code_files_emma import AUTO_MAP, HUB_FILES
from emma_hf.storage.tensors import read_checkpoint

ROOT = Path(__file__).parents[2]


def test_the_folder_is_complete_and_its_manifest_is_true(exported):
    names = set(files_of(exported))
    assert names >= {*REQUIRED_FILES, MANIFEST_NAME, "model.safetensors.index.json"}
    assert len([name for name in names if name.endswith(".safetensors")]) == 3
    listed = read_manifest(exported)
    assert set(listed) == names - {MANIFEST_NAME}
    assert listed == manifest_of(exported)["files"]
    for name, entry in listed.items():
        assert (exported / name).stat().st_size == entry["size"], name
    for name in HUB_FILES:
        assert (exported / name).read_bytes() == (ROOT / "src" / "emma_hf" / "model" / name).read_bytes()
    assert json.loads((exported / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert not any(path.is_symlink() for path in exported.rglob("*"))


def test_the_weights_are_the_models(exported, tmp_path):
    before, after = read_checkpoint(EMMA_TINY), read_checkpoint(exported)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.load(), after[name].load()) for name, tensor in before.items())
    # Without a size the files themselves are copied; what was exported can be exported again, its pictures with it.
    again = export(exported, tmp_path / "again")
    for path in exported.glob("model*"):
        assert (again / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in (again / "widget").iterdir()) == ["scene-0.png", "scene-1.png", "scene-2.png"]


def test_the_pipeline_asks_no_question(exported, photo, monkeypatch):
    questions = []
    monkeypatch.setattr("builtins.input", lambda *args: questions.append(args) or "n")
    content = [{"type": "image", "url": str(photo)}, {"type": "text", "text": "What is it?"}]
    answers = [
        pipeline("image-text-to-text", model=str(exported), **options)(
            text=[{"role": "user", "content": content}], return_full_text=False
        )[0]["generated_text"]
        for options in ({}, {"trust_remote_code": True})
    ]
    model = EmmaForConditionalGeneration.from_pretrained(exported, dtype="auto")
    expected = answer(model, EmmaProcessor.from_pretrained(exported), photo, "What is it?")
    assert [text.strip() for text in answers] == [expected] * 2
    assert questions == []


def test_what_endpoints_install_is_what_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["ftfy"])}
    assert set(map(Requirement, (TEMPLATE / "requirements.txt").read_text(encoding="utf-8").splitlines())) <= asked


def test_an_export_with_fewer_visual_tokens(tmp_path):
    folder = export(EMMA_TINY, tmp_path / "fewer", visual_tokens=20)
    again = export(folder, tmp_path / "again")
    for exported, values in ((folder, {}), (again, {}), (again, {"visual_tokens": None})):
        config, expected = EmmaConfig.from_pretrained(exported, **values), 64 if values else 20
        assert config.image_seq_length == expected
        assert EmmaProcessor.from_pretrained(exported, **values).image_seq_length == expected
    assert json.loads((folder / "config.json").read_text())["image_seq_length"] == 20
    for path in folder.glob("model*.safetensors"):
        assert path.read_bytes() == (EMMA_TINY / path.name).read_bytes()
    with pytest.raises(ValueError, match="a whole number from 1 to 64, .* got 65"):
        export(EMMA_TINY, tmp_path / "more", visual_tokens=65)


def test_a_model_of_another_shape_gets_no_figures_of_the_paper(converted, tmp_path):
    folder = export(converted, tmp_path / "mine")
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict().keys().isdisjoint({"base_model", "datasets", "license", "model-index"})
    assert card.data.library_name == "transformers"
    assert "emma" in card.data.tags
    # Nor a licence, which is its owner's to name; the check says so, and finds nothing wrong with it.
    assert _card(folder) == ("", "ok, but it names no license")
    assert "# mine" in card.text
    assert "89.42" not in card.text
    assert "<!--" not in card.text
    # The figure of the architecture goes with it.
    with Image.open(folder / "docs" / "architecture.png") as picture:
        assert picture.width > 500


def test_examples_of_the_users_are_answered_by_the_model(converted, tmp_path, photo, model, processor):
    folder = export(converted, tmp_path / "mine", examples=[(photo, "Who is it?")])
    (example,) = ModelCard.load(folder / "README.md").data.to_dict()["widget"]
    assert example["src"] == "widget/1-photo.jpg"
    assert (folder / example["src"]).read_bytes() == photo.read_bytes()
    stored = EmmaForConditionalGeneration.from_pretrained(converted, dtype="auto").eval()
    assert example["output"]["text"] == answer(stored, processor, photo, "Who is it?")
    with pytest.raises(FileNotFoundError, match="example image .*nowhere.png is not there"):
        export(converted, tmp_path / "other", examples=[("nowhere.png", "Who?")])
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_exported_says_why(converted, tmp_path):
    def broken(name: str, change) -> Path:
        folder = shutil.copytree(converted, tmp_path / name)
        change(folder)
        return folder

    def cut(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def lead_outside(folder: Path) -> None:
        (tmp_path / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")

    def other_type(folder: Path) -> None:
        (folder / "config.json").write_text('{"model_type": "llava"}')

    def adapter(folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")

    def trained_lora(folder: Path) -> None:
        shutil.copytree(folder, folder.parent / "copy").rename(folder / "merged")
        for path in [*folder.glob("*.safetensors"), folder / "config.json"]:
            path.unlink()
        adapter(folder)

    cases = [
        (other_type, ValueError, "model_type 'emma'.*'llava'.*emma-hf convert"),
        (cut, ValueError, "truncated"),
        (lead_outside, ValueError, "is a link to .*secret.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, "no weights in safetensors"),
        (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, "lacks config.json"),
        (adapter, ValueError, r"holds an adapter \(adapter_config.json\). Merge it with `merge_and_unload` and save"),
        (trained_lora, ValueError, "holds an adapter .*Export .*/merged; `emma-hf train --stage lora` writes"),
        (lambda folder: (folder / "config.json").write_text("{"), ValueError, "is not JSON"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), FileNotFoundError, "processor.save_pretrained"),
        (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), ValueError, "must be YAML"),
    ]
    for number, (change, kind, message) in enumerate(cases):
        with pytest.raises(kind, match=message):
            export(broken(f"source{number}", change), tmp_path / "target")
        assert not (tmp_path / "target").exists()
    with pytest.raises(ValueError, match="must not exist"):
        export(converted, converted)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub id"):
        export("nowhere", tmp_path / "target")
    with pytest.raises(ValueError, match="must be the evaluation.json"):
        export(converted, tmp_path / "target", evaluation=converted / "config.json")


def test_a_card_takes_no_file_from_outside_its_folder(converted, tmp_path):
    source = shutil.copytree(converted, tmp_path / "source")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (source / "README.md").write_text(
        "---\nlicense: mit\n---\n# x\n![a](../secret.png)\n![b](own.png)\n![c](link.png)\n"
    )
    (source / "own.png").write_bytes(b"own")
    folder = export(source, tmp_path / "one")
    assert (folder / "own.png").exists()
    assert not (tmp_path / "one" / "secret.png").exists()
    assert ModelCard.load(folder / "README.md").data.license == "mit"
    (source / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="link.png is a link to .*secret.png"):
        export(source, tmp_path / "two")
