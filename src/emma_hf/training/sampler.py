"""The order of training rows."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class ModalityLengthSampler(Sampler[int]):
    """Rows in an order whose batches have one modality and similar lengths, as the authors train.

    Rows with and without pictures are grouped by length apart, cut into batches, and the batches shuffled. What fills
    no batch comes last, mixed.

    Args:
        lengths: one per row, negative where it has no picture, as `modality_lengths()` of a dataset gives them.
        batch_size: rows in a step, over all processes and accumulated steps.
        seed: with the epoch it decides the order, in every process the same.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """`Trainer` calls this before each epoch; a resumed run gets the order it would have had."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        batches: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for rows in (np.flatnonzero(self.lengths > 0), np.flatnonzero(self.lengths <= 0)):
            if len(rows):
                lengths = np.abs(self.lengths[rows]).tolist()
                rows = rows[get_length_grouped_indices(lengths, self.batch_size, generator=generator)]
                whole = len(rows) // self.batch_size * self.batch_size
                batches.extend(rows[:whole].reshape(-1, self.batch_size))
                rest.append(rows[whole:])
        order = torch.randperm(len(batches), generator=generator).tolist()
        for rows in [*(batches[index] for index in order), *rest]:
            yield from rows.tolist()
