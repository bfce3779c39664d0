"""Batches of training rows, and the prompts in them."""

import torch
from support.models import tiny_config

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
