"""What the authors' training script saves besides complete models: whole towers, stage 1, LoRA, and their base model."""

import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import converted_from, edit, split_off_lora, split_off_stage_one, weights, whole_tower

from emma_hf import EmmaError, EmmaForConditionalGeneration, EmmaProcessor


@pytest.fixture
def parts(authors, tmp_path):
    """A stage-1 folder and its base model, which together are the authors' checkpoint."""
    split_off_stage_one(authors, tmp_path / "stage-1", tmp_path / "base")
    return tmp_path / "stage-1", tmp_path / "base"


def assert_equal(folder, expected) -> None:
    found, expected = weights(folder), expected if isinstance(expected, dict) else weights(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def test_the_towers_in_a_state_dict_of_the_whole_tower_are_not_read(authors, tmp_path, converted):
    tower = whole_tower(authors)
    assert {name.split(".")[0] for name in tower} == {
        "vision_tower", "text_encoder", "text_projection", "image_text_infusion",
    }  # fmt: skip
    torch.save(tower, authors / "vision_tower.bin")
    assert_equal(converted_from(authors, tmp_path / "out"), converted)


def test_stage_one_and_its_base_are_the_complete_checkpoint(parts, tmp_path, converted):
    source, base = parts
    output = converted_from(source, tmp_path / "out", base=base)
    assert_equal(output, converted)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "config.json", "processor_config.json"):
        assert (output / name).read_bytes() == (converted / name).read_bytes(), name


def test_a_base_in_the_authors_layout_gives_its_language_model_alone(parts, authors, tmp_path, converted):
    source, _ = parts
    for path in authors.glob("model-*"):
        tensors = load_file(path)
        tensors = {name: value * 3 if "mm_projector" in name else value for name, value in tensors.items()}
        save_file(tensors, path, metadata={"format": "pt"})
    assert_equal(converted_from(source, tmp_path / "out", base=authors), converted)


def test_the_length_of_training_and_a_padding_token_are_added_to_a_base_tokenizer(parts, tmp_path):
    source, base = parts
    edit(base / "tokenizer_config.json", model_max_length=10**30, pad_token=...)
    edit(base / "special_tokens_map.json", pad_token=...)
    tokenizer = EmmaProcessor.from_pretrained(converted_from(source, tmp_path / "out", base=base)).tokenizer
    assert tokenizer.model_max_length == 400
    assert tokenizer.pad_token == "<unk>"


LORA = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True},
    "another rank for a layer": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}},
}


@pytest.mark.parametrize("name", LORA)
def test_an_adapter_is_merged_as_peft_merges_it(authors, tmp_path, name):
    merged = split_off_lora(authors, tmp_path / "lora", tmp_path / "base", **LORA[name])
    base = load_file(tmp_path / "base" / "model.safetensors")
    save_file({key: value.float() for key, value in base.items()}, tmp_path / "base" / "model.safetensors")
    output = converted_from(tmp_path / "lora", tmp_path / "out", base=tmp_path / "base")
    found, changed = weights(output), 0
    for key, value in merged.state_dict().items():
        ours = found[key.replace("model.", "model.language_model.", 1)]
        # The rows of `<image>` are ours.
        torch.testing.assert_close(ours[: len(value)], value, rtol=0, atol=1e-7)
        changed += not torch.equal(value, base[key].float())
    assert changed == 3 * 7
    model = EmmaForConditionalGeneration.from_pretrained(output, dtype=torch.float32).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected, logits = merged(ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(logits[..., :700], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_a_merged_weight_is_rounded_once(authors, tmp_path, converted, dtype):
    split_off_lora(authors, tmp_path / "lora", tmp_path / "base")
    output = converted_from(tmp_path / "lora", tmp_path / "out", base=tmp_path / "base", dtype=dtype)
    base, adapter = weights(tmp_path / "base"), weights(tmp_path / "lora")
    expected = {name: value.to(getattr(torch, dtype or "float16")) for name, value in weights(converted).items()}
    if dtype is None:
        expected = weights(converted)
    for name, up in adapter.items():
        if "lora_B" in name:
            down = adapter[name.replace("lora_B", "lora_A")]
            key = name.removeprefix("base_model.model.").replace(".lora_B", "")
            exact = base[key].float() + (up @ down) * 1.5
            expected[key.replace("model.", "model.language_model.", 1)] = exact.to(getattr(torch, dtype or "float16"))
    assert_equal(output, expected)


@pytest.mark.parametrize("file", ["vision_tower.bin", "non_lora_trainables.bin"])
def test_either_file_of_a_lora_folder_can_hold_the_fusion_weights(authors, tmp_path, file):
    split_off_lora(authors, tmp_path / "lora", tmp_path / "base")
    expected = weights(converted_from(tmp_path / "lora", tmp_path / "both", base=tmp_path / "base"))
    if file == "vision_tower.bin":
        path = tmp_path / "lora" / "non_lora_trainables.bin"
        trained = torch.load(path, weights_only=True)
        torch.save({name: value for name, value in trained.items() if "vision_tower" not in name}, path)
    else:
        # As ZeRO-3 leaves it.
        tower = whole_tower(authors)
        torch.save({name: torch.empty(0) for name in tower}, tmp_path / "lora" / "vision_tower.bin")
    assert_equal(converted_from(tmp_path / "lora", tmp_path / "out", base=tmp_path / "base"), expected)


def test_an_adapter_in_a_pickle_and_modules_saved_beside_it(authors, tmp_path):
    split_off_lora(authors, tmp_path / "lora", tmp_path / "base")
    expected = weights(converted_from(tmp_path / "lora", tmp_path / "first", base=tmp_path / "base"))
    path = tmp_path / "lora" / "adapter_model.safetensors"
    head = torch.randn(700, 48, dtype=torch.float16)
    adapter = {name.replace(".weight", ".default.weight"): value for name, value in load_file(path).items()}
    torch.save({**adapter, "base_model.model.lm_head.weight": head}, path.with_suffix(".bin"))
    path.unlink()
    expected["lm_head.weight"] = torch.cat([head, torch.zeros(1, 48, dtype=torch.float16)])
    assert_equal(converted_from(tmp_path / "lora", tmp_path / "out", base=tmp_path / "base"), expected)


def test_what_is_missing_is_named_with_the_command(parts, authors, tmp_path):
    source, base = parts
    message = (
        r"stage-1 holds what stage 1 trains \(mm_projector\.bin\) and no language model\. Name the one that it was "
        r"trained from: `emma-hf convert --base BASE .*stage-1 OUTPUT`, where BASE is a folder or Hub id "
        r"\('\./checkpoints/emma-tiny', as the folder says\)\."
    )
    with pytest.raises(EmmaError, match=message):
        converted_from(source, tmp_path / "out")
    shutil.rmtree(base)
    shutil.rmtree(tmp_path / "stage-1")
    split_off_lora(authors, tmp_path / "lora", base)
    edit(tmp_path / "lora" / "adapter_config.json", base_model_name_or_path="lmsys/vicuna-7b-v1.5")
    with pytest.raises(EmmaError, match=r"a LoRA adapter .* no language model.*\('lmsys/vicuna-7b-v1\.5', as the"):
        converted_from(tmp_path / "lora", tmp_path / "out")
    with pytest.raises(EmmaError, match="`--base` completes a stage-1 or LoRA folder: .*authors holds a complete"):
        converted_from(authors, tmp_path / "out", base=base)


def change_adapter(folder, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGE = {
    "dora": (lambda f, b: edit(f / "adapter_config.json", use_dora=True), "use_dora=True is not merged here.*PEFT's"),
    "pissa": (
        lambda f, b: edit(f / "adapter_config.json", init_lora_weights="pissa"), "init_lora_weights='pissa' is not",
    ),
    "ia3": (lambda f, b: edit(f / "adapter_config.json", peft_type="IA3"), "peft_type='IA3' is not merged here"),
    "alpha": (lambda f, b: edit(f / "adapter_config.json", lora_alpha="x"), "`lora_alpha` must be a number: got 'x'"),
    "no weights": (
        lambda f, b: (f / "adapter_model.safetensors").unlink(),
        r"lacks the adapter's weights: expected adapter_model\.safetensors or adapter_model\.bin",
    ),
    "half a pair": (
        lambda f, b: change_adapter(f, lambda t: t.pop(f"{Q}.lora_B.weight")),
        r"must hold lora_A and lora_B of weights that the base model has: see 'model\.layers\.0\.self_attn\.q_proj",
    ),
    "a layer that the base lacks": (
        lambda f, b: change_adapter(
            f, lambda t: t.update({f"{Q[:-1]}.lora_{x}.weight": torch.ones(48, 48) for x in "AB"})
        ),
        "must hold lora_A and lora_B of weights that the base model has",
    ),
    "another width": (
        lambda f, b: change_adapter(f, lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 40)})),
        r"does not fit the base model: .* has the shape \(48, 48\), its lora_B and lora_A \(48, 4\) and \(4, 40\)",
    ),
    "a stranger's weight": (
        lambda f, b: change_adapter(f, lambda t: t.update({"strange": torch.ones(1)})), "no key table knows: 'strange'",
    ),
    "a vector of DoRA": (
        lambda f, b: change_adapter(f, lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(1)})),
        r"holds 1 weights that the model has not, first .*lora_magnitude_vector",
    ),
    "another architecture": (
        lambda f, b: edit(b / "config.json", model_type="mistral"),
        "`--base` must be a language model of type 'llama'.*base has the model_type 'mistral'",
    ),
    "a model of this package": (lambda f, b: edit(b / "config.json", model_type="emma"), "has the model_type 'emma'"),
    "another vocabulary": (
        lambda f, b: edit(f / "config.json", vocab_size=650), r"shape \(651, 48\), in the file \(701, 48\)",
    ),
    "code in the pickle": (
        lambda f, b: (f / "non_lora_trainables.bin").write_bytes(pickle.dumps({"x": print})),
        r"non_lora_trainables\.bin cannot be read as tensors alone, and nothing else in it is run",
    ),
    "no fusion weights": (
        lambda f, b: [torch.save({}, f / "non_lora_trainables.bin"), (f / "vision_tower.bin").unlink()],
        r"lacks vision_tower\.bin, which holds the trained fusion weights",
    ),
    "no projector": (
        lambda f, b: (f / "non_lora_trainables.bin").unlink(), r"lacks 4 weights .*multi_modal_projector\.linear_1",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def lora(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    split_off_lora(reference / "original", folder / "lora", folder / "base")
    return folder


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_nothing_is_left_behind(lora, tmp_path, name):
    damage, message = DAMAGE[name]
    source, base = (shutil.copytree(lora / part, tmp_path / part) for part in ("lora", "base"))
    damage(source, base)
    before = set(tmp_path.iterdir())
    with pytest.raises((EmmaError, FileNotFoundError), match=message):
        converted_from(source, tmp_path / "out", base=base)
    assert set(tmp_path.iterdir()) == before
