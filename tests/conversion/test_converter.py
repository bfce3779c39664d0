"""The converter: the authors' checkpoint in, a Hub folder out, and back, bit for bit; and what it refuses."""

import gzip
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import converted_from, edit, weights

from emma_hf import EmmaForConditionalGeneration, EmmaProcessor, HubError
from emma_hf.conversion import convert, reverse
from emma_hf.conversion.instruction_vocabulary import BPE_NAME
from emma_hf.model.code_files_emma import AUTO_MAP, HUB_FILES


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


# The way there


def test_every_weight_comes_from_where_the_authors_loader_takes_it(reference, converted):
    source, clip = weights(reference / "original"), weights(reference / "original" / "clip")
    fusion = torch.load(reference / "original" / "vision_tower.bin", weights_only=True)
    ours = weights(converted)
    expected = {
        "lm_head.weight": torch.cat([source["lm_head.weight"], torch.zeros(1, 48, dtype=torch.float16)]),
        "model.modality_adaptation.visual_alignment.weight": fusion["model.vision_tower.image_text_infusion.weight"],
        "model.modality_adaptation.visual_alignment.bias": fusion["model.vision_tower.image_text_infusion.bias"],
        "model.modality_adaptation.instruction_projection.weight": fusion["model.vision_tower.text_projection.weight"],
        "model.modality_adaptation.instruction_projection.bias": fusion["model.vision_tower.text_projection.bias"],
    }
    embedding = source["model.embed_tokens.weight"]
    mean = embedding.double().mean(0, keepdim=True).half()
    expected["model.language_model.embed_tokens.weight"] = torch.cat([embedding, mean])
    for index, name in ((0, "linear_1"), (2, "linear_2")):
        for kind in ("weight", "bias"):
            expected[f"model.multi_modal_projector.{name}.{kind}"] = source[f"model.mm_projector.{index}.{kind}"]
    for name, value in source.items():
        if name.startswith(("model.layers", "model.norm")):
            expected[name.replace("model.", "model.language_model.", 1)] = value
    for name, value in clip.items():
        if name.startswith("vision_model."):
            expected[f"model.vision_tower.{name}"] = value
        elif name.startswith("text_model."):
            expected[f"model.instruction_encoder.{name}"] = value
    assert equal(ours, expected)


def test_the_folder_is_complete(converted, reference):
    names = {path.name for path in converted.iterdir()}
    assert names >= {
        *HUB_FILES, "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
        "chat_template.jinja", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "instruction_tokenizer",
        "model.safetensors",
    }  # fmt: skip
    config = json.loads((converted / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == ["EmmaForConditionalGeneration"]
    assert config["image_token_index"] == 700
    assert config["text_config"]["vocab_size"] == 701
    assert config["instruction_feature_layer"] == -2
    assert not config["visual_offset"]
    assert config.get("dtype", config.get("torch_dtype")) == "float16"
    assert json.loads((converted / "generation_config.json").read_text())["suppress_tokens"] == [700]
    tokenizer = json.loads((converted / "tokenizer_config.json").read_text())
    assert tokenizer["legacy"] is False
    assert tokenizer["padding_side"] == "left"
    assert json.loads((converted / "preprocessor_config.json").read_text())["do_pad"] is True
    folder = str(reference.parent)
    for path in converted.rglob("*.json"):
        assert folder not in path.read_text(), path
        assert str(converted) not in path.read_text(), path


def test_shards_and_dtype(authors, tmp_path, converted):
    output = converted_from(authors, tmp_path / "out", max_shard_size="300KB", dtype="bfloat16")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    tensors = weights(output)
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(value.numel() * 2 for value in tensors.values())
    shards = sorted(output.glob("model-*.safetensors"))
    assert len(shards) > 2
    largest = max(value.numel() * 2 for value in tensors.values())
    assert all(path.stat().st_size < max(300_000, largest) + 20_000 for path in shards)
    for name, value in weights(converted).items():
        assert torch.equal(tensors[name], value.to(torch.bfloat16)), name
    EmmaForConditionalGeneration.from_pretrained(output)


@pytest.mark.parametrize(
    ("changes", "ours"),
    [
        ({"mm_text_select_feature": "cls"}, {"instruction_feature_select_strategy": "cls"}),
        ({"mm_text_select_feature": "patch"}, {"instruction_feature_select_strategy": "patch"}),
        ({"mm_text_select_layer": -1, "mm_vision_select_layer": -3}, {"vision_feature_layer": -3}),
        ({"encoder_version": "v3"}, {"visual_offset": True}),
        ({"image_aspect_ratio": None}, {}),
    ],
)
def test_variants(authors, tmp_path, changes, ours):
    edit(authors / "config.json", **changes)
    fusion = torch.load(authors / "vision_tower.bin", weights_only=True)
    kept = {"cls": 1, "patch": 76}.get(changes.get("mm_text_select_feature"), 77)
    name = "model.vision_tower.image_text_infusion.weight"
    fusion[name] = fusion[name][:, : 16 + kept].clone()
    # The authors' loader reads its names with and without their prefix.
    fusion = {key.removeprefix("model.vision_tower."): value for key, value in fusion.items()}
    if "encoder_version" in changes:
        fusion["learnable_tokens"] = torch.randn(16, 32)
    torch.save(fusion, authors / "vision_tower.bin")
    model = EmmaForConditionalGeneration.from_pretrained(converted_from(authors, tmp_path / "out"), dtype=torch.float32)
    for key, value in ours.items():
        assert getattr(model.config, key) == value
    adaptation = model.model.modality_adaptation
    assert torch.equal(adaptation.visual_alignment.weight, fusion["image_text_infusion.weight"])
    if "encoder_version" in changes:
        assert torch.equal(adaptation.visual_offset, fusion["learnable_tokens"])
    if "image_aspect_ratio" in changes:
        assert not EmmaProcessor.from_pretrained(tmp_path / "out").image_processor.do_pad


def test_pickled_weights_are_read_as_tensors_alone(authors, tmp_path, converted):
    torch.save(weights(authors), authors / "pytorch_model.bin")
    for path in authors.glob("model*"):
        path.unlink()
    torch.save(weights(authors / "clip"), authors / "clip" / "pytorch_model.bin")
    (authors / "clip" / "model.safetensors").unlink()
    assert equal(weights(converted_from(authors, tmp_path / "out")), weights(converted))


def test_tied_heads(authors, tmp_path):
    edit(authors / "config.json", tie_word_embeddings=True)
    output = converted_from(authors, tmp_path / "out")
    assert "lm_head.weight" not in weights(output)
    model = EmmaForConditionalGeneration.from_pretrained(output)
    assert model.lm_head.weight is model.get_input_embeddings().weight


# The way back


def test_authors_to_package_to_authors_is_bit_exact(reference, converted, tmp_path):
    back = reverse(converted, tmp_path / "back", progress=False)
    original = {name: value for name, value in weights(reference / "original").items() if "vision_tower" not in name}
    assert equal(weights(back), original)
    clip = weights(reference / "original" / "clip")
    used = {name: value for name, value in clip.items() if name.startswith(("vision_model.", "text_model."))}
    assert equal(weights(back / "clip"), used)
    fusion = torch.load(reference / "original" / "vision_tower.bin", weights_only=True)
    assert equal(torch.load(back / "vision_tower.bin", weights_only=True), fusion)
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (reference / "original", back))
    # The keys that the released config lacks are written out; all others that both have agree.
    assert all(theirs[key] == ours[key] for key in theirs.keys() & ours.keys())
    assert ours["encoder_version"] == "v1"
    assert ours["mm_text_select_feature"] == "cls_patch"
    merges = [
        gzip.decompress((folder / BPE_NAME).read_bytes()).decode().split("\n")
        for folder in (reference / "original", back)
    ]
    assert merges[0][1:48895] == merges[1][1:48895]
    for name in ("tokenizer.model",):
        assert (back / name).read_bytes() == (reference / "original" / name).read_bytes()


def test_package_to_authors_to_package_is_bit_exact(converted, tmp_path):
    back = reverse(converted, tmp_path / "back", max_shard_size="300KB", progress=False)
    # CLIP is found in the folder.
    again = convert(back, tmp_path / "again", progress=False)
    assert equal(weights(again), weights(converted))
    for path in sorted(converted.rglob("*")):
        if path.is_file() and path.suffix != ".safetensors":
            assert path.read_bytes() == (again / path.relative_to(converted)).read_bytes(), path.name


def test_what_transformers_saved_converts_back_too(converted, model, tmp_path, processor):
    model.save_pretrained(tmp_path / "saved", max_shard_size="400KB")
    processor.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.model").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=r"reads tokenizer\.model, which .* lacks"):
        reverse(tmp_path / "saved", tmp_path / "back", progress=False)
    shutil.copy(converted / "tokenizer.model", tmp_path / "saved")
    back = reverse(tmp_path / "saved", tmp_path / "back", dtype="float16", progress=False)
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "float16"
    assert equal(weights(back), weights(reverse(converted, tmp_path / "other", progress=False)))


# What is refused


def change_weights(path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


class Code:
    def __reduce__(self):
        return (print, ("this must never run",))


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "unknown weight": (
        lambda f: change_weights(f / "clip/model.safetensors", lambda t: t.update(strange=torch.zeros(1))),
        ValueError, r"a weight that no key table knows: 'strange'",
    ),
    "missing weight": (
        lambda f: change_weights(f / "clip/model.safetensors", lambda t: t.pop("vision_model.pre_layrnorm.bias")),
        ValueError, r"lacks 1 weights of the model, first 'model\.vision_tower\.vision_model\.pre_layrnorm\.bias'",
    ),
    "weight of another layer": (
        lambda f: change_weights(f / "clip/model.safetensors", lambda t: t.update({"vision_model.x": torch.zeros(1)})),
        ValueError, r"holds 1 weights that the model has not, first 'model\.vision_tower\.vision_model\.x'",
    ),
    "missing shard": (
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        FileNotFoundError, r"names the shard 'model-00002-of-00002\.safetensors', which .* lacks",
    ),
    "truncated shard": (
        lambda f: truncate(f / "model-00002-of-00002.safetensors"),
        ValueError, r"model-00002-of-00002\.safetensors is truncated: its header speaks of",
    ),
    "headless shard": (
        lambda f: (f / "model-00002-of-00002.safetensors").write_bytes(b"\xff" * 20),
        ValueError, "is truncated: 20 bytes do not hold its header",
    ),
    "index without tensor": (
        lambda f: edit(
            f / "model.safetensors.index.json", weight_map={"model.norm.weight": "model-00002-of-00002.safetensors"}
        ) or change_weights(f / "model-00002-of-00002.safetensors", lambda t: t.pop("model.norm.weight", None)),
        ValueError, r"names 1 tensors that its shards lack, first 'model\.norm\.weight'",
    ),
    "code in the pickle": (
        lambda f: (f / "vision_tower.bin").write_bytes(pickle.dumps({"text_projection.weight": Code()})),
        ValueError, r"vision_tower\.bin cannot be read as tensors alone, and nothing else in it is run",
    ),
    "no fusion weights": (
        lambda f: (f / "vision_tower.bin").unlink(), FileNotFoundError, r"lacks vision_tower\.bin",
    ),
    "v2": (lambda f: edit(f / "config.json", encoder_version="v2"), ValueError, "v2 cannot run in the authors' own code"),
    "v9": (lambda f: edit(f / "config.json", encoder_version="v9"), ValueError, "must be v1 or v3: got 'v9'"),
    "another feature": (
        lambda f: edit(f / "config.json", mm_text_select_feature="all"),
        ValueError, r"`mm_text_select_feature` must be one of \['cls', 'cls_patch', 'patch'\]: got 'all'",
    ),
    "another projector": (
        lambda f: edit(f / "config.json", mm_projector_type="linear"), ValueError, "must be 'mlp2x_gelu': got 'linear'",
    ),
    "another model": (
        lambda f: edit(f / "config.json", model_type="bert"), ValueError, "got 'bert'. Is SOURCE a checkpoint of",
    ),
    "shapes that disagree": (
        lambda f: edit(f / "config.json", mm_text_select_feature="cls"),
        ValueError, r"visual_alignment\.weight' has shape \(16, 17\), in the file \(16, 93\)",
    ),
    "config that is no JSON": (
        lambda f: (f / "config.json").write_text("{"), ValueError, r"config\.json is not JSON",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"config\.json is missing"),
    "no tokenizer": (
        lambda f: (f / "tokenizer_config.json").unlink(), FileNotFoundError, r"lacks tokenizer_config\.json",
    ),
    "no vocabulary": (
        lambda f: (f / BPE_NAME).unlink(), FileNotFoundError, "holds no instruction vocabulary: expected bpe_simple",
    ),
    "a damaged vocabulary": (
        lambda f: truncate(f / BPE_NAME), ValueError, "is not a readable vocabulary",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_nothing_is_left_behind(authors, tmp_path, name, capsys):
    damage, error, message = DAMAGE[name]
    damage(authors)
    before = set(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        converted_from(authors, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before
    assert "this must never run" not in capsys.readouterr().out


def test_wrong_arguments_are_named(authors, tmp_path, converted):
    (tmp_path / "there").mkdir()
    for function in (lambda o: converted_from(authors, o), lambda o: reverse(converted, o, progress=False)):
        with pytest.raises(ValueError, match="OUTPUT must not exist yet: .*there does"):
            function(tmp_path / "there")
    with pytest.raises(FileNotFoundError, match="is neither a folder nor a Hub id"):
        convert(tmp_path / "none", tmp_path / "out", progress=False)
    with pytest.raises(HubError, match="The Hub cannot be reached to read no-such/model"):
        convert("no-such/model", tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="`dtype` must be float32, float16 or bfloat16: got 'int8'"):
        converted_from(authors, tmp_path / "out", dtype="int8")
    with pytest.raises(ValueError, match="must be positive, such as 5GB or 256MB: got 'much'"):
        converted_from(authors, tmp_path / "out", max_shard_size="much")
    with pytest.raises(ValueError, match="is a model of this package already. The other direction is `--reverse`"):
        convert(converted, tmp_path / "out")
    with pytest.raises(ValueError, match=r"starts from a model of this package .*'llava_llama'"):
        reverse(authors, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="must be a checkpoint of model_type 'clip'"):
        convert(authors, tmp_path / "out", clip=authors, progress=False)


def test_an_interrupt_leaves_nothing_behind(authors, tmp_path, monkeypatch):
    from emma_hf.conversion import converter as conversion

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "write_shards", interrupted)
    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        converted_from(authors, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before
