"""CLIP's towers: numbers of Transformers' own CLIP, hooks, initialization, export."""

import importlib.util

import pytest
import torch
from support.models import tiny_config, tiny_inputs, tiny_model
from transformers import CLIPTextModel, CLIPVisionModel

from emma_hf import EmmaForConditionalGeneration
from emma_hf.model.compat_emma import unwrap_clip_model


@pytest.fixture
def tiny():
    return tiny_model()


@pytest.mark.parametrize("layer", [-5, -2, -1, 0, 1, 4])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_tower_stops_at_the_hidden_state_that_clip_itself_gives(layer, attention):
    config = {"vision_feature_layer": layer, "instruction_feature_layer": max(layer, -4) if layer < 4 else 3}
    model = tiny_model(**config)
    model.set_attn_implementation(attention)
    inputs = tiny_inputs(model, images=(2,))
    for tower, stock, tokens, index in (
        (model.model.vision_tower, CLIPVisionModel, inputs["pixel_values"], layer),
        (model.model.instruction_encoder, CLIPTextModel, inputs["instruction_input_ids"], config["instruction_feature_layer"]),
    ):  # fmt: skip
        clip = stock(tower.config).eval()
        clip.load_state_dict(tower.state_dict())
        with torch.no_grad():
            expected = clip(tokens, output_hidden_states=True).hidden_states
            stopped, complete = tower(tokens), tower(tokens, output_hidden_states=True)
            as_tuple = tower(tokens, return_dict=False)
        assert torch.equal(stopped.last_hidden_state, expected[index])
        assert torch.equal(complete.last_hidden_state, expected[index])
        assert len(complete.hidden_states) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(complete.hidden_states, expected))
        assert stopped.hidden_states is None
        assert stopped.pooler_output is None
        assert torch.equal(as_tuple[0], expected[index])


def test_the_layers_behind_the_selected_one_run_only_when_all_hidden_states_are_asked_for(tiny):
    ran = []
    for index, layer in enumerate(unwrap_clip_model(tiny.model.vision_tower).encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    inputs = tiny_inputs(tiny)
    with torch.no_grad():
        tiny(**inputs)
        assert ran == [0, 1, 2]
        ran.clear()
        outputs = tiny(**inputs, output_hidden_states=True)
    assert ran == [0, 1, 2, 3]
    assert len(outputs.image_outputs.hidden_states) == 5
    assert torch.equal(outputs.image_outputs.hidden_states[-2][:, 1:], outputs.image_outputs.last_hidden_state)


def test_the_config_can_ask_for_hidden_states(tiny):
    inputs = tiny_inputs(tiny)
    images = {name: inputs[name] for name in ("pixel_values", "instruction_input_ids")}
    tiny.config.output_hidden_states = True
    with torch.no_grad():
        assert len(tiny.get_image_features(**images).hidden_states) == 5
        assert tiny.get_image_features(**images, output_hidden_states=False).hidden_states is None


def test_hooks_of_the_towers_fire_with_what_enters_and_leaves_them(tiny):
    seen = {}
    for name in ("vision_tower", "instruction_encoder"):
        tower = getattr(tiny.model, name)
        tower.register_forward_hook(lambda module, args, output, name=name: seen.update({name: (args, output)}))
    inputs = tiny_inputs(tiny, images=(2,))
    with torch.no_grad():
        vision = tiny(**inputs).image_outputs.last_hidden_state
    (pixels,), output = seen["vision_tower"]
    assert torch.equal(pixels, inputs["pixel_values"])
    assert torch.equal(output.last_hidden_state[:, 1:], vision)
    (ids,), output = seen["instruction_encoder"]
    assert torch.equal(ids, inputs["instruction_input_ids"])
    assert torch.equal(output.last_hidden_state, tiny.get_instruction_features(ids))


def test_gradients_reach_a_hook_on_the_tower(tiny):
    """As Grad-CAM reads them: the derivative by the tower's output, against that by V itself."""
    inputs = tiny_inputs(tiny)
    seen = []
    handle = tiny.model.vision_tower.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    tiny(**inputs).logits[0, -1, 7].backward()
    handle.remove()
    assert seen[0].requires_grad
    tower_input = {name: inputs[name] for name in ("input_ids", "attention_mask", "instruction_input_ids")}
    vision = seen[0][:, 1:].detach().requires_grad_()
    tiny(**tower_input, vision_features=vision).logits[0, -1, 7].backward()
    (gradient,) = torch.autograd.grad(
        tiny(**tower_input, vision_features=(whole := seen[0].detach().requires_grad_())[:, 1:]).logits[0, -1, 7], whole
    )
    torch.testing.assert_close(gradient[:, 1:], vision.grad)
    assert vision.grad.abs().sum() > 0


def test_weights_that_a_checkpoint_lacks_begin_as_those_of_clip():
    torch.manual_seed(0)
    config = tiny_config()
    made = EmmaForConditionalGeneration(config)
    torch.manual_seed(0)
    loaded = EmmaForConditionalGeneration.from_pretrained(None, config=config, state_dict={})
    for tower in ("vision_tower", "instruction_encoder"):
        layers = [unwrap_clip_model(getattr(model.model, tower)).encoder.layers[0] for model in (made, loaded)]
        for name in ("self_attn.out_proj", "self_attn.q_proj", "mlp.fc1", "mlp.fc2"):
            one, other = (layer.get_submodule(name).weight.std().item() for layer in layers)
            # Of 512 numbers at least: their spread is within a tenth of that of the distribution.
            assert other == pytest.approx(one, rel=0.15), (tower, name)
    alignment = loaded.model.modality_adaptation.visual_alignment
    assert torch.equal(alignment.weight, torch.eye(16, 16 + 77))
    assert not alignment.bias.any()


@pytest.mark.skipif(importlib.util.find_spec("transformers.exporters") is None, reason="Transformers has no exporters")
def test_the_exporters_of_transformers_find_the_vision_path(tiny):
    from transformers.exporters.utils import decompose_for_generation

    tiny.generation_config.eos_token_id = None
    inputs = tiny_inputs(tiny, images=(2,))
    with torch.no_grad():
        expected = tiny.get_image_features(inputs["pixel_values"], inputs["instruction_input_ids"])
    parts = decompose_for_generation(tiny, inputs)
    assert {"image_encoder", "multi_modal_projector", "language_model", "lm_head", "decode"} <= parts.keys()
    numbers = {}
    for name in ("image_encoder", "multi_modal_projector"):
        module, captured = parts[name]
        with torch.no_grad():
            numbers[name] = torch.export.export(module, (), captured).module()(**captured)
    vision = numbers["image_encoder"].last_hidden_state[:, 1:]
    torch.testing.assert_close(vision, expected.last_hidden_state)
    torch.testing.assert_close(numbers["multi_modal_projector"], expected.pooler_output)
