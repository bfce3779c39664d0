"""The vision path in parts, against the model's own; what replaces an instruction; images encoded once."""

import pytest
import torch
from support.analyzed import noise, small, small_rows
from support.models import TEXT, VISION, tiny_model
from transformers import LlavaConfig, LlavaForConditionalGeneration

from emma_hf.analysis import Row, VisionPath, encode

VARIANTS = [
    {},
    {"visual_offset": True},
    {"instruction_feature_select_strategy": "patch"},
    {"instruction_feature_select_strategy": "cls"},
    {"class_token": True},
    {"projector_hidden_act": "relu"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_visual_tokens_are_those_of_the_model(variant):
    model, processor = small(**variant)
    path, rows = VisionPath(model, processor), small_rows()[:3]
    sample = encode(path, rows, batch=2)
    inputs = processor(
        images=[row.image for row in rows], instructions=[row.instruction for row in rows], return_tensors="pt"
    )
    assert torch.equal(sample.instruction_ids, inputs["instruction_input_ids"])
    outputs = model.get_image_features(inputs["pixel_values"], inputs["instruction_input_ids"])
    assert torch.equal(sample.vision_features, outputs.last_hidden_state)
    fused = path.fuse(sample.vision_features, sample.instruction_tokens)
    torch.testing.assert_close(path.project(fused), outputs.pooler_output, rtol=1e-5, atol=1e-5)
    class_tokens = model.get_image_features(
        inputs["pixel_values"], inputs["instruction_input_ids"], output_hidden_states=True
    ).hidden_states[model.config.vision_feature_layer][:, 0]
    torch.testing.assert_close(sample.class_tokens, class_tokens, rtol=1e-5, atol=1e-5)


def test_leading_axes_are_broadcast(path, sample):
    crossed = path.fuse(sample.vision_features[:2, None], sample.instruction_tokens[None, :3])
    assert crossed.shape == (2, 3, *sample.vision_features.shape[1:])
    torch.testing.assert_close(crossed[1, 2], path.fuse(sample.vision_features[1], sample.instruction_tokens[2]))


def test_a_bf16_model_is_taken_apart_in_float32(sample):
    model, processor = small()
    path = VisionPath(model.to(torch.bfloat16), processor)
    half = encode(path, small_rows())
    assert half.vision_features.dtype == half.instruction_tokens.dtype == path.text_weight.dtype == torch.float32
    torch.testing.assert_close(half.instruction_tokens, sample.instruction_tokens, rtol=0.1, atol=0.05)
    # The analysis leaves the model as it is.
    assert model.model.modality_adaptation.visual_alignment.weight.dtype == torch.bfloat16


def test_the_gate_of_a_gelu_is_the_normal_distribution_and_has_a_limit_at_0(path):
    hidden = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0])
    torch.testing.assert_close(path.gates(hidden), torch.special.ndtr(hidden), rtol=1e-4, atol=1e-5)


def test_a_replaced_instruction_is_read_by_the_model_and_nothing_stays_behind(small_model, path, sample):
    model, _ = small_model
    mean = sample.mean_tokens
    arguments = {"vision_features": sample.vision_features, "instruction_input_ids": sample.instruction_ids}
    before = model.get_image_features(**arguments).pooler_output
    with path.replaced_instruction(mean):
        replaced = model.get_image_features(**arguments).pooler_output
    alignment, projector = model.model.modality_adaptation.visual_alignment, model.model.multi_modal_projector
    fused = (
        alignment.weight[:, :16] @ sample.vision_features + alignment.weight[:, 16:] @ mean + alignment.bias[:, None]
    )
    torch.testing.assert_close(replaced, projector(fused), rtol=1e-5, atol=1e-5)
    assert torch.equal(model.get_image_features(**arguments).pooler_output, before)
    assert not torch.allclose(replaced, before)


def test_equal_paths_are_one_image(path, tmp_path):
    noise(0).save(tmp_path / "a.png")
    image = str(tmp_path / "a.png")
    rows = [Row(image, "Who?"), Row(noise(1), "Where?"), Row(image, "When?")]
    sample = encode(path, rows, batch=2)
    assert sample.images.tolist() == [0, 1, 0]
    assert len(sample.vision_features) == len(sample.class_tokens) == 2
    assert [len(prompt["input_ids"]) for prompt in sample.prompts] == [2, 1]


def test_an_image_that_cannot_be_read_names_its_row(path, tmp_path):
    (tmp_path / "a.png").write_bytes(b"none")
    with pytest.raises(ValueError, match="^Row 2: "):
        encode(path, [Row(noise(0), "Who?"), Row(str(tmp_path / "a.png"), "Where?")])
    with pytest.raises(FileNotFoundError, match="^Row 1: "):
        encode(path, [Row(str(tmp_path / "b.png"), "Where?")])
    with pytest.raises(ValueError, match="nothing to analyze: got no questions"):
        encode(path, [])


def test_a_model_that_keeps_fewer_visual_tokens_is_refused():
    with pytest.raises(ValueError, match="all 16 visual tokens: got visual_tokens=5. .* with visual_tokens=16"):
        VisionPath(tiny_model(visual_tokens=5), None)


def test_a_model_without_a_modality_adaptation_is_refused(small_model):
    vision = {"model_type": "clip_vision_model", **VISION, "image_size": 28, "patch_size": 7}
    config = LlavaConfig(vision_config=vision, text_config={"model_type": "llama", **TEXT, "vocab_size": 50})
    with pytest.raises(ValueError, match="modality adaptation.*LlavaForConditionalGeneration has none"):
        VisionPath(LlavaForConditionalGeneration(config), small_model[1])
