"""Pictures encoded once, and all that is asked about them afterwards."""

import copy

import pytest
import torch
from support.models import tiny_inputs, tiny_model

from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.model.modeling_emma import unique_rows
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.scenes import Scene

QUESTIONS = ("What colour is the star?", "How many circles are there?", "Is there a heart?")


def picture_and_questions(model, questions: int = 3):
    """One picture and several rows of instruction tokens."""
    pixels = tiny_inputs(model)["pixel_values"]
    ids = torch.cat([tiny_inputs(model, seed=seed)["instruction_input_ids"] for seed in range(questions)])
    return pixels, ids


def one_by_one(model, pixels, ids):
    with torch.no_grad():
        return torch.cat([model.get_image_features(pixels, row[None]).pooler_output for row in ids])


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("strategy", ["full", "patch", "cls"])
def test_many_questions_about_one_picture(offset, strategy):
    model = tiny_model(visual_offset=offset, instruction_feature_select_strategy=strategy)
    pixels, ids = picture_and_questions(model)
    encoding = model.encode_image(pixels)
    assert len(encoding) == 1
    assert torch.equal(encoding.vision_features, model.get_vision_features(pixels))
    torch.testing.assert_close(encoding.image_features(ids), one_by_one(model, pixels, ids), atol=1e-5, rtol=1e-5)


def test_one_question_about_several_pictures_and_one_each():
    model = tiny_model()
    inputs = tiny_inputs(model, images=(2, 1))
    pixels, ids = inputs["pixel_values"], inputs["instruction_input_ids"]
    encoding = model.encode_image(pixels)
    with torch.no_grad():
        each = model.get_image_features(pixels, ids).pooler_output
        same = model.get_image_features(pixels, ids[:1].expand(3, -1)).pooler_output
    torch.testing.assert_close(encoding.image_features(ids), each, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoding.image_features(ids[:1]), same, atol=1e-5, rtol=1e-5)
    assert (each - same).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_to_exact_as_the_plain_path(dtype):
    model = tiny_model()
    pixels, ids = picture_and_questions(model, 8)
    half = copy.deepcopy(model).to(dtype)
    exact_model = copy.deepcopy(half).float()
    vision = half.get_vision_features(pixels)
    exact = torch.cat(
        [exact_model.get_image_features(None, row[None], vision.float()).pooler_output.detach() for row in ids]
    )
    with torch.no_grad():
        plain = torch.cat([half.get_image_features(None, row[None], vision).pooler_output for row in ids])
    kept = half.encode_image(pixels).image_features(ids)
    assert kept.dtype == dtype
    errors = [(features.float() - exact).square().mean().sqrt() for features in (kept, plain)]
    assert errors[0] <= 1.5 * errors[1]


def test_a_projector_that_is_not_plain_is_called_as_it_is():
    class Adapted(torch.nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs) + inputs.square().sum(-1, keepdim=True)

    model = tiny_model()
    linear = model.model.multi_modal_projector.linear_1
    adapted = Adapted(linear.in_features, linear.out_features)
    adapted.load_state_dict(linear.state_dict())
    model.model.multi_modal_projector.linear_1 = adapted
    pixels, ids = picture_and_questions(model)
    encoding = model.encode_image(pixels)
    torch.testing.assert_close(encoding.image_features(ids), one_by_one(model, pixels, ids), atol=1e-5, rtol=1e-5)


def test_generate_answers_from_what_was_encoded():
    model = EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, dtype=torch.float32).eval()
    processor = EmmaProcessor.from_pretrained(EMMA_TINY)
    picture = draw(Scene.random(5))
    prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS]
    inputs = processor(images=[picture] * 3, text=prompts, padding=True, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    pixels, ids = inputs.pop("pixel_values"), inputs.pop("instruction_input_ids")
    features = model.encode_image(pixels[:1]).image_features(ids)
    assert torch.equal(model.generate(**inputs, image_features=features, max_new_tokens=6, do_sample=False), expected)


def test_numbers_that_do_not_fit_are_told():
    model = tiny_model()
    pixels = tiny_inputs(model, images=(2,))["pixel_values"]
    encoding = model.encode_image(pixels)
    ids = picture_and_questions(model)[1]
    with pytest.raises(ValueError, match="one row for all, or any number about one picture: got 3 rows and 2 pictures"):
        encoding.image_features(ids)
    with pytest.raises(ValueError, match="`instruction_input_ids` must be integers"):
        encoding.image_features(ids[:2].float())
    with pytest.raises(ValueError, match="`pixel_values` must be"):
        model.encode_image(pixels[0])


# Nothing twice


def test_a_question_about_several_pictures_is_read_once():
    model = tiny_model()
    inputs = tiny_inputs(model, images=(3,))
    ids = inputs["instruction_input_ids"][[0, 0, 1]]
    rows = []
    layers = model.model.instruction_encoder.get_submodule(
        next(name for name, _ in model.model.instruction_encoder.named_modules() if name.endswith("layers.0"))
    )
    hook = layers.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    with torch.no_grad():
        together = model.get_instruction_features(ids)
    hook.remove()
    assert rows == [2]
    with torch.no_grad():
        alone = torch.cat([model.get_instruction_features(row[None]) for row in ids])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    assert torch.equal(together[0], together[1])
    assert not torch.equal(together[0], together[2])


def test_unique_rows():
    ids = torch.tensor([[5, 1], [2, 2], [5, 1]])
    unique, indices = unique_rows(ids)
    assert torch.equal(unique[indices], ids)
    assert len(unique) == 2
    # Rows that all differ stay in their order.
    same, none = unique_rows(ids[:2])
    assert same is not None
    assert torch.equal(same, ids[:2])
    assert none is None
    same, none = unique_rows(ids.to("meta"))
    assert same.is_meta
    assert none is None
