"""What tokens add to F: each number once more, by NumPy or by another way round."""

import numpy as np
import pytest
import torch
from support.analyzed import small, small_rows

from emma_hf.analysis import TooFewQuestionsError, VisionPath, encode
from emma_hf.analysis.contributions import (
    effective,
    leave_one_out,
    moved_by,
    question_map,
    term_shares,
    terms,
    weights,
)


def alignment(path) -> np.ndarray:
    return path.model.model.modality_adaptation.visual_alignment.weight.detach().numpy().astype(np.float64)


def test_norms_of_weights(path):
    found, matrix = weights(path), alignment(path)
    visual, text = matrix[:, :16], matrix[:, 16:]
    for axis, names in ((0, ("visual_{}", "text_{}")), (1, ("row_visual_{}", "row_text_{}"))):
        for name, part in zip(names, (visual, text)):
            np.testing.assert_allclose(found[name.format("l1")], np.abs(part).sum(axis), rtol=1e-5)
            np.testing.assert_allclose(found[name.format("l2")], np.sqrt((part**2).sum(axis)), rtol=1e-5)
    assert found["text_share_l1"] == pytest.approx(np.abs(text).sum() / np.abs(matrix).sum(), rel=1e-5)
    assert found["text_share_l2"] == pytest.approx((text**2).sum() / (matrix**2).sum(), rel=1e-5)
    assert found["identity_distance"] == pytest.approx(np.linalg.norm(visual - np.eye(16)), rel=1e-5)
    assert found["visual_norm"] == pytest.approx(np.linalg.norm(visual), rel=1e-5)


def test_effective_contributions_and_a_start_token_that_adds_a_constant(path, sample):
    found, matrix = effective(path, sample), alignment(path)
    tokens = {"text": sample.instruction_tokens.double().numpy(), "visual": sample.vision_features.double().numpy()}
    for name, columns in (("text", matrix[:, 16:]), ("visual", matrix[:, :16])):
        column = np.linalg.norm(columns, axis=0)
        size = np.mean([np.linalg.norm(each, axis=1) for each in tokens[name]], axis=0)
        varying = np.mean([np.linalg.norm(each - tokens[name].mean(0), axis=1) for each in tokens[name]], axis=0)
        np.testing.assert_allclose(found[name], column * size, rtol=1e-4)
        np.testing.assert_allclose(found[f"{name}_varying"], column * varying, rtol=1e-4, atol=1e-5)
    assert found["text"][0] > 0
    assert found["text_varying"][0] == 0
    assert found["text_varying"][1] > 0.01


@pytest.mark.parametrize(
    "variant",
    [{}, {"visual_offset": True}, {"instruction_feature_select_strategy": "cls"}, {"class_token": True}],
    ids=str,
)
def test_terms_sum_to_what_the_model_fuses(variant):
    model, processor = small(**variant)
    path = VisionPath(model, processor)
    sample = encode(path, small_rows()[:3])
    features = model.get_instruction_features(sample.instruction_ids)
    fused = model.model.modality_adaptation(sample.vision_features, features)
    parts = terms(path, sample.vision_features[1], sample.instruction_tokens[1], sample.mean_tokens)
    assert set(parts) - {"image", "mean text", "question", "bias"} == (
        {"offset"} if "visual_offset" in variant else set()
    )
    torch.testing.assert_close(sum(parts.values()), fused[1], rtol=0, atol=2e-5)


def test_shares_of_the_terms(path, sample):
    found, matrix = term_shares(path, sample), alignment(path)
    bias = path.bias.double().numpy()[:, None]
    features, words = sample.vision_features.double().numpy(), sample.instruction_tokens.double().numpy()
    mean = words.mean(0)
    for row in range(len(words)):
        visual, text = matrix[:, :16] @ features[row], matrix[:, 16:] @ words[row]
        norm = np.linalg.norm(visual + text + bias)
        expected = {
            "image": visual, "text": text, "mean text": matrix[:, 16:] @ mean, "bias": np.repeat(bias, 32, 1),
            "question": matrix[:, 16:] @ (words[row] - mean),
            "image_varying": matrix[:, :16] @ (features[row] - features.mean(0)),
        }  # fmt: skip
        assert set(found) == set(expected)
        for name, part in expected.items():
            assert float(found[name][row]) == pytest.approx(np.linalg.norm(part) / norm, rel=1e-4), name


def test_the_map_is_the_distance_from_the_mean_over_the_questions(small_model, path, sample):
    model, _ = small_model
    count = len(sample.rows)
    features = sample.vision_features[:1].expand(count, -1, -1)
    states = model.get_image_features(vision_features=features, instruction_input_ids=sample.instruction_ids)
    expected = (states.pooler_output[2] - states.pooler_output.mean(0)).norm(dim=1)
    found = question_map(path, sample.vision_features[0], sample.instruction_tokens[2], sample.instruction_tokens)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def test_leaving_a_token_out_is_a_text_without_it(small_model, path, sample):
    model, processor = small_model
    words = leave_one_out(path, sample.vision_features[0], "Is there a heart?")
    assert [word for word, _ in words] == ["is", "there", "a", "heart", "?"]
    texts = [
        "Is there a heart?",
        "there a heart?",
        "Is a heart?",
        "Is there heart?",
        "Is there a ?",
        "Is there a heart",
    ]
    ids = processor(images=[sample.rows[0].image] * 6, instructions=texts, return_tensors="pt")["instruction_input_ids"]
    features = sample.vision_features[:1].expand(6, -1, -1)
    states = model.get_image_features(vision_features=features, instruction_input_ids=ids).pooler_output
    states = states.detach()
    for (_, share), state in zip(words, states[1:]):
        assert share == pytest.approx(float((state - states[0]).norm() / states[0].norm()), rel=1e-4)


def test_how_far_other_instructions_move_the_visual_tokens(small_model, path, sample):
    model, _ = small_model
    arguments = {"vision_features": sample.vision_features, "instruction_input_ids": sample.instruction_ids}
    own = model.get_image_features(**arguments).pooler_output.flatten(1)
    with path.replaced_instruction(sample.mean_tokens):
        mean = model.get_image_features(**arguments).pooler_output.flatten(1)
    expected = ((own - mean).norm(dim=1) / own.norm(dim=1)).detach()
    torch.testing.assert_close(moved_by(path, sample, sample.mean_tokens), expected, rtol=1e-4, atol=1e-6)
    rolled = sample.instruction_tokens.roll(1, 0)
    other = model.get_image_features(
        vision_features=sample.vision_features, instruction_input_ids=sample.instruction_ids.roll(1, 0)
    ).pooler_output.flatten(1)
    expected = ((own - other).norm(dim=1) / own.norm(dim=1)).detach()
    torch.testing.assert_close(moved_by(path, sample, rolled), expected, rtol=1e-4, atol=1e-6)


def test_one_question_alone_is_too_few(path):
    alone = encode(path, small_rows()[:1])
    with pytest.raises(TooFewQuestionsError, match="2 different questions at least: got 1"):
        effective(path, alone)
    with pytest.raises(TooFewQuestionsError, match="2 different questions at least: got 1"):
        term_shares(path, alone)
