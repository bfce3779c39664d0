"""Rows of JSON, JSON lines, tables and parquet, and what broken ones are told."""

import base64
import re
import sys

import pytest
from support.benchmark_files import encode_image, task_of, write_benchmark, write_json

from emma_hf.evaluation.tasks.files import (
    Row,
    image_of_base64,
    image_of_bytes,
    read_json,
    read_lines,
    read_list,
    read_objects,
    read_parquet,
    read_table,
    read_words,
)
from emma_hf.model.errors_emma import EmmaError, MissingPackageError


def test_a_field_that_is_missing_or_of_another_type():
    row = Row({"question": ["a"], "id": 3}, "questions.json, row 7")
    assert row.text("id") == "3"
    with pytest.raises(EmmaError, match=r"questions.json, row 7 must have the field 'image': got question, id."):
        row.text("image")
    with pytest.raises(
        EmmaError, match=r"questions.json, row 7: the field 'question' is of an unexpected type: got \['a'\]"
    ):
        row.text("question")
    with pytest.raises(EmmaError, match="questions.json, row 7: the field 'id' must be one of yes, no: got '3'"):
        row.one_of("id", ("yes", "no"))


@pytest.mark.parametrize("value", [None, "nan", "NaN", float("nan"), ""])
def test_an_optional_field_is_empty_where_pandas_wrote_nan(value):
    assert Row({"hint": value}, "x").optional("hint") == ""
    assert Row({}, "x").optional("hint") == ""


def test_choices_are_returned_as_they_are_allowed():
    assert Row({"label": " YES "}, "x").one_of("label", ("yes", "no")) == "yes"


@pytest.mark.parametrize(
    ("read", "text", "told"),
    [
        (read_json, "{", "rows.txt is not JSON"),
        (read_json, "[" * 100000, "rows.txt is not JSON"),
        (read_list, '{"a": 1}', "rows.txt must be a list of rows: got dict"),
        (read_list, "[{}, 3]", "rows.txt, row 2 must be an object with named fields: got int"),
        (read_objects, "[1]", "rows.txt must be an object with named fields: got list"),
        (read_objects, '{"12": 5}', "rows.txt, row '12' must be an object"),
        (read_lines, '{"a": 1}\n{"a"\n', "rows.txt, row 2 is not JSON"),
        (read_lines, "[" * 100000, "rows.txt, row 1 is not JSON"),
    ],
)
def test_a_broken_file_is_named_with_its_row(tmp_path, read, text, told):
    (tmp_path / "rows.txt").write_text(text, encoding="utf-8")
    with pytest.raises(EmmaError, match=re.escape(told)):
        read(tmp_path / "rows.txt")


def test_a_file_of_another_encoding_is_told(tmp_path):
    (tmp_path / "rows.txt").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(EmmaError, match="rows.txt, row 1 is not JSON"):
        read_lines(tmp_path / "rows.txt")
    with pytest.raises(EmmaError, match="rows.txt is not text in UTF-8"):
        read_words(tmp_path / "rows.txt")


def test_a_row_ends_where_its_line_does(tmp_path):
    (tmp_path / "rows.txt").write_bytes('{"a": "one\u2028two"}\r\n\n{"a": "three"}'.encode())
    assert [row.text("a") for row in read_lines(tmp_path / "rows.txt")] == ["one\u2028two", "three"]


def test_a_table_with_quotes_marks_and_a_long_field(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text(f'index\timage\n1\t"a ""b""\tc\nd"\n2\t{"x" * 200000}\n', encoding="utf-8")
    rows = read_table(path, "\t")
    assert [row.text("index") for row in rows] == ["1", "2"]
    assert rows[0].text("image") == 'a "b"\tc\nd'
    assert len(rows[1].text("image")) == 200000
    path.write_bytes(b"index\n\xff\xfe")
    with pytest.raises(EmmaError, match="t.tsv is not a table of values"):
        read_table(path, "\t")


def test_images_are_decoded_when_they_are_needed():
    row = Row({"image": base64.b64encode(encode_image(3)).decode(), "bad": "abc"}, "t.tsv, row 1")
    assert image_of_base64(row, "image")().size == (27, 20)
    assert image_of_bytes(row, {"bytes": encode_image(4)})().size == (28, 20)
    broken = image_of_base64(row, "bad")
    with pytest.raises(OSError, match="not base64"):
        broken()
    with pytest.raises(OSError, match="cannot identify image file"):
        image_of_bytes(row, {"bytes": b"no image"})()
    with pytest.raises(EmmaError, match=r"t.tsv, row 1: an image must be an object with `bytes`: got None"):
        image_of_bytes(row, None)


def test_parquet_files_that_are_none(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(EmmaError, match=r"a.parquet is not a parquet file"):
        read_parquet(tmp_path, "*.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match=r"need the package pyarrow.*pip install 'emma-hf\[evaluation\]'"):
        read_parquet(tmp_path, "*.parquet")


# For each task, one field of one row broken, and what the error must say beside the file's name.
BROKEN = {
    "vqav2": ("v2_mscoco_val2014_annotations.json", ("annotations", 0, "answers"), [], "answers of people: got none"),
    "okvqa": ("mscoco_val2014_annotations.json", ("annotations", 0, "question_id"), 7, "no annotation of question"),
    "vizwiz": ("val.json", (1, "answers"), ["red"], "row 2, answers, row 1 must be an object"),
    "textvqa": ("TextVQA_0.5.1_val.json", ("data", 2, "question"), None, "row 3: the field 'question'"),
    "gqa": ("testdev_balanced_questions.json", ("201068611", "answer"), 5.5, "row '201068611': the field 'answer'"),
    "scienceqa": ("problems.json", ("4", "answer"), 3, "row '4': `answer` must be the index of one of 3 choices: got 3"),
    "mathvista": ("annot_testmini.json", ("2", "answer"), "huge", "row '2': the field 'answer' must be one of larger"),
    "amber-discriminative": ("data/annotations.json", (4, "id"), 9, "row 5 must have the id 5: got 9"),
    "amber-generative": ("data/query/query_generative.json", (1, "id"), 99, "row 2: data/annotations.json has no annotation 99"),
    "foil": ("foilv1.0_test_2017.json", ("annotations", 1, "foil"), False, "one right caption and a foil at least: got 2 and 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_row_of_another_format_is_named(name, tmp_path):
    write_benchmark(name, tmp_path)
    file, keys, value, told = BROKEN[name]
    content = read_json(tmp_path / file)
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    write_json(tmp_path / file, content)
    with pytest.raises(EmmaError, match=re.escape(told)) as raised:
        task_of(name).load(tmp_path)
    assert ".json" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "told"),
    [
        ("mmbench-en", "mmbench_dev_20230712.tsv", "\tB\tattribute", "\tD\tattribute", "row 2: the field 'answer' must be one of A, B"),
        ("mmbench-en", "mmbench_dev_20230712.tsv", "241\t", "x\t", "row 1: `index` must be a whole number: got 'x'"),
        ("mmvp", "Questions.csv", "(a) Open (b) Closed", "Open or closed", "row 3: `Options` must be '(a) ... (b) ...'"),
        ("pope", "coco_pope_popular.json", '"no"', '"maybe"', "row 2: the field 'label' must be one of yes, no: got 'maybe'"),
        ("amber-generative", "data/relation.json", "[]", '"x"', "must give a list of words for each word"),
    ],
)  # fmt: skip
def test_a_row_of_a_table_is_named(name, file, old, new, told, tmp_path):
    write_benchmark(name, tmp_path)
    text = (tmp_path / file).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(EmmaError, match=re.escape(told)) as raised:
        task_of(name).load(tmp_path)
    assert file in str(raised.value)
