"""Which visual tokens are kept, and that what is computed of them alone is what is computed of all."""

import copy
import re

import pytest
import torch
from support.kernel_marks import DEVICE, needs_kernels
from support.models import kept_features, logits_around, tiny_config, tiny_inputs, tiny_model
from torch import nn

from emma_hf import EMMA_TINY, EmmaConfig, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.model import modeling_emma
from emma_hf.model.modeling_emma import EmmaModalityAdaptation
from emma_hf.model.token_selection_emma import select_diverse
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.scenes import Scene

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def brute_force(distance, tokens: int, kept: int) -> list[int]:
    """The max-min choice by its definition, every minimum anew; of equals the first."""
    others = [[other for other in range(tokens) if other != token] for token in range(tokens)]
    chosen = [max(range(tokens), key=lambda token: min(distance(token, other) for other in others[token]))]
    while len(chosen) < kept:
        left = [token for token in range(tokens) if token not in chosen]
        chosen.append(max(left, key=lambda token: min(distance(token, other) for other in chosen)))
    return sorted(chosen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width", "kept"), [(2, 3, 1), (17, 5, 4), (49, 33, 48), (100, 7, 31)])
def test_the_choice_equals_brute_force(tokens, width, kept, dtype):
    features = torch.randn(3, tokens, width, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    chosen = select_diverse(features, kept)
    assert chosen.dtype == torch.int64
    for image, indices in zip(features.double(), chosen.tolist()):
        cosines = nn.functional.cosine_similarity(image[:, None], image[None], dim=-1).tolist()
        assert indices == brute_force(lambda one, other, c=cosines: 1 - c[one][other], tokens, kept)


@pytest.mark.parametrize("kept", [1, 2, 5, 11, 29])
def test_of_equals_the_first_is_chosen(kept):
    # Tokens along few axes, of lengths that keep cosines exact: -1, 0 or 1, so that nearly every maximum is tied.
    generator = torch.Generator().manual_seed(kept)
    axes = torch.randint(0, 4, (30,), generator=generator).tolist()
    signs = (torch.randint(0, 2, (30,), generator=generator) * 2 - 1).tolist()
    lengths = torch.randint(0, 6, (30,), generator=generator).tolist()
    features = torch.zeros(1, 30, 9)
    for token, (axis, sign, length) in enumerate(zip(axes, signs, lengths)):
        features[0, token, axis] = sign * 2.0**length

    def distance(one: int, other: int) -> int:
        return 1 - (axes[one] == axes[other]) * signs[one] * signs[other]

    assert select_diverse(features, kept).tolist() == [brute_force(distance, 30, kept)]


def test_equal_tokens_are_at_no_distance_whatever_they_are():
    # Three tokens, each many times: three are chosen of them, and then the first ones left.
    different = torch.randn(3, 37, generator=torch.Generator().manual_seed(1))
    features = different.repeat_interleave(5, 0)[None]
    assert {index // 5 for index in select_diverse(features, 3)[0].tolist()} == {0, 1, 2}
    assert select_diverse(features, 6).tolist()[0] == [0, 1, 2, 3, 5, 10]


def test_an_image_is_chosen_from_alike_in_any_batch():
    # Distances that differ in the last places of float32, of which a product of batches decides otherwise than one of
    # a single image.
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(9, 1, 96, generator=generator) + 1e-3 * torch.randn(9, 144, 96, generator=generator)
    together = select_diverse(features, 40)
    for index in range(9):
        assert torch.equal(select_diverse(features[index : index + 1], 40)[0], together[index])
    # Nor does the memory's order matter: V is what a tower's output leaves without its first token.
    padded = torch.cat([torch.ones(9, 1, 96), features], 1)[:, 1:]
    assert torch.equal(select_diverse(padded, 40), together)
    # Nor the order in which a sum is taken.
    assert torch.equal(select_diverse(features.flip(-1), 40), together)


def test_tokens_of_zeros_and_of_no_numbers():
    features = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(0))
    features[0, 4] = 0
    # It is as far from every other token as one at a right angle, and farther than those are from each other.
    assert 4 in select_diverse(features.abs(), 1)
    features[0, 2] = torch.nan
    chosen = select_diverse(features, 5)
    assert chosen.shape == (1, 5)
    assert 0 <= chosen.min() <= chosen.max() < 9
    assert select_diverse(features[:0], 5).shape == (0, 5)
    assert select_diverse(features, 9).tolist() == [list(range(9))]


def test_compiled_and_exported_it_chooses_the_same():
    features = torch.randn(4, 25, 16, generator=torch.Generator().manual_seed(3))
    expected = select_diverse(features, 6)
    torch._dynamo.reset()
    compiled = torch.compile(select_diverse, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(features, 6), expected)
    module = adaptation(visual_tokens=4)
    v, h = features_and_words(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(v, h), module(v, h), atol=1e-5, rtol=1e-5)

    class Chooser(nn.Module):
        def forward(self, features):
            return select_diverse(features, 6)

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Chooser(), (features,), dynamic_shapes=({0: batch},))
    assert torch.equal(program.module()(features[:3]), expected[:3])


# The fusion


def adaptation(dtype: torch.dtype = torch.float32, **kwargs) -> EmmaModalityAdaptation:
    torch.manual_seed(0)
    module = EmmaModalityAdaptation(tiny_config(**kwargs))
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0, 0.2)
    return module.to(dtype)


def features_and_words(module: EmmaModalityAdaptation) -> tuple[torch.Tensor, torch.Tensor]:
    """V of three images and H of their instructions."""
    generator = torch.Generator().manual_seed(0)
    length = {"full": 77, "patch": 76, "cls": 1}[module.config.instruction_feature_select_strategy]
    return torch.randn(3, 16, 32, generator=generator), torch.randn(3, length, 16, generator=generator)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("strategy", ["full", "patch", "cls"])
@pytest.mark.parametrize("kept", [1, 5, 15])
def test_the_rows_and_their_gradients_are_those_of_the_whole(kept, strategy, offset):
    settings = {"instruction_feature_select_strategy": strategy, "visual_offset": offset}
    module, whole = adaptation(visual_tokens=kept, **settings), adaptation(**settings)
    v, h = (value.requires_grad_() for value in features_and_words(module))
    rows = select_diverse(v, kept)
    assert torch.equal(module.select_rows(v), rows)
    assert not all(torch.equal(row, rows[0]) for row in rows) or kept > 1
    fused = module(v, h)
    expected = whole(v, h).gather(1, rows[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=1e-5)

    upstream = torch.randn(fused.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(fused, [v, h, *module.parameters()], upstream)
    exact = torch.autograd.grad(expected, [v, h, *whole.parameters()], upstream)
    for one, other in zip(found, exact):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_the_kernels_the_rows_are_as_exact(dtype):
    module = adaptation(dtype, visual_tokens=5, visual_offset=True, fusion_implementation="triton").to(DEVICE)
    v, h = (value.to(DEVICE) for value in features_and_words(module))
    fused = module(v, h)
    module.config.fusion_implementation = "eager"
    plain = module(v, h)
    exact = copy.deepcopy(module).double()(v.double(), h.double())
    assert fused.dtype == plain.dtype == dtype
    assert (fused - exact).norm() <= 1.1 * (plain - exact).norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_autocast(dtype):
    exact = adaptation(dtype, visual_tokens=6).double()
    module = adaptation(dtype, visual_tokens=6)
    v, h = features_and_words(module)
    truth = exact(v.to(dtype).double(), h.to(dtype).double())
    fused = module(v.to(dtype), h.to(dtype))
    assert fused.dtype == dtype
    torch.testing.assert_close(fused.double(), truth, atol=0.05, rtol=0.02)
    with torch.autocast("cpu", dtype=dtype):
        fused = module.float()(v, h)
    assert fused.dtype == dtype
    torch.testing.assert_close(fused.double(), exact(v.double(), h.double()), atol=0.05, rtol=0.02)


# The model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [False, True])
def test_all_tokens_kept_is_the_same_model_bit_for_bit(dtype, offset, monkeypatch):
    monkeypatch.setattr(modeling_emma, "select_diverse", lambda *args: pytest.fail("tokens were chosen"))
    plain = tiny_model(visual_offset=offset).to(dtype)
    model = tiny_model(visual_offset=offset, visual_tokens=16).to(dtype)
    inputs = tiny_inputs(plain, images=(1, 2))
    outputs, expected = model(**inputs, labels=inputs["input_ids"]), plain(**inputs, labels=inputs["input_ids"])
    assert torch.equal(outputs.logits, expected.logits)
    gradients = [
        torch.autograd.grad(each.loss, model_.lm_head.weight)[0]
        for each, model_ in ((outputs, model), (expected, plain))
    ]
    assert torch.equal(*gradients)
    encoded, expected = (each.encode_image(inputs["pixel_values"]) for each in (model, plain))
    ids = inputs["instruction_input_ids"]
    assert torch.equal(encoded.image_features(ids), expected.image_features(ids))


def test_a_prompt_holds_the_kept_tokens_of_the_whole_model():
    model, whole = tiny_model(visual_tokens=5), tiny_model()
    inputs = tiny_inputs(model, images=(2, 1))
    v, z = whole.get_vision_features(inputs["pixel_values"]), kept_features(whole, inputs, 5)
    outputs = model(**inputs)
    torch.testing.assert_close(outputs.image_hidden_states, z, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs.image_outputs.last_hidden_state, v)

    torch.testing.assert_close(outputs.logits, logits_around(whole, inputs, z), atol=1e-4, rtol=1e-4)

    # From what was encoded before.
    del inputs["pixel_values"]
    torch.testing.assert_close(model(**inputs, vision_features=v).logits, outputs.logits, atol=1e-5, rtol=1e-5)
    ids = inputs.pop("instruction_input_ids")
    torch.testing.assert_close(model(**inputs, image_features=z).logits, outputs.logits, atol=1e-4, rtol=1e-4)
    encoding = model.encode_image(tiny_inputs(model, images=(2, 1))["pixel_values"])
    torch.testing.assert_close(encoding.image_features(ids), z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_prompt_in_half_precision_is_as_exact_as_with_all_tokens_computed(dtype):
    model, whole, double = tiny_model(visual_tokens=5).to(dtype), tiny_model().to(dtype), tiny_model().double()
    inputs = tiny_inputs(model, images=(2, 1))
    with torch.no_grad():
        found, plain = model(**inputs), kept_features(whole, inputs, 5)
        plain_logits = logits_around(whole, inputs, plain)
        # From the same V, of which double precision chooses the same tokens.
        inputs["vision_features"] = whole.get_vision_features(inputs.pop("pixel_values")).double()
        exact = kept_features(double, inputs, 5)
        exact_logits = logits_around(double, inputs, exact)
    assert found.logits.dtype == dtype
    for one, other, truth in (
        (found.image_hidden_states, plain, exact),
        (found.logits, plain_logits, exact_logits),
    ):
        assert (one - truth).norm() <= 1.2 * (other - truth).norm()


@pytest.mark.parametrize("offset", [False, True])
def test_encoded_images_keep_their_choice(offset):
    model = tiny_model(visual_tokens=3, visual_offset=offset)
    pixels = tiny_inputs(model)["pixel_values"]
    ids = torch.cat([tiny_inputs(model, seed=seed)["instruction_input_ids"] for seed in range(4)])
    encoding = model.encode_image(pixels)
    each = torch.cat([model.get_image_features(pixels, row[None]).pooler_output for row in ids])
    torch.testing.assert_close(encoding.image_features(ids), each, atol=1e-5, rtol=1e-5)
    # Also where the projector is not plain, and V is kept.
    model.model.multi_modal_projector.linear_1.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(model.encode_image(pixels).image_features(ids), each, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kept", [1, 4])
def test_answers_are_generated_alike_with_and_without_a_cache_and_with_beams(kept):
    model = tiny_model(visual_tokens=kept)
    inputs = tiny_inputs(model, images=(1, 2))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    ids = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), ids)
    alone = [model.generate(**tiny_inputs(model, images=(1, 2)), **options, num_beams=2) for _ in range(2)]
    assert torch.equal(*alone)


def test_the_model_trains():
    model = tiny_model(visual_tokens=4).train()
    inputs = tiny_inputs(model, images=(1, 1))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    rows = model.model.modality_adaptation.select_rows(model.get_vision_features(inputs["pixel_values"])).unique()
    gradient = model.model.modality_adaptation.visual_alignment.weight.grad
    # The rows that no image of the batch has chosen learn nothing.
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == rows.tolist()
    assert len(rows) < 16


@pytest.mark.slow
def test_the_model_compiles_whole():
    model = tiny_model(visual_tokens=4)
    inputs = tiny_inputs(model, images=(1, 1))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


# Loading and saving, with the processor


def test_it_is_set_changed_and_removed_without_touching_weights(tmp_path):
    picture, text = draw(Scene.random(3)), "USER: <image>\nIs there a red star? ASSISTANT:"
    whole = EmmaForConditionalGeneration.from_pretrained(EMMA_TINY)
    for source, options, kept in (
        (EMMA_TINY, {"visual_tokens": 16}, 16),
        (tmp_path / "16", {}, 16),
        (tmp_path / "16", {"visual_tokens": 7}, 7),
        (tmp_path / "7", {"visual_tokens": None}, 64),
    ):
        model = EmmaForConditionalGeneration.from_pretrained(source, **options)
        processor = EmmaProcessor.from_pretrained(source, **options)
        assert (model.config.image_seq_length, processor.image_seq_length) == (kept, kept)
        assert model.config.vision_seq_length == 64
        assert torch.equal(
            model.model.modality_adaptation.visual_alignment.weight,
            whole.model.modality_adaptation.visual_alignment.weight,
        )
        inputs = processor(images=picture, text=text, return_tensors="pt")
        assert (inputs["input_ids"] == processor.image_token_id).sum() == kept
        assert model(**inputs).image_hidden_states.shape[1] == kept
        for part in (model, processor):
            part.save_pretrained(tmp_path / str(kept))
        again = EmmaConfig.from_pretrained(tmp_path / str(kept))
        assert (again.image_seq_length, again.token_selection) == (kept, "diversity")
        assert again.visual_tokens == (None if kept == 64 else kept)


def test_a_config_that_was_made_can_be_changed():
    config = tiny_config()
    config.visual_tokens = 6
    assert config.image_seq_length == 6
    assert config.to_dict()["image_seq_length"] == EmmaConfig.from_dict(config.to_dict()).image_seq_length == 6
    config.visual_tokens = None
    assert config.image_seq_length == 16


def test_a_processor_of_another_number_is_refused():
    inputs = tiny_inputs(tiny_model(visual_tokens=4), images=(1, 1))
    for kept in (2, 5, 16):
        message = (
            f"^Image features and image tokens do not match: 8 tokens .4 for each image; .* but {2 * kept} features .2 "
            f"images.. An image stands for as many tokens as the model keeps visual tokens of it, {kept}.* load the "
            f"processor .* `EmmaProcessor.from_pretrained.*, visual_tokens={kept}.`"
        )
        for call in ("__call__", "generate"):
            with pytest.raises(ValueError, match=message):
                getattr(tiny_model(visual_tokens=kept), call)(**inputs)


@pytest.mark.parametrize("value", [0, -1, 17, 2.5, "4", True])
def test_numbers_that_cannot_be_are_refused(value):
    rule = f"`visual_tokens` must be a whole number from 1 to 16, .* got {re.escape(repr(value))}. Leave it out"
    with pytest.raises(ValueError, match=rule):
        tiny_config(visual_tokens=value)
    with pytest.raises(ValueError, match=rule):
        EmmaConfig.from_dict(tiny_config().to_dict(), visual_tokens=value)
    with pytest.raises(ValueError, match=rule):
        select_diverse(torch.randn(1, 16, 8), value)
    for made in (EmmaForConditionalGeneration, EmmaProcessor):
        with pytest.raises(ValueError, match="a whole number from 1 to 64"):
            made.from_pretrained(EMMA_TINY, visual_tokens=65 if value == 17 else value)


def test_a_selection_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="`token_selection` must be one of 'diversity': got 'random'"):
        tiny_config(token_selection="random")
    with pytest.raises(ValueError, match="`image_seq_length` must be `visual_tokens`.* got 5, but .* gives 4"):
        tiny_config(visual_tokens=4, image_seq_length=5)
