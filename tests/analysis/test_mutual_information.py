"""Mutual information and cosine, pair by pair as the authors' script computes them, and their controls."""

import sys

import numpy as np
import pytest
import torch
from support.analyzed import small_rows

from emma_hf.analysis import Row, TooFewQuestionsError, encode
from emma_hf.analysis import mutual_information as module
from emma_hf.analysis.mutual_information import ANSWERS, STAGES, channel_information, redundancy
from emma_hf.analysis.questions import other_instructions


@pytest.fixture(scope="module")
def found(path, sample):
    return redundancy(path, sample, seed=2)


def kraskov(a: np.ndarray, b: np.ndarray, neighbors: int = 3) -> float:
    """Kraskov, Stögbauer and Grassberger (2004), first estimator, as scikit-learn counts: strictly nearer, by brute force."""
    from scipy.special import digamma

    a, b = (np.abs(x[:, None] - x[None]) for x in (a / a.std(), b / b.std()))
    for distances in (a, b):
        np.fill_diagonal(distances, np.inf)
    radius = np.sort(np.maximum(a, b), axis=1)[:, neighbors - 1]
    near = [(distances < radius[:, None]).sum(1) + 1 for distances in (a, b)]
    return digamma(len(a)) + digamma(neighbors) - sum(digamma(count).mean() for count in near)


def test_each_pair_is_an_estimate_over_channels():
    torch.manual_seed(0)
    vector = torch.randn(120)
    tokens = torch.stack([vector + 0.3 * torch.randn(120), torch.randn(120), vector**2])
    found = channel_information(tokens, vector)
    for value, token in zip(found.tolist(), tokens):
        assert value == pytest.approx(max(0.0, kraskov(token.double().numpy(), vector.double().numpy())), abs=1e-6)
    assert found[0] > 0.5 > found[1]


def test_the_stages_and_the_answers_vectors(small_model, path, sample, found):
    """Every value of the first token of each question, from the model's own parts."""
    model, processor = small_model
    adaptation, rows = model.model.modality_adaptation, small_rows()

    def ids(texts):
        images = [row.image for row in rows]
        return processor(images=images, instructions=texts, return_tensors="pt")["instruction_input_ids"]

    def tokens(texts):
        features = model.get_instruction_features(ids(texts))
        return torch.nn.functional.gelu(adaptation.instruction_projection(features)).detach()

    answers = ids([row.answer for row in rows])
    said = tokens([row.answer for row in rows])
    lengths = (answers == processor.instruction_tokenizer.eos_token_id).int().argmax(1) + 1
    means = torch.stack([each[:length].mean(0) for each, length in zip(said, lengths)])
    own, other = tokens([row.instruction for row in rows]), tokens(other_instructions(rows, 2))
    words = {"F, own question": own, "F, another question": other, "F, mean text": own.mean(0).expand_as(own)}
    words["mixed image"] = torch.zeros_like(own)
    chosen = module.chosen_tokens(16, 2, len(rows))
    for stage in STAGES:
        states = sample.vision_features
        if stage != "V":
            states = adaptation.visual_alignment(states, words[stage]).detach()
        cosines = torch.nn.functional.cosine_similarity(states, sample.class_tokens[sample.images][:, None], dim=-1)
        np.testing.assert_allclose(found["class_cosine"][stage], cosines.flatten().numpy(), atol=1e-5)
        for name, vectors in (("start token", said[:, 0]), ("mean over tokens", means)):
            for row in range(len(rows)):
                few = states[row, chosen[row]]
                expected = torch.nn.functional.cosine_similarity(few, vectors[row], dim=-1)
                np.testing.assert_allclose(found["cosine"][name][stage][row], expected.numpy(), atol=1e-5)
                expected = max(0.0, kraskov(few[0].double().numpy(), vectors[row].double().numpy()))
                assert found["mutual_information"][name][stage][row][0] == pytest.approx(expected, abs=0.02)


def test_the_start_token_is_the_same_for_every_answer(found):
    """The authors' script compares with a constant: shuffling the answers changes nothing."""
    for name in ("mutual_information", "cosine"):
        figures = found[name]
        assert set(figures) == set(ANSWERS)
        for stage in STAGES:
            same = figures["start token"][stage], figures["start token, answers shuffled"][stage]
            np.testing.assert_allclose(*same, atol=1e-5)
            other = figures["mean over tokens"][stage], figures["mean over tokens, answers shuffled"][stage]
            assert not np.allclose(*other, atol=1e-5)


@pytest.mark.parametrize("answers", [(None, None), ("Yes", "Yes")])
def test_fewer_than_two_answers_are_too_few(path, answers):
    rows = [Row(row.image, row.question, answer) for row, answer in zip(small_rows(), answers)]
    count = len({*answers} - {None})
    with pytest.raises(TooFewQuestionsError, match=f"2 different answers at least, got {count}. Add `answer`"):
        redundancy(path, encode(path, rows))


def test_a_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_selection", None)
    with pytest.raises(ImportError, match=r'pip install "emma-hf\[analysis\]"'):
        module.estimator()
