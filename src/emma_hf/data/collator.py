"""Batches of training rows, and the prompts in them."""

from functools import partial

import torch

from ..model.configuration_emma import EmmaConfig
from ..model.errors_emma import EmmaError
from ..model.modeling_emma import IMAGE_INPUTS
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
        for name in IMAGE_INPUTS:
            rows = [item[name] for item in items if name in item]
            if rows:
                batch[name] = torch.cat(rows)
        return batch


def split_first_answers(
    batch: dict[str, torch.Tensor], config: EmmaConfig
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Split a batch of [`DataCollator`] into the prompts of the rows' first answers, and these answers.

    What follows the first answer, such as later turns and their images, belongs to neither. A row without labels is a
    prompt as a whole.

    Args:
        batch: `input_ids`, `attention_mask` and `labels` (batch, tokens), and the images and instructions of all rows.
        config: config of the model, which knows the placeholders.

    Returns:
        The prompts as `generate` takes them, `input_ids` and `attention_mask` (batch, tokens) padded at the left with
        their images and instructions, and the ids of the answers (batch, tokens) padded with -100.
    """
    prompts, answers, images = [], [], 0
    kept: list[int] = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"]):
        ids, labels = ids[mask], labels[mask]
        start = int((labels == IGNORE_INDEX).long().cumprod(0).sum())
        length = int((labels[start:] != IGNORE_INDEX).long().cumprod(0).sum())
        prompts.append(ids[:start])
        answers.append(labels[start : start + length])
        is_image = ids == config.image_token_index
        kept += range(images, images + int(is_image[:start].sum()) // config.image_seq_length)
        images += int(is_image.sum()) // config.image_seq_length
    # Padding that the mask hides can be any id but a placeholder's.
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    inputs = {
        "input_ids": pad(prompts, padding_side="left"),
        "attention_mask": pad([torch.ones_like(prompt) for prompt in prompts], padding_side="left"),
    }
    if kept:
        inputs |= {name: batch[name][kept] for name in IMAGE_INPUTS if name in batch}
    return inputs, pad(answers, padding_value=IGNORE_INDEX)
