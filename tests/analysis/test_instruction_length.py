"""Long instructions: what is cut, what the text term becomes, what is still right."""

import pytest
import torch
from support.analyzed import small, small_rows

from emma_hf.analysis import VisionPath, encode
from emma_hf.analysis.counterfactuals import answers
from emma_hf.analysis.instruction_length import cut_words, wordiness, wordy


def test_what_is_cut_is_what_the_encoder_does_not_read(path):
    long = " ".join(["red"] * 74 + ["blue", "star", "green", "cross"])
    # Start, 75 words and the end are 77.
    assert cut_words(path, long) == "star green cross"
    assert cut_words(path, " ".join(["red"] * 75)) == ""
    assert cut_words(path, " ".join(["red"] * 76)) == "red"
    assert cut_words(path, "") == ""
    kept = " ".join(long.split()[:75])
    assert torch.equal(path.instruction_ids([long]), path.instruction_ids([kept]))


def test_filler_stands_before_the_question(path):
    text = wordy(path, "Is there a heart?", 20)
    assert text.endswith(" Is there a heart?")
    assert "please look at the picture" in text
    count = int((path.instruction_ids([text]) != 0).sum()) - int(
        (path.instruction_ids(["Is there a heart?"]) != 0).sum()
    )
    # A word can take several tokens.
    assert 20 <= count <= 26
    assert wordy(path, "Is there a heart?", 0) == "Is there a heart?"


@torch.no_grad()
def test_each_level(small_model, path, sample):
    model, _ = small_model
    found = wordiness(path, sample, levels=(0, 30, 68, 120), max_new_tokens=4)
    rows, text_weight = small_rows(), model.model.modality_adaptation.visual_alignment.weight[:, 16:]
    own = text_weight @ sample.instruction_tokens
    for figures in found:
        ids = path.instruction_ids([wordy(path, row.instruction, figures["filler"]) for row in rows])
        features = model.get_instruction_features(ids)
        fused = model.model.modality_adaptation(sample.vision_features, features)
        words = torch.nn.functional.gelu(model.model.modality_adaptation.instruction_projection(features))
        norm = fused.flatten(1).norm(dim=1)
        term = text_weight @ words
        assert figures["text"] == pytest.approx(float((term.flatten(1).norm(dim=1) / norm).mean()), rel=1e-4)
        moved = ((term - own).flatten(1).norm(dim=1) / norm).mean()
        assert figures["moved"] == pytest.approx(float(moved), rel=1e-4, abs=1e-6)
        said = answers(path, sample, ids, max_new_tokens=4)
        assert figures["accuracy"]["right"] == sum(a.lower() == row.answer.lower() for a, row in zip(said, rows))
    cut = [figures["cut"] for figures in found]
    assert cut[0] == cut[1] == 0 < cut[2] < cut[3] == 1


def test_a_question_that_is_cut_off_is_not_answered_by_hand_written_weights(by_hand, by_hand_rows):
    path = VisionPath(*by_hand)
    sample = encode(path, by_hand_rows[:60])
    whole, cut = wordiness(path, sample, levels=(60, 100), max_new_tokens=2)
    assert whole["accuracy"]["share"] > 0.95
    assert cut["accuracy"]["share"] < 0.3
    assert (whole["cut"], cut["cut"]) == (0, 1)


def test_a_model_that_reads_one_token_has_a_text_term_too():
    path = VisionPath(*small(instruction_feature_select_strategy="cls"))
    found = wordiness(path, encode(path, small_rows()), levels=(0, 40), max_new_tokens=1)
    # The start token is the same whatever follows it.
    assert found[0]["text"] == pytest.approx(found[1]["text"])
    assert found[1]["moved"] == pytest.approx(0, abs=1e-6)
