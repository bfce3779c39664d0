"""The model against the authors' recorded outputs, against LLaVA, and against its own contract."""

import copy

import pytest
import torch
import transformers
from support.models import tiny_config, tiny_inputs, tiny_model
from support.recorded import AUTHORS_VOCABULARY, GRADIENTS, authors_loss, recorded_inputs, recorded_labels
from torch.nn import functional

from emma_hf import EmmaConfig, EmmaForConditionalGeneration, EmmaModel
from emma_hf.model.compat_emma import CACHE_NAME, unwrap_clip_model

RECORDED = ["single", "single_two_lines", "unicode", "multi_image", "history"]


def fresh(model: EmmaForConditionalGeneration, **config) -> EmmaForConditionalGeneration:
    values = {**model.config.to_dict(), **config}
    other = EmmaForConditionalGeneration(EmmaConfig.from_dict(values)).eval()
    other.load_state_dict(model.state_dict())
    return other


# Against the recorded outputs


def test_each_stage_of_the_vision_path_equals_the_recorded_one(model, cases):
    with torch.no_grad():
        outputs = model.get_image_features(cases["encode.pixel_values"], cases["encode.instruction_input_ids"])
        instruction = model.get_instruction_features(cases["encode.instruction_input_ids"])
        fused = model.model.modality_adaptation(outputs.last_hidden_state, instruction)
    torch.testing.assert_close(outputs.last_hidden_state, cases["encode.image_features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(instruction, cases["encode.text_features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(fused, cases["encode.fused_features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.pooler_output, cases["encode.projected"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", RECORDED)
def test_logits_equal_the_recorded_ones(converted, cases, name, attention):
    model = EmmaForConditionalGeneration.from_pretrained(
        converted, dtype=torch.float32, attn_implementation=attention
    ).eval()
    assert (
        unwrap_clip_model(model.model.vision_tower).encoder.layers[0].self_attn.config._attn_implementation == attention
    )
    assert (
        unwrap_clip_model(model.model.instruction_encoder).encoder.layers[0].self_attn.config._attn_implementation
        == attention
    )
    assert model.model.language_model.config._attn_implementation == attention
    with torch.no_grad():
        logits = model(**recorded_inputs(cases, name)).logits
    torch.testing.assert_close(logits[..., :AUTHORS_VOCABULARY], cases[f"{name}.logits"], atol=1e-4, rtol=0)


def test_a_padded_batch_equals_the_recorded_rows_inside_their_length(model, cases):
    inputs = recorded_inputs(cases, "batch")
    with torch.no_grad():
        logits = model(**inputs).logits[..., :AUTHORS_VOCABULARY]
    for row, length in enumerate(inputs["attention_mask"].sum(-1)):
        torch.testing.assert_close(logits[row, :length], cases["batch.logits"][row, :length], atol=1e-4, rtol=0)


def test_loss_and_gradients_equal_the_recorded_ones(converted, cases):
    model = EmmaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32).train()
    inputs, labels = recorded_inputs(cases, "train"), recorded_labels(cases)
    loss = authors_loss(model(**inputs).logits, labels)
    assert abs(loss.item() - cases["train.loss"].item()) < 1e-4
    loss.backward()
    parameters = dict(model.named_parameters())
    for theirs, ours in GRADIENTS.items():
        expected = cases[f"train.grad|{theirs}"]
        actual = parameters[ours].grad[: expected.shape[0]]
        assert (actual - expected).norm() <= 1e-3 * expected.norm(), theirs


def test_the_loss_is_cross_entropy_over_the_whole_vocabulary(model, cases):
    inputs, labels = recorded_inputs(cases, "train"), recorded_labels(cases)
    with torch.no_grad():
        outputs = model(**inputs, labels=labels)
    logits = outputs.logits[:, :-1].flatten(0, 1)
    expected = functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_as_exact_as_plain_arithmetic(model, cases, dtype):
    half = copy.deepcopy(model).to(dtype)
    inputs = recorded_inputs(cases, "single")
    adaptation, projector = half.model.modality_adaptation, half.model.multi_modal_projector
    with torch.no_grad():
        logits = half(**inputs).logits
        vision = half.get_vision_features(inputs["pixel_values"])
        instruction = half.get_instruction_features(inputs["instruction_input_ids"])
        # Section 1 of the design, written plainly.
        weight, bias = adaptation.instruction_projection.weight, adaptation.instruction_projection.bias
        projected = functional.gelu(instruction @ weight.T + bias)
        tokens = torch.cat([vision, projected], dim=1)
        fused = adaptation.visual_alignment.weight @ tokens + adaptation.visual_alignment.bias[:, None]
        plain = projector.linear_2(functional.gelu(projector.linear_1(fused)))
        features = half.get_image_features(
            vision_features=vision, instruction_input_ids=inputs["instruction_input_ids"]
        ).pooler_output
        exact = model.get_image_features(inputs["pixel_values"], inputs["instruction_input_ids"]).pooler_output
    assert logits.isfinite().all()
    assert (features.float() - exact).abs().max() <= 2 * (plain.float() - exact).abs().max()


def test_double_precision_runs_and_agrees_with_single():
    single = tiny_model()
    inputs = tiny_inputs(single, images=(1, 2))
    double = copy.deepcopy(single).to(torch.float64)
    with torch.no_grad():
        logits = double(**inputs).logits
        assert logits.dtype == torch.float64
        torch.testing.assert_close(single(**inputs).logits, logits.float(), atol=1e-5, rtol=1e-5)


# Variants


@pytest.mark.parametrize(("strategy", "tokens"), [("full", slice(None)), ("patch", slice(1, None)), ("cls", slice(1))])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("layers", [(-2, -2), (-1, 0), (3, 1), (0, -1)])
def test_variants_equal_the_formula(strategy, tokens, offset, layers):
    model = tiny_model(
        instruction_feature_select_strategy=strategy,
        visual_offset=offset,
        vision_feature_layer=layers[0],
        instruction_feature_layer=layers[1],
    )
    inputs = tiny_inputs(model, images=(2,))
    base = model.model
    with torch.no_grad():
        actual = model.get_image_features(inputs["pixel_values"], inputs["instruction_input_ids"]).pooler_output
        states = base.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        vision = states[layers[0]][:, 1:]
        states = base.instruction_encoder(inputs["instruction_input_ids"], output_hidden_states=True).hidden_states
        projected = functional.gelu(base.modality_adaptation.instruction_projection(states[layers[1]][:, tokens]))
        alignment = base.modality_adaptation.visual_alignment
        fused = torch.einsum("nt,btd->bnd", alignment.weight, torch.cat([vision, projected], 1))
        fused = fused + alignment.bias[:, None]
        if offset:
            fused = fused + base.modality_adaptation.visual_offset
        expected = base.multi_modal_projector(fused)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_the_class_token_is_kept_where_the_config_says_so():
    model = tiny_model(vision_feature_select_strategy="full")
    assert model.config.image_seq_length == 17
    inputs = tiny_inputs(model)
    with torch.no_grad():
        states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        torch.testing.assert_close(model.get_vision_features(inputs["pixel_values"]), states[-2])
        assert model(**inputs).logits.shape == (1, 25, 120)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_any_language_model_with_grouped_queries_and_either_head(model_type, tied, tmp_path):
    text = {"model_type": model_type, "num_key_value_heads": 2, "tie_word_embeddings": tied, "rope_theta": 1e6}
    model = tiny_model(text=text)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    inputs = tiny_inputs(model, images=(2, 1))
    with torch.no_grad():
        expected = model(**inputs).logits
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        features = model.get_image_features(inputs["pixel_values"], inputs["instruction_input_ids"]).pooler_output
        embeddings[inputs["input_ids"] == model.config.image_token_index] = features.flatten(0, 1)
        outputs = model.model.language_model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
        torch.testing.assert_close(expected, model.lm_head(outputs.last_hidden_state), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = EmmaForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, expected)


def test_an_untrained_emma_is_llava():
    torch.manual_seed(0)
    emma = EmmaForConditionalGeneration(tiny_config()).eval()
    config = transformers.LlavaConfig(
        vision_config=emma.config.vision_config,
        text_config=emma.config.text_config,
        image_token_index=emma.config.image_token_index,
        image_seq_length=16,
    )
    llava = transformers.LlavaForConditionalGeneration(config).eval()
    names = {name: value for name, value in emma.state_dict().items() if name in llava.state_dict()}
    assert set(names) == set(llava.state_dict())
    llava.load_state_dict(names)
    inputs = tiny_inputs(emma, images=(1, 1))
    ids = inputs.pop("instruction_input_ids")
    with torch.no_grad():
        expected = llava(**inputs).logits
        torch.testing.assert_close(emma(**inputs, instruction_input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_emma_adds_1164160_weights_to_llava_7b():
    with torch.device("meta"):
        model = EmmaForConditionalGeneration(EmmaConfig())
    assert sum(p.numel() for p in model.model.modality_adaptation.parameters()) == 1_164_160
    # Vicuna-7B with its `<image>` row, CLIP ViT-L/14-336 and the projector.
    assert sum(p.numel() for p in model.model.vision_tower.parameters()) == 303_507_456
    assert sum(p.numel() for p in model.model.language_model.parameters()) == 6_607_343_616 + 4096
    assert model.lm_head.weight.shape == (32001, 4096)


# What is computed, and what learns


def test_no_layer_beyond_the_selected_one_is_computed(model, cases):
    ran = []
    handles = []
    for name, tower in (("vision", model.model.vision_tower), ("instruction", model.model.instruction_encoder)):
        for index, layer in enumerate(unwrap_clip_model(tower).encoder.layers):
            handles.append(layer.register_forward_hook(lambda *_, mark=(name, index): ran.append(mark)))
    with torch.no_grad():
        model.get_image_features(cases["single.pixel_values"], cases["single.instruction_input_ids"])
    for handle in handles:
        handle.remove()
    assert sorted(ran) == [("instruction", 0), ("instruction", 1), ("vision", 0), ("vision", 1), ("vision", 2)]


def test_frozen_towers_keep_no_graph_and_the_rest_learns():
    model = tiny_model()
    for tower in (model.model.vision_tower, model.model.instruction_encoder):
        tower.requires_grad_(False)
    inputs = tiny_inputs(model)
    assert not model.get_vision_features(inputs["pixel_values"]).requires_grad
    assert not model.get_instruction_features(inputs["instruction_input_ids"]).requires_grad
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        frozen = "vision_tower" in name or "instruction_encoder" in name
        assert (parameter.grad is None) == frozen, name
        assert frozen or parameter.grad.abs().sum() > 0, name


def test_frozen_towers_keep_no_graph_where_embeddings_are_made_to_require_gradients():
    # What `enable_input_require_grads` does for gradient checkpointing, done to the towers.
    model = tiny_model()
    towers = (model.model.vision_tower, model.model.instruction_encoder)
    for tower in towers:
        tower.requires_grad_(False)
        unwrap_clip_model(tower).embeddings.register_forward_hook(
            lambda _module, _inputs, output: output.requires_grad_(True)
        )
    inputs = tiny_inputs(model)
    assert not model.get_vision_features(inputs["pixel_values"]).requires_grad
    assert not model.get_instruction_features(inputs["instruction_input_ids"]).requires_grad


def test_gradients_reach_a_tower_that_is_trained_and_pixels_that_ask_for_them():
    model = tiny_model()
    inputs = tiny_inputs(model)
    pixels = inputs["pixel_values"].requires_grad_()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert pixels.grad.abs().sum() > 0
    assert unwrap_clip_model(model.model.vision_tower).encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0
    # The layer behind the selected one takes no part.
    assert unwrap_clip_model(model.model.vision_tower).encoder.layers[3].mlp.fc1.weight.grad is None


@pytest.mark.parametrize("visual_tokens", [None, 5])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, visual_tokens):
    model = tiny_model(visual_tokens=visual_tokens).train()
    inputs = tiny_inputs(model, images=(1, 1))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    # Transformers 5.24 deprecates the older name.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    enable = getattr(model, f"{kind}_checkpointing_enable")
    enable(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": reentrant}})
    if reentrant:
        model.enable_input_require_grads()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, gradient in expected.items():
        if reentrant and ("vision_tower" in name or "instruction_encoder" in name):
            # Reentrant checkpoints need an input with a gradient, which the towers' own inputs do not have.
            continue
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, msg=name)


# The interface of Transformers


def test_image_features_can_show_the_towers_states_and_attentions():
    model = tiny_model()
    model.set_attn_implementation("eager")
    inputs = tiny_inputs(model)
    images = {name: inputs[name] for name in ("pixel_values", "instruction_input_ids")}
    with torch.no_grad():
        plain = model.get_image_features(**images)
        rich = model.get_image_features(**images, output_hidden_states=True, output_attentions=True)
        as_tuple = model.get_image_features(**images, return_dict=False)
    torch.testing.assert_close(plain.pooler_output, rich.pooler_output)
    assert plain.hidden_states is None
    assert len(rich.hidden_states) == 5
    assert len(rich.attentions) == 4
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[1], plain.pooler_output)


def test_hidden_states_attentions_and_tuples_of_the_language_model():
    model = tiny_model()
    model.set_attn_implementation("eager")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        as_tuple = model(**inputs, return_dict=False)
        base = model.model(**inputs)
    assert len(outputs.hidden_states) == 4
    assert outputs.hidden_states[-1].shape == (1, 24, 48)
    assert outputs.attentions[0].shape == (1, 4, 24, 24)
    assert outputs.image_hidden_states.shape == (1, 16, 48)
    assert torch.equal(as_tuple[0], outputs.logits)
    torch.testing.assert_close(model.lm_head(base.last_hidden_state), outputs.logits)


def test_attention_can_be_chosen_by_sub_model():
    config = tiny_config()
    chosen = {"vision_config": "eager", "instruction_config": "sdpa", "text_config": "eager"}
    model = EmmaForConditionalGeneration._from_config(config, attn_implementation=chosen)
    assert model.model.vision_tower.config._attn_implementation == "eager"
    assert model.model.instruction_encoder.config._attn_implementation == "sdpa"
    assert model.model.language_model.config._attn_implementation == "eager"


def test_precomputed_features_give_the_same_logits():
    model = tiny_model()
    inputs = tiny_inputs(model, images=(2, 1))
    with torch.no_grad():
        expected = model(**inputs).logits
        pixels, ids = inputs.pop("pixel_values"), inputs.pop("instruction_input_ids")
        vision = model.get_vision_features(pixels)
        assert torch.equal(model(**inputs, vision_features=vision, instruction_input_ids=ids).logits, expected)
        features = model.get_image_features(vision_features=vision, instruction_input_ids=ids).pooler_output
        assert torch.equal(model(**inputs, image_features=features).logits, expected)


def test_embeddings_in_place_of_ids_give_the_same_logits():
    model = tiny_model()
    inputs = tiny_inputs(model, images=(1, 2))
    with torch.no_grad():
        expected = model(**inputs).logits
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        assert torch.equal(model(**inputs).logits, expected)


def test_logits_to_keep_and_a_batch_equals_its_rows():
    model = tiny_model()
    inputs = tiny_inputs(model, images=(1, 0, 2))
    with torch.no_grad():
        whole = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, logits_to_keep=3).logits, whole[:, -3:])
        first = 0
        for row, count in enumerate((1, 0, 2)):
            single = {name: inputs[name][row : row + 1] for name in ("input_ids", "attention_mask")}
            if count:
                for name in ("pixel_values", "instruction_input_ids"):
                    single[name] = inputs[name][first : first + count]
            first += count
            torch.testing.assert_close(model(**single).logits[0], whole[row], atol=1e-5, rtol=1e-5)


def test_no_picture_at_all_is_a_language_model():
    model = tiny_model()
    inputs = tiny_inputs(model, images=(0, 0))
    with torch.no_grad():
        logits = model(**inputs).logits
        expected = model.lm_head(model.model.language_model(**inputs).last_hidden_state)
        empty = {"pixel_values": torch.zeros(0, 3, 28, 28), "instruction_input_ids": torch.zeros(0, 77).long()}
        assert torch.equal(logits, expected)
        assert torch.equal(model(**inputs, **empty).logits, expected)


def test_the_vocabulary_can_grow():
    model = tiny_model()
    inputs = tiny_inputs(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        model.resize_token_embeddings(128, mean_resizing=False)
        assert model.config.text_config.vocab_size == 128
        torch.testing.assert_close(model(**inputs).logits[..., :120], expected)


def test_the_vocabulary_keeps_the_placeholder():
    model = tiny_model(image_token_index=100)
    for size, multiple in ((100, None), (5, 10), (0, None)):
        with pytest.raises(
            ValueError, match=f"placeholder of an image, id 100: got new_num_tokens={size}.*at least 101"
        ):
            model.resize_token_embeddings(size, multiple)
    assert model.resize_token_embeddings(101).num_embeddings == 101
    assert model.resize_token_embeddings(97, pad_to_multiple_of=8).num_embeddings == 104
    assert model(**tiny_inputs(model)).logits.shape[-1] == 104


def test_the_accessors_reach_the_language_model():
    model = tiny_model()
    language_model = model.model.language_model
    assert model.get_input_embeddings() is model.model.get_input_embeddings() is language_model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    assert model.get_decoder() is model.model.get_decoder() is language_model
    embedding, head, other = torch.nn.Embedding(120, 48), torch.nn.Linear(48, 120), tiny_model().model.language_model
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert language_model.embed_tokens is embedding
    assert model.lm_head is head
    model.set_decoder(other)
    assert model.model.language_model is other


def test_the_tensor_parallel_plan_names_the_head():
    assert "lm_head" in EmmaForConditionalGeneration._tp_plan


# Saving and loading


def test_a_save_is_bit_exact_and_carries_the_names_that_both_versions_load(converted, model, cases, tmp_path):
    from safetensors.torch import load_file

    model.save_pretrained(tmp_path / "first")
    names = set(load_file(tmp_path / "first" / "model.safetensors"))
    assert "model.vision_tower.vision_model.embeddings.class_embedding" in names
    assert "model.instruction_encoder.text_model.final_layer_norm.weight" in names
    assert not any(name.startswith("model.vision_tower.encoder") for name in names)
    again, info = EmmaForConditionalGeneration.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    again.save_pretrained(tmp_path / "second", max_shard_size="400KB")
    assert (tmp_path / "second" / "model.safetensors.index.json").is_file()
    third = EmmaForConditionalGeneration.from_pretrained(tmp_path / "second").eval()
    with torch.no_grad():
        inputs = recorded_inputs(cases, "single")
        assert torch.equal(third(**inputs).logits, model(**inputs).logits)


def test_flat_tower_names_load_too(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    flat = {name.replace(".vision_model.", ".").replace(".text_model.", "."): value for name, value in weights.items()}
    assert flat.keys() != weights.keys()
    save_file(flat, path, metadata={"format": "pt"})
    again, info = EmmaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_the_base_model_loads_from_a_whole_checkpoint_and_the_other_way(tmp_path, caplog):
    model = tiny_model()
    model.save_pretrained(tmp_path / "whole")
    base, info = EmmaModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"]
    assert "lm_head" not in caplog.text
    for name, value in base.state_dict().items():
        assert torch.equal(value, model.state_dict()[f"model.{name}"]), name
    base.save_pretrained(tmp_path / "base")
    whole, info = EmmaForConditionalGeneration.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    for name, value in base.state_dict().items():
        assert torch.equal(value, whole.state_dict()[f"model.{name}"]), name


def test_missing_weights_begin_as_an_untrained_emma(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_model(visual_offset=True)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if "modality_adaptation" not in name}
    save_file(weights, path, metadata={"format": "pt"})
    adaptation = EmmaForConditionalGeneration.from_pretrained(tmp_path).model.modality_adaptation
    assert torch.equal(adaptation.visual_alignment.weight, torch.eye(16, 93))
    assert torch.equal(adaptation.visual_alignment.bias, torch.zeros(16))
    assert torch.equal(adaptation.visual_offset, torch.zeros(16, 32))
    assert 0 < adaptation.instruction_projection.weight.std() < 0.1


def test_a_state_dict_of_a_checkpoint_on_disk_is_loaded_whole(tmp_path):
    """As `Trainer` resumes: by names on disk, and without an error where some are missing."""
    from safetensors.torch import load_file

    saved, model = tiny_model(seed=1), tiny_model()
    saved.save_pretrained(tmp_path)
    for part, prefix in ((model, ""), (tiny_model().model, "model.")):
        state_dict = load_file(tmp_path / "model.safetensors")
        state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        part.load_state_dict(state_dict)
        expected = (saved.model if prefix else saved).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in part.state_dict().items())
    model.load_state_dict(tiny_model(seed=2).state_dict())
    assert torch.equal(model.lm_head.weight, tiny_model(seed=2).lm_head.weight)
    with pytest.raises(RuntimeError, match="strange"):
        model.load_state_dict({**saved.state_dict(), "strange": torch.zeros(1)})


def test_a_half_written_checkpoint_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="The weight files must be whole: .* truncated or damaged"):
        EmmaForConditionalGeneration.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        EmmaForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="JSON files must not be nested this deeply: .* Fetch or save it again"):
        EmmaForConditionalGeneration.from_pretrained(tmp_path)


def test_weights_that_the_config_does_not_fit_are_named(tmp_path):
    import json

    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = {**json.loads(path.read_text()), "instruction_feature_select_strategy": "cls"}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="The config and the weights must have the same shapes: those of"):
        EmmaForConditionalGeneration.from_pretrained(tmp_path)


def test_the_model_can_be_built_on_the_meta_device_and_copied():
    with torch.device("meta"):
        model = EmmaForConditionalGeneration(tiny_config())
    assert all(parameter.is_meta for parameter in model.parameters())
    original = tiny_model()
    inputs = tiny_inputs(original)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(original)(**inputs).logits, original(**inputs).logits)


# Compiling, exporting, offloading


@pytest.mark.slow
def test_a_compiled_forward_gives_the_same_logits_and_still_counts_images():
    model = tiny_model()
    inputs = tiny_inputs(model, images=(1, 2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)
        inputs["pixel_values"] = inputs["pixel_values"][:2]
        inputs["instruction_input_ids"] = inputs["instruction_input_ids"][:2]
        with pytest.raises(RuntimeError, match="Image features and image tokens do not match"):
            compiled(**inputs)


@pytest.mark.slow
@pytest.mark.parametrize("visual_tokens", [None, 5])
def test_a_forward_compiled_to_code_gives_the_same_logits(visual_tokens):
    torch._dynamo.reset()
    model = tiny_model(visual_tokens=visual_tokens)
    inputs = tiny_inputs(model, images=(1, 2))
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(**inputs).logits
        torch.testing.assert_close(compiled, model(**inputs).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("visual_tokens", [None, 5])
def test_the_vision_path_exports_with_a_dynamic_batch(visual_tokens):
    class VisionPath(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, pixel_values, instruction_input_ids):
            return self.model.get_image_features(pixel_values, instruction_input_ids).pooler_output

    model = tiny_model(visual_tokens=visual_tokens)
    inputs = tiny_inputs(model, images=(3,))
    arguments = (inputs["pixel_values"], inputs["instruction_input_ids"])
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(
            VisionPath(model),
            arguments,
            dynamic_shapes={"pixel_values": {0: batch}, "instruction_input_ids": {0: batch}},
        )
        for count in (2, 3, 5):
            pixels, ids = torch.randn(count, 3, 28, 28), torch.randint(0, 99, (count, 77))
            expected = model.get_image_features(pixels, ids).pooler_output
            torch.testing.assert_close(program.module()(pixels, ids), expected, atol=1e-5, rtol=1e-5)


def test_offloading_to_disk_gives_the_same_logits(converted, model, cases, tmp_path):
    offloaded = EmmaForConditionalGeneration.from_pretrained(
        converted,
        dtype=torch.float32,
        device_map="auto",
        max_memory={"cpu": 3_700_000},
        offload_folder=tmp_path,
    ).eval()
    assert "disk" in offloaded.hf_device_map.values()
    inputs = recorded_inputs(cases, "multi_image")
    with torch.no_grad():
        torch.testing.assert_close(offloaded(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


# Errors


def test_too_few_and_too_many_placeholders_are_named():
    model = tiny_model()
    inputs = tiny_inputs(model, images=(1, 1))
    more = {**inputs, "pixel_values": torch.randn(3, 3, 28, 28), "instruction_input_ids": torch.zeros(3, 77).long()}
    with pytest.raises(
        ValueError,
        match=r"^Image features and image tokens do not match: 32 tokens .*\[16, 16\].*48 feat.*\(3 images\)",
    ):
        model(**more)
    with pytest.raises(ValueError, match=r"^Image features and image tokens do not match: 32 tokens .* but 0 features"):
        model(input_ids=inputs["input_ids"])
    cut = {**inputs, "input_ids": inputs["input_ids"][:, :10], "attention_mask": inputs["attention_mask"][:, :10]}
    with pytest.raises(
        ValueError, match=r"^Image features and image tokens do not match.*by row: \[8, 8\].*raise `max_length`"
    ):
        model(**cut)
    # As many as there are features, and yet none of the rows holds whole images.
    uneven = inputs["input_ids"].clone()
    uneven[0, 2], uneven[1, 0] = 5, model.config.image_token_index
    with pytest.raises(ValueError, match=r"32 tokens \(16 for each image; by row: \[15, 17\]\), but 32 features"):
        model(**{**inputs, "input_ids": uneven})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": torch.zeros(2, 3, 28, 28)}, "got 2 images and 1 rows of `instruction_input_ids`"),
        ({"pixel_values": torch.zeros(1, 1, 28, 28)}, r"`pixel_values` must be \(images, 3, 28, 28\): got \(1, 1, 28"),
        ({"pixel_values": torch.zeros(3, 28, 28)}, r"must be \(images, 3, 28, 28\)"),
        ({"pixel_values": torch.zeros(1, 3, 28, 28, dtype=torch.uint8)}, "must be floating point.*torch.uint8"),
        ({"instruction_input_ids": torch.zeros(1, 76).long()}, r"integers \(images, 77\): got torch.int64 \(1, 76\)"),
        ({"instruction_input_ids": torch.zeros(1, 77)}, "must be integers"),
        ({"instruction_input_ids": torch.full((1, 77), 99)}, "0 to 98: got ids from 99 to 99"),
        ({"instruction_input_ids": torch.full((1, 77), -1)}, "got ids from -1 to -1"),
        ({"instruction_input_ids": None}, "pass `instruction_input_ids`"),
        ({"pixel_values": None}, "exactly one of `pixel_values` and `vision_features`: got neither"),
        ({"vision_features": torch.zeros(1, 16, 32)}, "`vision_features`: got both"),
        ({"image_features": torch.zeros(1, 16, 48)}, "pass them alone"),
        ({"inputs_embeds": torch.zeros(1, 24, 48)}, "exactly one of `input_ids` and `inputs_embeds`"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model(**{**tiny_inputs(model), **change})


def test_features_of_a_wrong_shape_are_named():
    model = tiny_model()
    inputs = tiny_inputs(model)
    ids = inputs["instruction_input_ids"]
    with pytest.raises(ValueError, match=r"`vision_features` must be floating point \(images, 16, 32\)"):
        model.get_image_features(vision_features=torch.zeros(1, 17, 32), instruction_input_ids=ids)
    with pytest.raises(ValueError, match=r"`image_features` must be floating point \(images, 16, 48\)"):
        model(input_ids=inputs["input_ids"], image_features=torch.zeros(1, 16, 32))


def test_weights_without_memory_are_made_under_another_default_device():
    # As vLLM makes the model that it fills afterwards.
    model = tiny_model()
    alignment = model.model.modality_adaptation.visual_alignment.to("meta")
    with torch.device("cpu"):
        model._init_weights(alignment)
    assert alignment.weight.is_meta


def test_image_outputs_hold_what_replaced_the_placeholders():
    model = tiny_model()
    inputs = tiny_inputs(model, images=(2,))
    with torch.no_grad():
        outputs, base = model(**inputs), model.model(**inputs)
        features = model.get_image_features(inputs["pixel_values"], inputs["instruction_input_ids"])
        words = {name: inputs[name][:, -6:] for name in ("input_ids", "attention_mask")}
        without = model(**words)
    for one in (outputs, base):
        assert torch.equal(one.image_outputs.pooler_output, features.pooler_output)
        assert torch.equal(one.image_outputs.last_hidden_state, features.last_hidden_state)
        assert torch.equal(one.image_hidden_states, features.pooler_output)
        assert one["image_outputs"] is one.image_outputs
    assert without.image_outputs is None
    assert without.image_hidden_states is None


def test_the_cache_has_the_name_of_this_version():
    model = tiny_model()
    inputs = tiny_inputs(model)
    with torch.no_grad():
        first = model(**inputs)
        ids = first.logits[:, -1:].argmax(-1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], 1)
        cached = model(input_ids=ids, attention_mask=mask, **{CACHE_NAME: first[CACHE_NAME]}).logits
        images = {name: inputs[name] for name in ("pixel_values", "instruction_input_ids")}
        again = model(input_ids=torch.cat([inputs["input_ids"], ids], 1), attention_mask=mask, **images).logits
    torch.testing.assert_close(cached[:, -1], again[:, -1])
    assert {CACHE_NAME, "logits", "image_outputs"} == set(first)
