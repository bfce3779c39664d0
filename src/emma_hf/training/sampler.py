"""The order of training rows."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class ModalityLengthSampler(Sampler[int]):
    """Order of rows whose batches have one modality and similar lengths, as the authors train.

    Rows with and rows without images are grouped by length separately and cut into batches, and the batches are
    shuffled. The rows left over come last, in mixed batches.

    Args:
        lengths: length of each row, (rows,), negative for a row without images: `modality_lengths()` of a dataset.
        batch_size: number of rows in a step, over all processes and accumulated steps.
        seed: determines the order together with the epoch, so that all processes agree.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch. `Trainer` calls this before each one, also of a resumed run."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        batches: list[np.ndarray] = []
        remainder: list[np.ndarray] = []
        for rows in (np.flatnonzero(self.lengths > 0), np.flatnonzero(self.lengths <= 0)):
            if len(rows):
                lengths = np.abs(self.lengths[rows]).tolist()
                rows = rows[get_length_grouped_indices(lengths, self.batch_size, generator=generator)]
                full = len(rows) // self.batch_size * self.batch_size
                batches.extend(rows[:full].reshape(-1, self.batch_size))
                remainder.append(rows[full:])
        order = torch.randperm(len(batches), generator=generator).tolist()
        for rows in [*(batches[index] for index in order), *remainder]:
            yield from rows.tolist()
