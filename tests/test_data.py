"""Training rows against the recorded ids, labels and instructions, and their errors."""

import json

import pytest
import torch
from helpers import IMAGE_TOKENS

from emma_hf.data import ConversationDataset, DataCollator, encode_conversation


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def expanded(values: list[int], ids: list[int], image: int) -> list[int]:
    result: list[int] = []
    for value, token in zip(values, ids):
        result += [image] * IMAGE_TOKENS if token == -200 else [value]
    return result


@pytest.fixture
def write(tmp_path, reference):
    def write_rows(rows, name="rows.json"):
        path = tmp_path / name
        text = (
            json.dumps(rows, ensure_ascii=False) if name.endswith(".json") else "\n".join(map(json.dumps, rows)) + "\n"
        )
        path.write_text(text, encoding="utf-8")
        return path

    return write_rows


def test_recorded_rows(processor, reference, write):
    recorded = json.loads((reference / "training_examples.json").read_text())
    assert len(recorded) == 15
    for template in ("vicuna_v1", "plain"):
        examples = [row for row in recorded if row["template"] == template]
        rows = []
        for row in examples:
            # A row without a picture that the recorder put through the `plain` template has no counterpart here.
            count = sum(message["value"].count("<image>") for message in row["conversation"])
            rows.append({"image": ["photo.jpg"] * count, "conversations": row["conversation"]})
        dataset = ConversationDataset(write(rows), processor, reference / "images", template)
        for item, row in zip((dataset[index] for index in range(len(dataset))), examples, strict=True):
            assert item["input_ids"].tolist() == expanded(row["input_ids"], row["input_ids"], 700), row["conversation"]
            assert item["labels"].tolist() == expanded(row["labels"], row["input_ids"], -100), row["conversation"]
            ids = row["instruction_ids"]
            if "instruction_input_ids" in item:
                assert item["instruction_input_ids"][0].tolist() == (ids[0] if isinstance(ids[0], list) else ids)
                assert len(item["pixel_values"]) == len(item["instruction_input_ids"])


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_rows_are_found_by_their_bytes(processor, write, reference, name):
    rows = [
        {"id": 1, "conversations": [human("Ünïcödé 猫?"), gpt("🐱")]},
        {"id": "x", "image": "photo.jpg", "conversations": [human("<image>\nWho?"), gpt("An officer.")]},
        {"conversations": [human("a"), gpt("b")], "image": None},
    ]
    dataset = ConversationDataset(write(rows, name), processor, reference / "images")
    assert len(dataset) == 3
    assert [dataset.row(index) for index in range(3)] == rows
    assert dataset.spans.nbytes == 3 * 16
    assert "pixel_values" not in dataset[0]
    assert dataset[-2]["pixel_values"].shape == (1, 3, 28, 28)


def test_an_answer_that_names_the_placeholder_adds_no_picture_and_no_instruction(processor):
    ids, labels = encode_conversation(processor, [human("<image>\nWhat is typed?"), gpt("It says <image> there.")])
    assert ids.count(700) == IMAGE_TOKENS
    words = processor.tokenizer.decode([label for label in labels if label != -100])
    assert words.strip() == "It says <image> there.</s>"


def test_batches(processor, model, write, reference):
    rows = [
        {"image": "photo.jpg", "conversations": [human("<image>\nWho?"), gpt("An officer.")]},
        {"conversations": [human("Hello"), gpt("Hi")]},
        {"image": ["photo.jpg", "tiny.png"], "conversations": [human("<image>\n<image>\nWhat changed?"), gpt("All.")]},
    ]
    dataset = ConversationDataset(write(rows), processor, reference / "images")
    items = [dataset[index] for index in range(3)]
    collate = DataCollator(processor)
    batch = collate(items)
    assert batch["pixel_values"].shape[0] == batch["instruction_input_ids"].shape[0] == 3
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert batch["attention_mask"][row].sum() == length
        assert torch.equal(batch["input_ids"][row, :length], item["input_ids"])
        assert (batch["labels"][row, length:] == -100).all()
        assert (batch["input_ids"][row, length:] == processor.tokenizer.pad_token_id).all()
    assert set(collate(items[1:2])) == {"input_ids", "attention_mask", "labels"}
    # The loss of the batch is the loss of its rows, weighted by their labels.
    with torch.no_grad():
        alone = [model(**collate([item])).loss * (item["labels"] != -100).sum() for item in items]
        together = model(**batch).loss * (batch["labels"] != -100).sum()
    torch.testing.assert_close(together, sum(alone), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (
            {"image": "none.png", "conversations": [human("<image>"), gpt("a")]},
            FileNotFoundError,
            "Row 0 of rows.json: .*none.png",
        ),
        (
            {"image": "photo.jpg", "conversations": [human("Who?"), gpt("a")]},
            ValueError,
            "got 0 placeholders and 1 pictures",
        ),
        ({"conversations": [human("<image>"), gpt("a")]}, ValueError, "got 1 placeholders and 0 pictures"),
        (
            {"conversations": [human("a"), human("b"), gpt("c")]},
            ValueError,
            r"must take turns.*\['user', 'user', 'assistant'\]",
        ),
        ({"conversations": [human("a")]}, ValueError, r"the assistant must end the row: got \['user'\]"),
        ({"conversations": []}, ValueError, r"must take turns.*got \[\]"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, ValueError, "needs `from`"),
        (
            {"conversations": [human("a"), gpt("word " * 999)]},
            ValueError,
            r"context of 400 tokens: it has \d+, \d+ too many",
        ),
        ({"conversations": "a"}, ValueError, "must be an object with a list of `conversations`"),
    ],
)
def test_rows_that_are_wrong_are_named(processor, write, reference, row, error, message):
    dataset = ConversationDataset(write([row]), processor, reference / "images")
    with pytest.raises(error, match=message):
        dataset[0]


def test_files_and_templates_that_are_wrong_are_named(processor, write, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file of rows at"):
        ConversationDataset(tmp_path / "none.json", processor)
    with pytest.raises(ValueError, match="must be 'vicuna_v1' or 'plain': got 'chat'"):
        ConversationDataset(write([]), processor, template="chat")
    path = write([{"conversations": []}])
    path.write_text(path.read_text()[:-3])
    with pytest.raises(ValueError, match="must hold a JSON list of rows .* Is it complete"):
        ConversationDataset(path, processor)
    dataset = ConversationDataset(write([{"conversations": [human("a"), gpt("b")]}]), processor, template="plain")
    with pytest.raises(ValueError, match="a picture and its caption: got 2 turns and 0 placeholders"):
        dataset[0]
