"""Files of rows: which layouts are read, and what is said of the others."""

import json

import pytest

from emma_hf.data import ConversationDataset
from emma_hf.data.row_files import read_row, row_spans

ROWS = [
    {"conversations": [{"from": "human", "value": "Ünï [a]\n"}, {"from": "gpt", "value": "]"}]},
    {"id": "猫", "conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]},
]


def lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(ROWS, ensure_ascii=False)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.JSON", f" \n{json.dumps(ROWS)}\t\n"),
        ("a.json", "\ufeff" + json.dumps(ROWS, ensure_ascii=False)),
        ("a.json", json.dumps(ROWS, ensure_ascii=False, indent=1).replace("\n", "\r\n")),
        ("a.jsonl", lines(ROWS)),
        ("a.JSONL", "\n" + lines(ROWS) + "\n \n"),
        ("a.ndjson", "\ufeff" + lines(ROWS).replace("\n", "\r\n")),
    ],
)
def test_every_layout_gives_the_rows(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert [read_row(path, *span) for span in row_spans(path).tolist()] == ROWS


def test_an_empty_list_has_no_rows(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(" [ ] ")
    assert row_spans(path).shape == (0, 2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.json",
            json.dumps({"train": ROWS, "val": ROWS}),
            "a.json must hold a JSON list of rows: it holds an object with the keys .'train', 'val'.. Write the rows",
        ),
        ("a.json", lines(ROWS), "a.json must hold a JSON list of rows: it looks like JSON lines. Name it .jsonl"),
        ("a.json", lines(ROWS[:1]), "it looks like JSON lines. Name it .jsonl"),
        ("a.json", '"[]"', 'a.json must hold a JSON list of rows: it holds str "'),
        ("a.json", "[{}] [{}]", r"a.json must hold one JSON list of rows: more follows its end at character 4"),
        ("a.json", "[{} {}]", r"a.json must hold a JSON list of rows \(no comma after a row: char 4"),
        ("a.json", "[{},,{}]", r"a.json must hold a JSON list of rows \(Expecting value.*\). Is it complete"),
        ("a.json", "", r"a.json must hold a JSON list of rows .*Is it complete"),
        ("a.json", "[" * 100_000, r"a.json must hold a JSON list of rows .*Is it complete"),
        ("a.jsonl", json.dumps(ROWS), "a.jsonl must hold one row a line: it begins with a list. Name it .json"),
        ("a.json", b"\x1f\x8b\x08", "a.json must be JSON in UTF-8: .*Unpack it, or save it in UTF-8"),
    ],
)
def test_other_layouts_are_named(processor, tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        ConversationDataset(path, processor)


def test_a_row_that_is_nested_too_deeply_is_named_and_skipped(processor, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"conversations": ' + "[" * 100_000 + "\n" + lines(ROWS))
    with pytest.raises(ValueError, match="Row 0 of a.jsonl: A row must not be nested this deeply"):
        ConversationDataset(path, processor)[0]
    dataset = ConversationDataset(path, processor, on_error="skip")
    assert dataset[0]["input_ids"].tolist() == dataset[1]["input_ids"].tolist()
    assert dataset.skipped_rows == [0]
