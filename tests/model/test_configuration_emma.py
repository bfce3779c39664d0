"""The configuration: the released geometry, derived values, and what it refuses."""

import json
import logging

import pytest
import transformers
from support.models import INSTRUCTION, VISION, tiny_config
from transformers import AutoConfig

from emma_hf import EmmaConfig, EmmaError, EmmaForConditionalGeneration, EmmaImageProcessor
from emma_hf.model.code_files_emma import AUTO_MAP, HUB_FILES
from emma_hf.model.compat_emma import TRANSFORMERS_5, text_config_from_dict


def test_the_default_is_the_released_7b_model():
    config = EmmaConfig()
    assert (config.image_token_index, config.image_token_id, config.image_seq_length) == (32000, 32000, 576)
    assert (config.instruction_length, config.instruction_seq_length) == (77, 77)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert (config.instruction_feature_layer, config.instruction_feature_select_strategy) == (-2, "full")
    assert (config.visual_offset, config.projector_hidden_act, config.fusion_implementation) == (False, "gelu", "eager")
    text, vision, instruction = config.text_config, config.vision_config, config.instruction_config
    assert (text.model_type, text.vocab_size, text.hidden_size, text.intermediate_size) == (
        "llama",
        32001,
        4096,
        11008,
    )
    assert (text.num_hidden_layers, text.num_attention_heads, text.max_position_embeddings) == (32, 32, 4096)
    assert text.rms_norm_eps == 1e-5
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (1024, 4096, 24)
    assert (vision.num_attention_heads, vision.image_size, vision.patch_size) == (16, 336, 14)
    assert (instruction.hidden_size, instruction.intermediate_size, instruction.num_hidden_layers) == (768, 3072, 12)
    assert (instruction.num_attention_heads, instruction.vocab_size) == (12, 49408)
    assert instruction.max_position_embeddings == 77


def test_a_save_keeps_every_value_and_brings_the_code(tmp_path):
    config = tiny_config(
        text={"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
        visual_offset=True,
        instruction_feature_select_strategy="cls",
    )
    config.save_pretrained(tmp_path)
    again = EmmaConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.tie_word_embeddings
    assert again.text_config.model_type == "qwen2"
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", *HUB_FILES}


def test_each_part_of_a_saved_config_is_read_by_its_class(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    read = {
        name: part.from_pretrained(tmp_path) for name, part in EmmaConfig.sub_configs.items() if name != "text_config"
    }
    assert read["vision_config"].to_dict() == EmmaConfig.from_pretrained(tmp_path).vision_config.to_dict()
    instruction = read["instruction_config"]
    assert instruction.to_dict() == EmmaConfig.from_pretrained(tmp_path).instruction_config.to_dict()
    assert (instruction.model_type, instruction.hidden_size, instruction.vocab_size) == ("clip_text_model", 16, 99)


def test_a_prefixed_auto_map_does_not_survive():
    config = tiny_config(auto_map={"AutoConfig": "org/name--configuration_emma.EmmaConfig"})
    assert config.to_dict()["auto_map"] == AUTO_MAP


def test_values_can_be_named_either_way():
    config = tiny_config(image_token_id=5)
    assert config.image_token_index == 5
    config.image_token_id = 6
    assert config.image_token_index == 6


def test_what_5_saves_of_rotary_embeddings_is_read_by_4_57():
    values = {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    config = EmmaConfig(text_config=values).text_config
    if TRANSFORMERS_5:
        assert config.rope_parameters["rope_theta"] == 5e5
        assert config.rope_parameters["factor"] == 2.0
    else:
        assert config.rope_theta == 5e5
        assert config.rope_scaling["factor"] == 2.0
    assert "rope_parameters" in values
    default = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    expected = default if TRANSFORMERS_5 else {"rope_theta": 5e5, "rope_scaling": None}
    assert text_config_from_dict(default) == expected


def test_4_57_reads_rotary_embeddings_by_kind_of_layer_and_of_a_share():
    """As configs of these versions name them; models saved by 5.24 gave the same logits on 4.57.6."""
    plain = {"rope_theta": 2e4, "rope_type": "default"}
    scaled = {"rope_theta": 7e5, "rope_type": "linear", "factor": 8.0}
    part = {"rope_theta": 3e3, "rope_type": "default", "partial_rotary_factor": 0.5}
    both = {"sliding_attention": plain, "full_attention": scaled}
    alike = {**both, "sliding_attention": {**plain, "rope_theta": 7e5}}
    scaling = {"rope_type": "linear", "factor": 8.0}
    for values, expected in (
        ({"model_type": "gemma3_text", "rope_parameters": both},
         {"rope_theta": 7e5, "rope_local_base_freq": 2e4, "rope_scaling": scaling}),
        ({"model_type": "olmo3", "rope_parameters": alike}, {"rope_theta": 7e5, "rope_scaling": scaling}),
        ({"model_type": "glm4", "rope_parameters": part}, {"rope_theta": 3e3, "partial_rotary_factor": 0.5, "rope_scaling": None}),
        ({"model_type": "gpt_neox", "rope_parameters": part},
         {"rope_theta": 3e3, "rotary_emb_base": 3e3, "rotary_pct": 0.5, "rope_scaling": None}),
    ):  # fmt: skip
        read = text_config_from_dict(values)
        assert read == (values if TRANSFORMERS_5 else {"model_type": values["model_type"], **expected})
    unlike = {"model_type": "olmo3", "rope_parameters": both}
    if TRANSFORMERS_5:
        assert text_config_from_dict(unlike) == unlike
    else:
        with pytest.raises(
            EmmaError, match="4.57 has no such rotary embeddings for 'olmo3': got .* Use Transformers 5"
        ):
            text_config_from_dict(unlike)


def test_4_57_does_not_scale_what_5_does_not_and_refuses_what_it_cannot():
    plain = {"rope_type": "default", "rope_theta": 1e4}
    # Its own default is a scaled one.
    config = EmmaConfig(text_config={"model_type": "gpt_oss", "rope_parameters": plain}).text_config
    if TRANSFORMERS_5:
        assert config.rope_parameters == plain
    else:
        assert config.rope_scaling is None
    scaled = {"model_type": "olmo2", "rope_parameters": {**plain, "rope_type": "linear", "factor": 2.0}}
    if TRANSFORMERS_5:
        assert text_config_from_dict(scaled) == scaled
    else:
        with pytest.raises(EmmaError, match="does not scale the rotary embeddings of 'olmo2' so: got .*Use Transform"):
            text_config_from_dict(scaled)


def test_a_save_that_is_pushed_writes_all_files_and_pushes_them(tmp_path, monkeypatch):
    pushed = []
    for kind in (EmmaConfig, EmmaImageProcessor):
        monkeypatch.setattr(kind, "push_to_hub", lambda self, *args, **kwargs: pushed.append((args, kwargs)))
    EmmaConfig().save_pretrained(tmp_path / "one", push_to_hub=True, repo_id="me/it", private=True)
    EmmaImageProcessor().save_pretrained(tmp_path / "two", push_to_hub=True)
    place = {} if TRANSFORMERS_5 else {"use_temp_dir": True}
    assert pushed == [(("me/it",), {"private": True, **place}), (("two",), place)]
    for folder, name in (("one", "config.json"), ("two", "preprocessor_config.json")):
        assert (tmp_path / folder / name).is_file()
        assert (tmp_path / folder / "modeling_emma.py").is_file()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_seq_length": 576}, "got 576, but a picture of 28 pixels in patches of 7 .* gives 16"),
        ({"vision_feature_select_strategy": "all"}, "must be one of 'default', 'full': got 'all'"),
        ({"instruction_feature_select_strategy": "cls_patch"}, "one of 'full', 'patch', 'cls': got 'cls_patch'"),
        ({"fusion_implementation": "cuda"}, "one of 'auto', 'eager', 'triton': got 'cuda'"),
        ({"vision_feature_layer": 5}, "one of the 5 hidden states of its encoder .* from -5 to 4: got 5"),
        ({"vision_feature_layer": [-2, -1]}, r"got \[-2, -1\]"),
        ({"instruction_feature_layer": -5}, "the 4 hidden states .*: got -5"),
        ({"instruction_length": 78}, "at most the positions .*: got 78 with max_position_embeddings=77"),
        ({"instruction_length": 1}, "must be at least 2"),
        ({"projector_hidden_act": "gelux"}, "`projector_hidden_act` must be one of 'gelu', .*: got 'gelux'"),
        ({"image_token_index": 120}, "inside the language model's vocabulary: got 120 with vocab_size=120"),
    ],
)
def test_values_that_disagree_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**values)


def _file_with(folder, part: str | None, **values):
    config = tiny_config().to_dict()
    (config if part is None else config[part]).update(values)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
@pytest.mark.parametrize(
    "values",
    [
        {"_attn_implementation": "org/kernel"},
        {"attn_implementation": "org/kernel@main:attend"},
        {"_attn_implementation": {"text_config": "org/kernel"}},
        {"_experts_implementation": "org/kernel"},
    ],
)
def test_a_config_file_cannot_ask_for_a_kernel_of_the_hub(tmp_path, part, values):
    folder = _file_with(tmp_path, part, **values)
    loaders = (EmmaConfig.from_pretrained, AutoConfig.from_pretrained, EmmaForConditionalGeneration.from_pretrained)
    for load in (*loaders, lambda folder: EmmaConfig.from_json_file(folder / "config.json")):
        with pytest.raises(ValueError, match="must not name a kernel of the Hub, .*: got .*org/kernel.* pass "):
            load(folder)


def test_the_internal_attention_of_a_config_file_is_dropped(tmp_path):
    for part in (None, "text_config"):
        config = EmmaConfig.from_pretrained(_file_with(tmp_path, part, _attn_implementation_internal="org/kernel"))
        assert [config._attn_implementation, config.text_config._attn_implementation] == [None, None]
    assert (
        EmmaConfig.from_pretrained(_file_with(tmp_path, None, _attn_implementation="eager"))._attn_implementation
        == "eager"
    )


def test_a_user_can_ask_for_a_kernel_of_the_hub(tmp_path):
    config = EmmaConfig.from_pretrained(_file_with(tmp_path, None), attn_implementation="org/kernel")
    assert config._attn_implementation == config.text_config._attn_implementation == "org/kernel"
    config.save_pretrained(tmp_path)
    assert EmmaConfig.from_pretrained(tmp_path)._attn_implementation is None


def test_activations_of_the_towers_are_named():
    for part, values in (("vision_config", VISION), ("instruction_config", INSTRUCTION)):
        with pytest.raises(ValueError, match=f"`{part}.hidden_act` must be one of .*: got 'gelux'"):
            EmmaConfig(**{part: {**values, "hidden_act": "gelux"}})


def test_misspelt_keys_warn_with_the_nearest_name(caplog):
    with caplog.at_level(logging.WARNING):
        tiny_config(image_seq_lenght=3, visual_ofset=True, architectures=["x"], some_other_key=1)
    assert "no key `image_seq_lenght`; did you mean `image_seq_length`?" in caplog.text
    assert "did you mean `visual_offset`?" in caplog.text
    assert "architectures" not in caplog.text
    assert "some_other_key" not in caplog.text


def test_an_unknown_language_model_is_named():
    with pytest.raises(ValueError, match="Transformers knows: got model_type 'no-such-model'"):
        EmmaConfig(text_config={"model_type": "no-such-model"})


def test_the_supported_versions_are_the_ones_that_run_here():
    assert (int(transformers.__version__.split(".")[0]) >= 5) == TRANSFORMERS_5


def test_the_number_of_positions_is_that_of_the_language_model():
    assert EmmaConfig().position_count == 4096
    assert EmmaConfig(text_config={"model_type": "mpt", "max_seq_len": 99}).position_count == 99
    with pytest.raises(EmmaError, match="that of 'bloom' has no `max_position_embeddings`. Add it to `text_config`"):
        EmmaConfig(text_config={"model_type": "bloom"}).position_count  # noqa: B018
    assert EmmaConfig(text_config={"model_type": "bloom", "max_position_embeddings": 7}).position_count == 7
