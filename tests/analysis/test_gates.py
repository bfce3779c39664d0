"""Gates and variance, once more from their definitions."""

import numpy as np
import pytest
import torch
from support.analyzed import small, small_rows
from support.constructed import constructed_rows

from emma_hf.analysis import TooFewQuestionsError, VisionPath, encode
from emma_hf.analysis.gates import gate_index, variance_split
from emma_hf.analysis.questions import other_instructions


def test_gates_that_turn_are_counted():
    """A GELU's gates are the normal distribution function of W1 F + b1; here the text is large enough to turn some."""
    model, processor = small()
    with torch.no_grad():
        model.model.modality_adaptation.instruction_projection.weight.mul_(20)
    path = VisionPath(model, processor)
    sample = encode(path, small_rows())
    found = gate_index(path, sample, seed=3)
    others = processor(
        images=[row.image for row in sample.rows],
        instructions=other_instructions(sample.rows, 3), return_tensors="pt",
    )["instruction_input_ids"]  # fmt: skip
    gates = []
    for ids in (sample.instruction_ids, others):
        fused = model.model.modality_adaptation(sample.vision_features, model.get_instruction_features(ids))
        gates.append(torch.special.ndtr(model.model.multi_modal_projector.linear_1(fused)).detach())
    movement = (gates[0] - gates[1]).abs()
    assert found["index"] == pytest.approx(float((movement > 0.5).float().mean()), abs=1e-4)
    assert found["index"] > 0
    assert found["mean"] == pytest.approx(float(movement.mean()), rel=1e-3)
    histogram, _ = np.histogram(movement.numpy(), 50, (0, 1))
    np.testing.assert_allclose(found["histogram"].numpy(), histogram / movement.numel(), atol=1e-3)
    assert float(found["histogram"].sum()) == pytest.approx(1)


def test_the_spread_of_text_beside_that_of_images_in_hidden_units(path, sample):
    weight = path.model.model.multi_modal_projector.linear_1.weight.detach().double().numpy()
    matrix = path.model.model.modality_adaptation.visual_alignment.weight.detach().double().numpy()
    spreads = []
    for tokens, columns in ((sample.instruction_tokens, matrix[:, 16:]), (sample.vision_features, matrix[:, :16])):
        hidden = columns @ tokens.double().numpy() @ weight.T
        spreads.append(np.sqrt(((hidden - hidden.mean(0)) ** 2).mean()))
    assert gate_index(path, sample)["text_to_image"] == pytest.approx(spreads[0] / spreads[1], rel=1e-4)


def test_the_variance_of_all_pairs_is_split(small_model, path, sample):
    model, _ = small_model
    images, questions = 5, 4
    states = np.stack([
        [
            model.get_image_features(
                vision_features=sample.vision_features[[image]], instruction_input_ids=sample.instruction_ids[[question]]
            ).pooler_output[0].detach().double().numpy()
            for question in range(questions)
        ]
        for image in range(images)
    ])  # fmt: skip
    mean = states.mean((0, 1))
    by_image, by_question = states.mean(1) - mean, states.mean(0) - mean
    rest = states - by_image[:, None] - by_question - mean
    total = ((states - mean) ** 2).sum()
    found = variance_split(path, sample.vision_features[:images], sample.instruction_tokens[:questions])
    assert found["image"] == pytest.approx(questions * (by_image**2).sum() / total, rel=1e-4)
    assert found["question"] == pytest.approx(images * (by_question**2).sum() / total, rel=1e-4)
    assert found["interaction"] == pytest.approx((rest**2).sum() / total, rel=1e-3)
    assert sum(found.values()) == pytest.approx(1)


def test_without_text_all_variance_is_the_images(untrained):
    processor, model = untrained
    path = VisionPath(model, processor)
    sample = encode(path, constructed_rows(6))
    split = variance_split(path, sample.vision_features, sample.instruction_tokens)
    assert split["image"] == pytest.approx(1, abs=1e-9)
    assert split["interaction"] == pytest.approx(0, abs=1e-9)
    gates = gate_index(path, sample)
    assert gates["index"] == gates["mean"] == gates["text_to_image"] == 0


def test_a_hand_written_model_chooses(by_hand, by_hand_rows):
    """Its visual tokens depend on image and question together, and next to nothing on the question alone."""
    path = VisionPath(*by_hand)
    sample = encode(path, by_hand_rows[:40])
    split = variance_split(path, sample.vision_features, sample.instruction_tokens)
    assert split["interaction"] > 0.8
    assert split["question"] < 0.05
    # One hidden unit of a thing's 128 that another name would open.
    assert 0 < gate_index(path, sample)["index"] < 0.01


@pytest.mark.parametrize(("images", "questions"), [(1, 3), (3, 1)])
def test_one_image_or_one_question_is_too_few(path, sample, images, questions):
    with pytest.raises(
        TooFewQuestionsError, match=f"2 of each at least: got {images} images and {questions} questions"
    ):
        variance_split(path, sample.vision_features[:images], sample.instruction_tokens[:questions])
