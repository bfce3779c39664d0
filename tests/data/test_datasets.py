"""Training rows against the recorded ids, labels and instructions, and their errors."""

import json

import pytest
import torch
from PIL import Image
from support.recorded import IMAGE_TOKENS

from emma_hf import EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.data import ChatDataset, ConversationDataset, DataCollator, encode_conversation
from emma_hf.model.instruction_emma import encode_instruction


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
    # What frozen towers see can be computed once.
    seen = [
        {**item, "vision_features": model.get_vision_features(item["pixel_values"])} if "pixel_values" in item else item
        for item in items
    ]
    kept = collate([{name: item[name] for name in item if name != "pixel_values"} for item in seen])
    assert torch.equal(
        kept["vision_features"], torch.cat([row["vision_features"] for row in seen if "vision_features" in row])
    )
    # Not bit for bit: some processors add up a product of another size in another order.
    torch.testing.assert_close(kept["vision_features"], model.get_vision_features(batch["pixel_values"]))
    torch.testing.assert_close(model(**kept).loss, model(**batch).loss)
    # The loss of the batch is the loss of its rows, weighted by their labels.
    with torch.no_grad():
        alone = [model(**collate([item])).loss * (item["labels"] != -100).sum() for item in items]
        together = model(**batch).loss * (batch["labels"] != -100).sum()
    torch.testing.assert_close(together, sum(alone), atol=1e-3, rtol=1e-5)


def test_batches_with_fewer_visual_tokens(converted, write, reference):
    processor = EmmaProcessor.from_pretrained(converted, visual_tokens=5)
    model = EmmaForConditionalGeneration.from_pretrained(converted, visual_tokens=5, dtype=torch.float32)
    dataset = ConversationDataset(write(ROWS), processor, reference / "images")
    items = [dataset[index] for index in range(len(ROWS))]
    assert [(item["input_ids"] == processor.image_token_id).sum().item() for item in items] == [5, 0, 10]
    assert all((item["labels"][item["input_ids"] == processor.image_token_id] == -100).all() for item in items)
    batch = DataCollator(processor)(items)
    model(**batch).loss.backward()
    adaptation = model.model.modality_adaptation
    rows = adaptation.select_rows(model.get_vision_features(batch["pixel_values"])).unique()
    learned = adaptation.visual_alignment.bias.grad.nonzero().flatten()
    assert learned.tolist() == rows.tolist()


ROWS = [
    {"image": "photo.jpg", "conversations": [human("<image>\nWho is this?"), gpt("An officer.")]},
    {"conversations": [human("Hello there"), gpt("Hi")]},
    {
        "image": ["photo.jpg", "tiny.png"],
        "conversations": [human("<image>\n<image>\nWhat changed?"), gpt("All."), human("Sure?"), gpt("Yes.")],
    },
]


def same(item: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return item.keys() == other.keys() and all(torch.equal(item[name], other[name]) for name in item)


@pytest.mark.parametrize("source", ["parts", "images column", "opening images", "datasets", "datasets, Arrow pictures"])
def test_chat_rows_are_the_same_items(processor, write, reference, source):
    expected = ConversationDataset(write(ROWS), processor, reference / "images")
    rows = []
    for row in ROWS:
        names = row.get("image", [])
        paths = [str(reference / "images" / name) for name in ([names] if isinstance(names, str) else names)]
        messages = []
        for message in row["conversations"]:
            words = message["value"].replace("<image>\n", "")
            role = "user" if message["from"] == "human" else "assistant"
            held = paths if "<image>" in message["value"] else []
            parts = [{"type": "image", **({"path": path} if source == "parts" else {})} for path in held]
            content = words if source == "opening images" else [*parts, {"type": "text", "text": words}]
            messages.append({"role": role, "content": content})
        images = [Image.open(path) for path in paths]
        rows.append({"messages": messages} if source == "parts" else {"messages": messages, "images": images})
    if source.startswith("datasets"):
        datasets = pytest.importorskip("datasets")
        rows = datasets.Dataset.from_list(rows)
        if source.endswith("pictures"):
            rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
    chat = ChatDataset(rows, processor)
    for index in range(len(ROWS)):
        assert same(chat[index], expected[index]), index
    assert chat.modality_lengths().tolist() == expected.modality_lengths().tolist() == [6, -3, 7]


def test_lengths_open_no_picture(processor, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(
        [{"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}], "images": []}] * 2
    ).cast_column("images", datasets.List(datasets.Image()))
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *args, **kwargs: pytest.fail("decoded"))
    assert ChatDataset(rows, processor).modality_lengths().tolist() == [-3, -3]


def test_lengths_of_rows_from_a_json_file(processor, photo, tmp_path, monkeypatch):
    """Parts of messages whose keys differ are kept as text there. `<image>` is a word of four."""
    datasets = pytest.importorskip("datasets")
    parts = [{"type": "image", "path": str(photo)}, {"type": "text", "text": "a b"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "c"}]}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    rows = datasets.load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert ChatDataset(rows, processor).modality_lengths().tolist() == [4]
    # Pictures in a column of their own stay closed.
    messages[0]["content"][0].pop("path")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages, "images": [str(photo)]}) + "\n")
    rows = datasets.load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    ).cast_column("images", datasets.List(datasets.Image()))
    assert "Json(" in repr(rows.features)
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *args, **kwargs: pytest.fail("decoded"))
    assert ChatDataset(rows, processor).modality_lengths().tolist() == [4]


def test_a_system_turn_takes_the_place_of_ours(processor):
    rows = [
        {"messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (9, 7))}, {"type": "text", "text": "Who: me?"}]},
            {"role": "assistant", "content": "You."},
        ]}
    ]  # fmt: skip
    item = ChatDataset(rows, processor)[0]
    text = processor.tokenizer.decode(item["input_ids"][item["input_ids"] != 700])
    assert "Be brief." in text
    assert "curious" not in text
    # Two spoken turns: the whole user turn is the instruction, colon and all.
    expected = encode_instruction(processor.instruction_tokenizer, "Who: me?")
    assert item["instruction_input_ids"].tolist() == [expected]


@pytest.mark.parametrize("turns", [1, 2])
def test_no_word_of_the_assistant_is_in_the_instruction(processor, write, reference, turns):
    secret = "xylophone"
    conversation = [human("<image>\nName: it"), gpt(f"{secret}: {secret}\nUSER: {secret}")]
    conversation = [gpt(secret), *conversation, human("Really: so?"), gpt(secret)][: 1 + 2 * turns]
    row = {"image": "photo.jpg", "conversations": conversation}
    given_away = set(encode_instruction(processor.instruction_tokenizer, secret)) - {0}
    ends = {processor.instruction_tokenizer.bos_token_id, processor.instruction_tokenizer.eos_token_id}
    messages = [
        {"role": "user" if turn["from"] == "human" else "assistant", "content": turn["value"]} for turn in conversation
    ]
    for rows in (
        ConversationDataset(write([row]), processor, reference / "images"),
        ChatDataset([{"messages": messages, "images": [reference / "images" / "photo.jpg"]}], processor),
    ):
        item = rows[0]
        assert secret in processor.tokenizer.decode(item["labels"][item["labels"] != -100])
        assert not set(item["instruction_input_ids"].flatten().tolist()) & (given_away - ends)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_that_cannot_be_used_are_skipped_counted_and_reported(processor, write, reference, workers):
    good = ROWS[0]
    rows = [
        {**good, "image": "none.png"},
        good,
        {**good, "image": "truncated.jpg"},
        ROWS[1],
        {"conversations": [human("a")]},
    ]
    path = write(rows, "rows.jsonl")
    path.write_text(path.read_text() + '{"conversations": [\n')
    whole = (reference / "images" / "photo.jpg").read_bytes()
    (path.parent / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (path.parent / "photo.jpg").write_bytes(whole)
    dataset = ConversationDataset(path, processor, on_error="skip")
    assert dataset.skipped_report() is None
    loader = torch.utils.data.DataLoader(dataset, collate_fn=list, num_workers=workers)
    items = [items[0] for items in loader]
    assert [len(item["input_ids"]) for item in items] == [len(dataset[row]["input_ids"]) for row in (1, 1, 3, 3, 1, 1)]
    assert dataset.skipped_rows == [0, 2, 4, 5]
    report = dataset.skipped_report()
    assert report.startswith("4 of 6 rows were skipped:")
    for line, words in zip(report.splitlines()[1:], ("none.png", "truncated.jpg", "must end the row", "Expecting")):
        assert words in line
    assert [line.split(":")[0] for line in report.splitlines()[1:]] == [
        f"Row {row} of rows.jsonl" for row in (0, 2, 4, 5)
    ]
    strict = ConversationDataset(path, processor)
    with pytest.raises(ValueError, match="Row 2 of rows.jsonl: .*truncated.jpg"):
        strict[2]
    with pytest.raises(ValueError, match="Row 5 of rows.jsonl: Expecting"):
        strict[5]


@pytest.mark.parametrize(
    ("turns", "instruction"),
    [
        # Every placeholder leaves the turn before the shortest is chosen.
        (["Look at <image> please"], "look at please"),
        (["First\n<image>Second line"], "first second line"),
        (["<image>What is this: a cat<image>?", "And a long second question of many words"], "a cat?"),
        (["<image>", "And this"], ""),
        (["Name the<image>place, and a lot more of it", "Look at <image> please"], "look at please"),
    ],
)
def test_placeholders_are_no_part_of_the_instruction(processor, write, reference, turns, instruction):
    """The authors' `preprocess_multimodal` moves them to the front of a turn before the instruction is chosen."""
    turns = [*turns, "and this one here has the most words of all of the turns of the row"]
    conversation = [message for turn in turns for message in (human(turn), gpt("Yes."))]
    images = ["photo.jpg"] * sum(turn.count("<image>") for turn in turns)
    dataset = ConversationDataset(
        write([{"image": images, "conversations": conversation}]), processor, reference / "images"
    )
    expected = encode_instruction(processor.instruction_tokenizer, instruction)
    assert dataset[0]["instruction_input_ids"].tolist() == [expected] * len(images)


def test_a_spelled_out_placeholder_counts_as_it_is_encoded(processor, reference, recwarn):
    texts = ["say <image> now", "tell me all of it"]
    parts = [[{"type": "image", "path": str(reference / "images" / "photo.jpg")}], []]
    messages = []
    for text, images in zip(texts, parts):
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": text}]})
        messages.append({"role": "assistant", "content": "Yes."})
    item = ChatDataset([{"messages": messages}], processor)[0]
    ids = [encode_instruction(processor.instruction_tokenizer, text) for text in texts]
    assert ids[0].count(0) == ids[1].count(0)
    # The first of equals; with the escape character inside it would be longer.
    assert item["instruction_input_ids"].tolist() == [ids[0]]
    assert not [warning for warning in recwarn if "ASCII" in str(warning.message)]


def test_synonyms_of_other_formats_are_read(processor, write, reference):
    turns = [human("<image>\nWho?"), gpt("An officer.")]
    rows = [
        {"image": "photo.jpg", "conversations": [{"from": "system", "value": "Be brief."}, *turns]},
        {"images": ["photo.jpg"], "system": "Be brief.", "video": None, "tools": [], "conversations": turns},
    ]
    dataset = ConversationDataset(write(rows), processor, reference / "images")
    assert same(dataset[0], dataset[1])
    assert "Be brief. USER:" in processor.tokenizer.decode(dataset[1]["input_ids"][:20])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"video": "a.mp4"}, "Row 0.*: A row cannot be trained on with `video`: got 'a.mp4'. Remove the key"),
        ({"tools": "[{}]"}, "A row cannot be trained on with `tools`"),
        ({"audios": ["a.wav"]}, "A row cannot be trained on with `audios`"),
        ({"image": "photo.jpg", "images": ["photo.jpg"]}, "A row must have `image` or `images`: got both"),
        ({"images": ["photo.jpg"]}, "got 0 placeholders and 1 pictures"),
        ({"images": [7]}, r"must be the name of a picture, or a list of names: got \[7\]"),
        (
            {"image": "\ud83d.jpg", "conversations": [human("<image>"), gpt("a")]},
            "Row 0 of rows.json: There is no picture at",
        ),
        ({"image": ".", "conversations": [human("<image>"), gpt("a")]}, "Row 0 of rows.json: "),
        ({"conversations": [human("Hi \ud83d"), gpt("a")]}, "Row 0 of rows.json: A text must be valid Unicode"),
    ],
)
def test_what_a_row_cannot_be_trained_on_with_is_named_and_skipped(processor, tmp_path, reference, more, message):
    good = {"conversations": [human("Who?"), gpt("An officer.")]}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{**good, **more}, good]))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ConversationDataset(path, processor, reference / "images")[0]
    skipping = ConversationDataset(path, processor, reference / "images", on_error="skip")
    assert same(skipping[0], skipping[1])
    assert skipping.skipped_rows == [0]
    assert skipping.modality_lengths()[1] == -3


@pytest.mark.parametrize(
    ("key", "value"), [("system", "Be brief."), ("videos", ["a.mp4"]), ("tools", [{"a": 1}]), ("functions", [{"a": 1}])]
)
def test_a_column_of_a_chat_with_an_effect_is_not_ignored(processor, key, value):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], key: value}
    with pytest.raises(ValueError, match=f"Row 0: A row cannot be trained on with `{key}`"):
        ChatDataset([row], processor)[0]
    assert ChatDataset([{**row, key: None}], processor)[0]


def test_a_part_with_the_content_of_two_is_refused(processor, photo):
    answer = {"role": "assistant", "content": "b"}
    for part, lost in (
        ({"type": "text", "text": "a", "image": str(photo)}, "image"),
        ({"type": "image", "image": str(photo), "text": "a"}, "text"),
    ):
        row = {"messages": [{"role": "user", "content": [part]}, answer]}
        with pytest.raises(ValueError, match=f"Row 0: A part of a message of type .* got `{lost}` too"):
            ChatDataset([row], processor)[0]
        part[lost] = None
        assert ("pixel_values" in ChatDataset([row], processor)[0]) is (lost == "text")


@pytest.mark.parametrize("kind", ["garbage", "truncated", "none", "no file"])
@pytest.mark.parametrize("decode", [True, False])
def test_broken_images_of_a_column_are_named_and_skipped(processor, reference, kind, decode):
    photo = (reference / "images" / "photo.jpg").read_bytes()
    good = {"bytes": photo, "path": None}
    broken = {
        "garbage": {"bytes": b"no image", "path": None},
        "truncated": {"bytes": photo[: len(photo) // 2], "path": None},
        "none": {"bytes": None, "path": None},
        "no file": {"bytes": None, "path": "nowhere.png"},
    }[kind]
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "An officer."}]
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"messages": messages, "images": [images]} for images in (broken, good)])
    rows = rows.cast_column("images", datasets.List(datasets.Image(decode=decode)))
    with pytest.raises((ValueError, FileNotFoundError), match="Row 0: "):
        ChatDataset(rows, processor)[0]
    skipping = ChatDataset(rows, processor, on_error="skip")
    assert skipping.modality_lengths()[1] == 4
    assert same(skipping[0], skipping[1])
    assert skipping.skipped_rows == [0]
    assert "Row 0: " in skipping.skipped_report()


def test_a_file_without_a_good_row_is_refused(processor, write):
    dataset = ConversationDataset(write([{"conversations": []}] * 3), processor, on_error="skip")
    with pytest.raises(ValueError, match="Not one row can be learned from. Row 1 of rows.json: .*take turns"):
        dataset[1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (iter([]), "must have a length .* got list_iterator. Load the dataset without `streaming=True`"),
        ([{"text": "a"}], "Row 0: A row must have a list of `messages`"),
        ([{"messages": [{"role": "user", "content": 3}]}], "needs `content`, a text or a list of parts: got"),
        ([{"messages": [{"role": "user", "content": [{"type": "video"}]}]}], "type 'text' or 'image': got 'video'"),
        ([{"messages": [{"role": "user", "content": [{"type": "text"}]}]}], "needs `type` and, of type 'text', a text"),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "got fewer `images` than parts"),
        ([{"messages": [{"role": "tool", "content": "a"}]}], r"needs `from` .*in a chat `role`.*'tool'"),
        ([{"messages": [None]}], "Row 0: A message must be an object with `role` and `content`: got None"),
        (
            [
                {
                    "messages": [
                        {"role": "user", "content": [{"type": "image"}] * 2},
                        {"role": "assistant", "content": "a"},
                    ],
                    "images": [Image.new("RGB", (2, 2)), []],
                }
            ],
            "Row 0: Each entry of a list of images must be one image: got 2 entries that hold 1 images",
        ),
    ],
)
def test_chats_that_are_wrong_are_named(processor, rows, message):
    with pytest.raises(ValueError, match=message):
        ChatDataset(rows, processor)[0]


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
        ({"conversations": [{"from": ["human"], "value": "a"}]}, ValueError, "needs `from`"),
        ({"conversations": [human("a"), gpt(None)]}, ValueError, "needs `from` .* and a text"),
        ({"conversations": [gpt("a")]}, ValueError, r"must take turns.*got \[\]"),
        (
            {"image": 7, "conversations": [human("<image>"), gpt("a")]},
            ValueError,
            "must be the name of a picture.*got 7",
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
    with pytest.raises(ValueError, match="`on_error` must be 'raise' or 'skip': got 'ignore'"):
        ConversationDataset(write([]), processor, on_error="ignore")
    path = write([{"conversations": []}])
    path.write_text(path.read_text()[:-3])
    with pytest.raises(ValueError, match="must hold a JSON list of rows .* Is it complete"):
        ConversationDataset(path, processor)
    dataset = ConversationDataset(write([{"conversations": [human("a"), gpt("b")]}]), processor, template="plain")
    with pytest.raises(ValueError, match="a picture and its caption: got 2 turns and 0 placeholders"):
        dataset[0]
