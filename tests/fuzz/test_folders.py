"""Damaged folders: each command that reads one does its work, or says in one kind of error what is wrong."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from support.fuzzing import JSON, damage_bytes, damage_json, fuzz
from support.models import tiny_inputs

from emma_hf import EmmaError
from emma_hf.conversion import convert, reverse
from emma_hf.hub import check, export
from emma_hf.hub.manifest import MANIFEST_NAME, files_of
from emma_hf.inference.loading import load_model
from emma_hf.storage.tensors import MemoryTensor, read_checkpoint, read_safetensors, write_safetensors

# What the command line shows as one line.
REFUSALS = (EmmaError, OSError)
SEEDS = st.integers(0, 2**32)


def copy_damaged(source: Path, target: Path, chance: random.Random, junk, names: list[str] | None = None) -> str:
    """A copy of a folder (links to its files) in which one file is damaged, and that file's name."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=os.link)
    name = chance.choice(names or [name for name in files_of(source) if not name.endswith(".py")])
    data = (source / name).read_bytes()
    kind = chance.random()
    if kind < 0.05:
        data = None
    elif kind < 0.15:
        data = (source / chance.choice(files_of(source))).read_bytes()
    elif name.endswith(".json") and kind < 0.75:
        values = json.loads(data)
        data = json.dumps(damage_json(values, chance, junk) if kind < 0.7 else junk).encode()
    elif name.endswith(".safetensors") and kind < 0.5:
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(damage_json(json.loads(data[8 : 8 + length]), chance, junk)).encode()
        data = len(header).to_bytes(8, "little") + header + data[8 + length :]
    else:
        data = damage_bytes(data, chance)
    (target / name).unlink()
    if data is not None:
        (target / name).write_bytes(data)
    return name


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@fuzz(20)
@given(SEEDS, JSON)
def test_a_damaged_model_loads_or_is_refused(converted, scratch, seed, junk):
    name = copy_damaged(converted, scratch / "model", random.Random(seed), junk)
    try:
        model, processor = load_model(scratch / "model", "cpu")
    except REFUSALS as error:
        assert str(error).strip(), name
        return
    # What loads, runs: one picture, one question.
    config = model.config
    with torch.inference_mode():
        assert model(**tiny_inputs(model, (1,))).logits.shape[-1] == config.text_config.vocab_size
    assert processor(text="Hi")["input_ids"]


@fuzz(15)
@given(SEEDS, JSON)
def test_a_damaged_checkpoint_of_the_authors_is_converted_or_refused(reference, scratch, seed, junk):
    source, output = scratch / "authors", scratch / "converted"
    shutil.rmtree(output, ignore_errors=True)
    name = copy_damaged(reference / "original", source, random.Random(seed), junk)
    try:
        convert(source, output, clip=source / "clip", progress=False)
    except REFUSALS as error:
        assert str(error).strip(), name
        assert not output.exists()
        return
    # What was converted is complete.
    assert load_model(output, "cpu")


@fuzz(15)
@given(SEEDS, JSON)
def test_a_damaged_model_is_reversed_or_refused(converted, scratch, seed, junk):
    source, output = scratch / "model", scratch / "reversed"
    shutil.rmtree(output, ignore_errors=True)
    name = copy_damaged(converted, source, random.Random(seed), junk)
    try:
        reverse(source, output, progress=False)
    except REFUSALS as error:
        assert str(error).strip(), name
        assert not output.exists()
        return
    assert read_checkpoint(output)
    assert json.loads((output / "config.json").read_text())["model_type"] == "llava_llama"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, converted) -> Path:
    return export(converted, tmp_path_factory.mktemp("exported") / "model", repo_id="org/model", examples=[])


@fuzz(30)
@given(SEEDS, JSON)
def test_the_check_finds_every_damage(exported, scratch, unasked, seed, junk):
    folder = scratch / "exported"
    names = files_of(exported)
    name = copy_damaged(exported, folder, random.Random(seed), junk, names)
    is_damaged = not (folder / name).exists() or (folder / name).read_bytes() != (exported / name).read_bytes()
    report = check(folder)
    wrong = [row.name for row in report.failures]
    if name != MANIFEST_NAME:
        assert (name in wrong) == is_damaged
    if name.endswith(".py") and is_damaged and (folder / name).exists():
        assert "answer" in wrong
    for row in report.rows:
        assert "\n" not in row.found


@pytest.fixture(scope="module")
def unasked():
    """No process is started: what it says is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emma_hf.hub.verification._check_answer", lambda *_: None)
        yield


@fuzz(150)
@given(SEEDS, JSON)
def test_a_damaged_weight_file_is_read_or_refused(scratch, seed, junk):
    source, path = scratch / "weights", scratch / "damaged" / "model.safetensors"
    source.mkdir(exist_ok=True)
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int8), "c": torch.zeros(0)}
    if not (source / "model.safetensors").exists():
        write_safetensors(source / "model.safetensors", {name: MemoryTensor(value) for name, value in tensors.items()})
    copy_damaged(source, path.parent, random.Random(seed), junk)
    if not path.exists():
        return
    try:
        found = {name: tensor.load() for name, tensor in read_safetensors(path).items()}
    except REFUSALS as error:
        assert str(path) in str(error)
        return
    # Another reader of the same file reads the same, or refuses more.
    try:
        expected = load_file(path)
    except SafetensorError:
        return
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes()
