"""Batches of training rows, and the prompts in them."""

import pytest
import torch
from support.models import tiny_config

from emma_hf.data import DataCollator
from emma_hf.data.collator import split_first_answers

IMAGE, TOKENS = 119, 16


def test_a_prompt_ends_before_the_first_answer_and_keeps_its_own_images():
    config = tiny_config()
    assert (config.image_token_index, config.image_seq_length) == (IMAGE, TOKENS)
    image = [IMAGE] * TOKENS
    # (prompt, first answer, what follows), padded on either side.
    rows = [
        ([1, *image, 5, *image], [7, 2], [8, *image, 9]),
        ([1, 5], [6, 6, 2], []),
        ([1, *image, 4], [3], [8, 8]),
        ([1, 4, 4], [], []),
    ]
    width = max(len(prompt + answer + rest) for prompt, answer, rest in rows)
    batch: dict = {"input_ids": [], "attention_mask": [], "labels": []}
    for number, (prompt, answer, rest) in enumerate(rows):
        ids = prompt + answer + rest
        # The answer of a later turn has labels, too.
        labels = [-100] * len(prompt) + answer + [-100] * (len(rest) - 1) + rest[-1:]
        padding = width - len(ids)
        for name, values, fill in (
            ("input_ids", ids, IMAGE), ("attention_mask", [1] * len(ids), 0), ("labels", labels, -100)
        ):  # fmt: skip
            filler = [fill] * padding
            batch[name].append(filler + values if number == 2 else values + filler)
    batch = {name: torch.tensor(values) for name, values in batch.items()}
    batch |= {
        "pixel_values": torch.arange(4).reshape(4, 1, 1, 1).float(),
        "instruction_input_ids": torch.arange(4)[:, None],
    }

    inputs, answers = split_first_answers(batch, config)
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "instruction_input_ids"}
    longest = max(len(prompt) for prompt, _, _ in rows)
    for row, (prompt, answer, _) in enumerate(rows):
        assert inputs["input_ids"][row].tolist()[longest - len(prompt) :] == prompt
        assert not (inputs["input_ids"][row, : longest - len(prompt)] == IMAGE).any()
        assert inputs["attention_mask"][row].tolist() == [0] * (longest - len(prompt)) + [1] * len(prompt)
        assert answers[row].tolist() == answer + [-100] * (3 - len(answer))
    # The third image stands behind an answer.
    assert inputs["pixel_values"].flatten().tolist() == [0, 1, 3]
    assert inputs["instruction_input_ids"].flatten().tolist() == [0, 1, 3]

    text_only, _ = split_first_answers(
        {name: batch[name][1:2] for name in ("input_ids", "attention_mask", "labels")}, config
    )
    assert set(text_only) == {"input_ids", "attention_mask"}


PAD = 7


class Processor:
    """As much of a processor as a collator asks for."""

    class tokenizer:  # noqa: N801
        pad_token_id = PAD


def item(ids: list[int], images: int = 0, features: int = 0, offset: int = 0) -> dict[str, torch.Tensor]:
    values = {"input_ids": torch.tensor(ids), "labels": torch.tensor([-100, *ids[1:]])}
    if images:
        values["pixel_values"] = torch.arange(images * 3.0).reshape(images, 3, 1, 1) + offset
    if features:
        values["vision_features"] = torch.arange(features * 2.0).reshape(features, 1, 2) + offset
    if images or features:
        values["instruction_input_ids"] = torch.full((images or features, 2), offset)
    return values


def test_rows_are_padded_at_the_right():
    batch = DataCollator(Processor)([item([1, 2, 3]), item([4, 5])])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 5, PAD]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 2, 3], [-100, 5, -100]],
    }


def test_images_of_all_rows_are_in_the_rows_order():
    batch = DataCollator(Processor)([item([1], images=2), item([2]), item([3], images=1, offset=50)])
    assert batch["pixel_values"].flatten().tolist() == [0, 1, 2, 3, 4, 5, 50, 51, 52]
    assert batch["pixel_values"].shape == (3, 3, 1, 1)
    assert batch["instruction_input_ids"].tolist() == [[0, 0], [0, 0], [50, 50]]
    assert "vision_features" not in batch
    batch = DataCollator(Processor)([item([1]), item([2], features=1, offset=9)])
    assert batch["vision_features"].tolist() == [[[9, 10]]]
    assert batch["instruction_input_ids"].tolist() == [[9, 9]]
    assert "pixel_values" not in batch


def test_padding_needs_a_token(monkeypatch):
    monkeypatch.setattr(Processor.tokenizer, "pad_token_id", None)
    with pytest.raises(ValueError, match="^Padding needs a padding token: set `processor.tokenizer.pad_token`.$"):
        DataCollator(Processor)
    # 0 is a token like any other.
    monkeypatch.setattr(Processor.tokenizer, "pad_token_id", 0)
    assert DataCollator(Processor)([item([1, 2]), item([3])])["input_ids"].tolist() == [[1, 2], [3, 0]]
