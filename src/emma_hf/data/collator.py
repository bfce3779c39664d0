"""Batches of training rows."""

import torch

from ..model.errors_emma import EmmaError
from ..model.processing_emma import EmmaProcessor
from .conversations import IGNORE_INDEX


class DataCollator:
    """Makes a batch of dataset items: padded at the right, pictures of all rows in one tensor.

    The number of pictures may differ from row to row; a batch without any has no `pixel_values`. Items may hold
    `vision_features` (pictures, N, vision width) in their place, computed once for frozen towers.
    """

    def __init__(self, processor: EmmaProcessor) -> None:
        self.pad_token_id = processor.tokenizer.pad_token_id
        if self.pad_token_id is None:
            raise EmmaError("Padding needs a padding token: set `processor.tokenizer.pad_token`.")

    def __call__(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels` (batch, tokens), and the pictures and instructions of all rows."""
        pad = torch.nn.utils.rnn.pad_sequence
        ids = [item["input_ids"] for item in items]
        batch = {
            "input_ids": pad(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad([item["labels"] for item in items], batch_first=True, padding_value=IGNORE_INDEX),
        }
        for name in ("pixel_values", "vision_features", "instruction_input_ids"):
            rows = [item[name] for item in items if name in item]
            if rows:
                batch[name] = torch.cat(rows)
        return batch
