"""The authors' config and ours: what each value becomes, and what the way back writes."""

import json

import pytest
from support.checkpoints import edit
from transformers import CLIPConfig, LlamaConfig, MistralConfig, Qwen2Config

from emma_hf import EmmaConfig, EmmaError
from emma_hf.conversion.authors_config import (
    clip_config_values,
    clip_preprocessor_values,
    config_from_authors,
    config_to_authors,
    read_clip_config,
)


@pytest.fixture
def values(reference) -> dict:
    return json.loads((reference / "original" / "config.json").read_text())


@pytest.fixture
def clip(reference) -> CLIPConfig:
    return read_clip_config(reference / "original" / "clip")


@pytest.fixture
def folder(converted, tmp_path):
    """The files of a converted model that `config_to_authors` reads."""
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((converted / name).read_bytes())
    return tmp_path


LAYERS = {"mm_text_select_layer": "instruction_feature_layer", "mm_vision_select_layer": "vision_feature_layer"}


@pytest.mark.parametrize(("theirs", "ours"), LAYERS.items())
@pytest.mark.parametrize("layer", [0, 1, -1, -3])
def test_every_layer_is_kept_both_ways(values, clip, folder, theirs, ours, layer):
    config = config_from_authors({**values, theirs: layer}, clip)
    assert getattr(config, ours) == layer
    assert config_to_authors(config, folder)[theirs] == layer


def test_a_missing_or_empty_value_is_that_of_the_released_model(values, clip):
    keys = (*LAYERS, "mm_vision_select_feature", "mm_text_select_feature", "encoder_version")
    for empty in ({key: value for key, value in values.items() if key not in keys}, {**values, **dict.fromkeys(keys)}):
        config = config_from_authors(empty, clip)
        assert (config.vision_feature_layer, config.instruction_feature_layer) == (-2, -2)
        assert config.vision_feature_select_strategy == "default"
        assert config.instruction_feature_select_strategy == "full"
        assert config.visual_offset is False


def test_a_text_value_that_is_null_is_the_default(values, clip):
    keys = ("tie_word_embeddings", "rope_scaling", "num_key_value_heads", "pad_token_id", "attention_bias")
    config = config_from_authors({**values, **dict.fromkeys(keys)}, clip).text_config
    assert config.tie_word_embeddings is False
    assert config.num_key_value_heads == values["num_attention_heads"]
    assert config.pad_token_id is None


def test_mistral_without_a_window_stays_without(values, clip, folder):
    values = {**values, "model_type": "llava_mistral"}
    without = config_from_authors({**values, "sliding_window": None}, clip)
    assert without.text_config.sliding_window is None
    assert config_to_authors(without, folder)["sliding_window"] is None
    assert config_from_authors({**values, "sliding_window": 512}, clip).text_config.sliding_window == 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_use_im_start_end": True}, "`mm_use_im_start_end` must be false: got true"),
        ({"image_aspect_ratio": "anyres"}, "must be 'pad', 'square' or null: got 'anyres'"),
        ({"mm_projector_type": "linear"}, "must be 'mlp2x_gelu': got 'linear'"),
    ],
)
def test_what_the_model_would_answer_otherwise_with_is_refused(values, clip, changes, message):
    with pytest.raises(EmmaError, match=message):
        config_from_authors({**values, **changes}, clip)


def test_another_activation_of_the_projector_does_not_go_back(values, clip, folder):
    config = config_from_authors(values, clip)
    config.projector_hidden_act = "gelu_new"
    with pytest.raises(EmmaError, match="has the activation 'gelu': got `projector_hidden_act` 'gelu_new'"):
        config_to_authors(config, folder)


@pytest.mark.parametrize(("do_pad", "ratio"), [(True, "pad"), (False, None)])
def test_images_are_padded_in_the_authors_code_as_here(converted, folder, do_pad, ratio):
    edit(folder / "preprocessor_config.json", do_pad=do_pad)
    config = EmmaConfig.from_pretrained(converted)
    assert config_to_authors(config, folder)["image_aspect_ratio"] == ratio


def test_an_image_processor_that_does_not_say_pads(converted, folder):
    edit(folder / "preprocessor_config.json", do_pad=...)
    assert config_to_authors(EmmaConfig.from_pretrained(converted), folder)["image_aspect_ratio"] == "pad"


def test_fewer_visual_tokens_do_not_go_back(values, clip, folder):
    config = config_from_authors(values, clip)
    config.visual_tokens = 8
    with pytest.raises(EmmaError, match="got `visual_tokens` 8. Remove it and `image_seq_length` from"):
        config_to_authors(config, folder)


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("llava_llama", LlamaConfig), ("llava_mistral", MistralConfig), ("llava_qwen2", Qwen2Config),
        ("llava_qwen", Qwen2Config),
    ],
)  # fmt: skip
def test_language_models(values, clip, folder, model_type, kind):
    config = config_from_authors({**values, "model_type": model_type}, clip)
    assert type(config.text_config) is kind
    assert config.text_config.vocab_size == values["vocab_size"] + 1
    back = config_to_authors(config, folder)
    assert back["model_type"] == model_type.replace("qwen2", "qwen").replace("qwen", "qwen2")
    assert back["vocab_size"] == values["vocab_size"]


def test_another_language_model_is_refused(values, clip, folder):
    with pytest.raises(EmmaError, match=r"must have a model_type of \['llava_llama', .*: got 'bert'\. Is SOURCE"):
        config_from_authors({**values, "model_type": "bert"}, clip)
    config = config_from_authors(values, clip)
    config.text_config.model_type = "gemma"
    with pytest.raises(EmmaError, match=r"knows the language models \['llama', 'mistral', 'qwen2'\]: got 'gemma'"):
        config_to_authors(config, folder)


def test_rope_values_are_kept_both_ways(values, clip, folder):
    scaling = {"rope_type": "linear", "factor": 2.0}
    back = config_to_authors(
        config_from_authors({**values, "rope_theta": 5e5, "rope_scaling": {**scaling}}, clip), folder
    )
    assert back["rope_theta"] == 5e5
    assert {key: back["rope_scaling"][key] for key in scaling} == scaling
    back = config_to_authors(config_from_authors(values, clip), folder)
    assert (back["rope_theta"], back["rope_scaling"]) == (1e4, None)


def test_clips_files(converted, reference):
    original = reference / "original" / "clip"
    config = EmmaConfig.from_pretrained(converted)
    again = CLIPConfig.from_dict(clip_config_values(config))
    theirs = read_clip_config(original)
    assert again.vision_config.to_dict() == theirs.vision_config.to_dict()
    assert again.text_config.to_dict() == theirs.text_config.to_dict()
    expected = json.loads((original / "preprocessor_config.json").read_text())
    written = clip_preprocessor_values(converted)
    assert written["image_processor_type"] == "CLIPImageProcessor"
    for name in ("image_mean", "image_std", "resample"):
        assert written[name] == expected[name]
    with pytest.raises(EmmaError, match="must be a checkpoint of model_type 'clip': .* has 'llava_llama'"):
        read_clip_config(reference / "original")
