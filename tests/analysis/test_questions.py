"""Questions: files of them, and which other question stands beside each."""

import json

import pytest
from PIL import Image

from emma_hf.analysis import Row, TooFewQuestionsError, read_rows
from emma_hf.analysis.questions import other_instructions


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return tmp_path


def write(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_rows_are_read_and_images_lie_beside_the_file(folder):
    path = write(
        folder,
        {"image": "a.png", "question": "Who?\nAnswer with one word.", "answer": "Me", "kind": "who", "id": 3},
        {"image": "https://example.org/a.png", "question": "Where?", "answer": "Here"},
    )
    first, second = read_rows(path)
    assert first == Row(str(folder / "a.png"), "Who?\nAnswer with one word.", "Me", "who")
    assert first.instruction == "Who?"
    assert second == Row("https://example.org/a.png", "Where?", "Here", None)


def test_a_json_list_is_read_too(folder):
    path = write(folder, json.dumps([{"image": "a.png", "question": "Who?"}]), name="rows.json")
    assert [row.question for row in read_rows(path)] == ["Who?"]


GOOD = {"image": "a.png", "question": "Who?", "answer": "Me"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, {"question": "Who?"}], "Row 2 of rows.jsonl must have `image`, a text: got None. Its keys are"),
        ([GOOD, {"image": "a.png"}], "Row 2 of rows.jsonl must have `question`, a text: got None"),
        ([{"image": "a.png", "question": "  "}], "Row 1 of rows.jsonl must have `question`, a text: got '  '"),
        ([{**GOOD, "answer": 3}], "Row 1 of rows.jsonl: `answer` must be a text: got 3"),
        ([GOOD, {"image": "a.png", "question": "Who?"}], "row 2 of rows.jsonl has none, others have"),
        ([{**GOOD, "image": "b.png"}], "Row 1 of rows.jsonl: there is no image at .*b.png"),
        ([GOOD, "Who?"], "Row 2 of rows.jsonl must be JSON, one object a line"),
        (["3"], "Row 1 of rows.jsonl must be an object such as .* got int"),
        (['[{"image": "a.png"}]'], "must hold one row a line: it begins with a list"),
    ],
)
def test_what_a_file_must_not_hold_names_the_row(folder, rows, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_rows(write(folder, *rows))


def test_a_missing_file_is_named(folder):
    with pytest.raises(FileNotFoundError, match="there is none at .*none.jsonl"):
        read_rows(folder / "none.jsonl")


ROWS = [Row("", text, None, kind) for kind in ("size", "shape") for text in (f"{kind} 1?", f"{kind} 2?", f"{kind} 3?")]


@pytest.mark.parametrize("same_kind", [True, False, None])
def test_the_other_question_differs_and_is_of_the_kind_asked_for(same_kind):
    kinds = {row.instruction: row.kind for row in ROWS}
    for seed in range(5):
        others = other_instructions(ROWS, seed, same_kind)
        assert others == other_instructions(ROWS, seed, same_kind)
        for row, other in zip(ROWS, others):
            assert other != row.instruction
            assert same_kind is None or (kinds[other] == row.kind) == same_kind
    assert len({tuple(other_instructions(ROWS, seed, same_kind)) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("rows", "same_kind", "message"),
    [
        ([Row("a", "Who?"), Row("b", "Who?\nShortly.")], None, "2 at least: row 1 .'Who.'. has none. Add questions."),
        ([*ROWS, Row("", "Who?", None, "who")], True, "of the kind 'who', so there must be 2 at least: row 7"),
        (ROWS[:3], False, "of another kind, so there must be 2 at least: row 1"),
    ],
)
def test_a_row_without_another_question_says_how_many_it_takes(rows, same_kind, message):
    with pytest.raises(TooFewQuestionsError, match=message):
        other_instructions(rows, 0, same_kind)
