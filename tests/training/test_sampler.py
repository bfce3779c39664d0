"""The order of rows: one modality and similar lengths in a batch, another order each epoch."""

import numpy as np
import pytest

from emma_hf.training import ModalityLengthSampler


@pytest.mark.parametrize(("pictures", "texts"), [(40, 24), (37, 18), (0, 9), (3, 0), (1, 1)])
def test_batches_have_one_modality_and_every_row_comes_once(pictures, texts):
    generator = np.random.default_rng(0)
    lengths = np.concatenate([generator.integers(5, 200, pictures), -generator.integers(5, 200, texts)])
    generator.shuffle(lengths)
    sampler = ModalityLengthSampler(lengths, batch_size=8, seed=3)
    order = list(sampler)
    assert len(sampler) == len(order)
    assert sorted(order) == list(range(len(lengths)))
    mixed = [len(set(np.sign(lengths[order[start : start + 8]]))) > 1 for start in range(0, len(order), 8)]
    # What fills no batch comes last.
    assert not any(mixed[: pictures // 8 + texts // 8])
    assert order == list(ModalityLengthSampler(lengths, 8, seed=3))
    assert list(ModalityLengthSampler(lengths, 8)) == list(ModalityLengthSampler(lengths, 8, seed=0))
    sampler.set_epoch(1)
    assert len(lengths) < 4 or list(sampler) != order
    # Seed and epoch together decide.
    assert list(sampler) == list(ModalityLengthSampler(lengths, 8, seed=4))


def test_batches_are_shuffled():
    lengths = np.array([*range(1, 65), *range(-64, 0)])
    batches = lengths[np.reshape(list(ModalityLengthSampler(lengths, batch_size=8)), (-1, 8))]
    modalities = np.sign(batches[:, 0])
    assert (modalities[:8] != modalities[0]).any()
    with_images = np.abs(batches).mean(1)[modalities > 0]
    assert (np.diff(with_images) > 0).any()
    assert (np.diff(with_images) < 0).any()


def test_batches_have_similar_lengths():
    lengths = np.random.default_rng(0).integers(1, 1000, 4000)
    order = list(ModalityLengthSampler(lengths, batch_size=16))
    spread = np.ptp(lengths[np.reshape(order, (-1, 16))], axis=1).mean()
    assert spread < 0.1 * np.ptp(lengths)


def test_a_row_of_length_0_comes_once():
    assert sorted(ModalityLengthSampler(np.array([0, 3, 0, -2, 5]), batch_size=2)) == [0, 1, 2, 3, 4]
