"""Training rows: which words are learned, which files are read, and which rows are left out."""

import json
import random

from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import JSON, MARKS, damage_bytes, damage_json, fuzz, texts
from support.recorded import IMAGE_TOKENS

from emma_hf.data import ChatDataset, ConversationDataset, encode_conversation
from emma_hf.data.conversations import IGNORE_INDEX
from emma_hf.data.row_files import read_row, row_spans
from emma_hf.model.instruction_emma import encode_instruction, training_instruction

# In no text of a user or a system, so that a label tells whose words it belongs to.
SECRET = "Zq7"
# What marks a word as no placeholder is taken out of every text; Transformers reads a typed "▁" as a space.
ROWS = st.lists(
    st.tuples(texts(max_size=3), st.integers(0, 2), texts(without=("</s>", "▁", *MARKS), max_size=3)),
    min_size=1,
    max_size=3,
)


def row_of(turns, system: str | None = None, image: str = "photo.jpg") -> dict:
    conversation = [] if system is None else [{"from": "system", "value": system}]
    images = 0
    for question, count, answer in turns:
        images += count + question.count("<image>")
        conversation.append({"from": "human", "value": "<image>\n" * count + question})
        conversation.append({"from": "gpt", "value": f"{answer}{SECRET}{answer}"})
    return {"conversations": conversation, **({"image": [image] * images} if images else {})}


@fuzz(150)
@given(ROWS, st.none() | texts())
def test_labels_are_the_words_of_the_assistant(processor, turns, system):
    row = row_of(turns, system)
    conversation = row["conversations"]
    ids, labels = encode_conversation(processor, conversation)
    assert len(ids) == len(labels)
    assert ids.count(processor.image_token_id) == IMAGE_TOKENS * len(row.get("image", []))
    learned = [token for token, label in zip(ids, labels) if label != IGNORE_INDEX]
    assert learned == [label for label in labels if label != IGNORE_INDEX]
    # Every answer is learned to its last letter, with the end of its sequence, and nothing besides.
    tokenizer = processor.tokenizer
    answers = [message["value"] for message in conversation if message["from"] == "gpt"]
    expected = [
        token
        for answer in answers
        # As a text of its own it begins with the space that follows "ASSISTANT:".
        for token in [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]
    if "<" not in "".join(answers) and not any(answer[0].isspace() for answer in answers):
        assert learned == expected
    text = tokenizer.decode(learned)
    assert text.count(SECRET) == len(answers)
    rest = tokenizer.decode([token for token, label in zip(ids, labels) if label == IGNORE_INDEX])
    assert SECRET not in rest
    if len(row.get("image", [])):
        spoken = [message for message in conversation if message["from"] != "system"]
        assert SECRET not in training_instruction(spoken, processor.instruction_tokenizer)


LAYOUT = {
    "indent": st.sampled_from([None, 0, 1]),
    "ensure_ascii": st.booleans(),
}


@fuzz(150)
@given(
    st.lists(JSON, max_size=4), st.fixed_dictionaries(LAYOUT), st.booleans(), st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["rows.json", "rows.jsonl", "ROWS.NDJSON"]), st.none() | st.integers(0, 2**32),
)  # fmt: skip
def test_a_file_gives_its_rows_or_is_named(tmp_path_factory, rows, layout, has_mark, line_end, name, seed):
    path = tmp_path_factory.getbasetemp() / name
    if name == "rows.json":
        text = json.dumps(rows, **layout)
    else:
        text = "".join(json.dumps(row, ensure_ascii=layout["ensure_ascii"]) + "\n" for row in rows)
    data = ("\ufeff" * has_mark + text.replace("\n", line_end)).encode(errors="replace")
    path.write_bytes(data if seed is None else damage_bytes(data, random.Random(seed)))
    try:
        spans = row_spans(path).tolist()
        # NaN is not equal to itself, but written the same.
        found = [json.dumps(read_row(path, *span)) for span in spans]
    except ValueError as error:
        assert name in str(error) or seed is not None
        # A list of JSON in a file of lines is refused, on purpose.
        assert seed is not None or (name != "rows.json" and rows and isinstance(rows[0], list))
        return
    if name == "rows.json":
        expected = json.loads(path.read_bytes().decode("utf-8-sig"))
    else:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
        expected = [json.loads(line) for line in lines if line.strip()]
    assert found == [json.dumps(row) for row in expected]


@fuzz(60)
@given(st.lists(st.tuples(ROWS, JSON, st.none() | st.integers(0, 2**32)), min_size=1, max_size=4))
def test_rows_that_cannot_be_used_are_named_and_skipped(processor, reference, tmp_path_factory, cases):
    rows = [
        row_of(turns) if seed is None else damage_json(row_of(turns), random.Random(seed), junk)
        for turns, junk, seed in cases
    ]
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # A line of `[` is the beginning of a list.
    if isinstance(rows[0], list):
        return
    images = reference / "images"
    items = []
    for index in range(len(rows)):
        try:
            items.append(ConversationDataset(path, processor, images)[index])
        except (ValueError, FileNotFoundError) as error:
            assert str(error).startswith(f"Row {index} of damaged.jsonl: ")
            assert cases[index][2] is not None or "must fit the model's context" in str(error)
            items.append(None)
    dataset = ConversationDataset(path, processor, images, on_error="skip")
    bad = [index for index, item in enumerate(items) if item is None]
    for index in range(len(rows)):
        following = [item for item in items[index:] + items[:index] if item is not None]
        if following:
            item = dataset[index]
            assert {name: value.tolist() for name, value in item.items()} == {
                name: value.tolist() for name, value in following[0].items()
            }
    if len(bad) < len(rows):
        assert dataset.skipped_rows == bad
    lengths = dataset.modality_lengths()
    for item, length in zip(items, lengths):
        if item is not None:
            assert (length > 0) == ("pixel_values" in item)
            # One row of instruction ids for each image, all the same.
            assert len(item.get("pixel_values", ())) == len(item.get("instruction_input_ids", ()))


@fuzz(150)
@given(ROWS, JSON, st.integers(0, 2**32), st.booleans())
def test_chat_rows_are_read_or_named(processor, reference, turns, junk, seed, in_column):
    photo = str(reference / "images" / "photo.jpg")
    messages, images = [], []
    for question, count, answer in turns:
        held = {} if in_column else {"path": photo}
        images += [photo] * count
        parts = [{"type": "image", **held}] * count + [{"type": "text", "text": question}]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": f"{answer}{SECRET}"}]
    row = {"messages": messages, **({"images": images} if in_column and images else {})}
    # What is typed in a part is words, so each part of an image is one.
    item = ChatDataset([row], processor)[0]
    assert (item["input_ids"] == processor.image_token_id).sum() == len(images) * IMAGE_TOKENS
    assert len(item.get("pixel_values", ())) == len(images)
    damaged = damage_json(row, random.Random(seed), junk)
    try:
        item = ChatDataset([damaged], processor)[0]
    except (ValueError, FileNotFoundError) as error:
        assert str(error).startswith("Row 0: ")
        return
    pictures = len(item.get("pixel_values", ()))
    assert (item["input_ids"] == processor.image_token_id).sum() == pictures * IMAGE_TOKENS
    labels = item["labels"][item["labels"] != IGNORE_INDEX]
    assert labels[-1] == processor.tokenizer.eos_token_id
    if pictures:
        secret = encode_instruction(processor.instruction_tokenizer, SECRET)[1:4]
        ids = item["instruction_input_ids"][0].tolist()
        assert not any(ids[start : start + 3] == secret for start in range(74))
