"""Answer files: nothing that is torn counts, nothing of another run is read."""

import json

import pytest

from emma_hf.evaluation.answer_files import append_answers, merge_answers, read_answers, write_rows
from emma_hf.model.errors_emma import EmmaError

HEADER = {"task": "stub", "model": "tiny 0123", "instruction": ["own"], "version": "1"}


def row(number: int) -> dict:
    return {"id": f"q{number}", "rule": "own", "answer": "ja\u2028 é\n", "score": 1.0}


def append(folder, *numbers: int, process: int = 0) -> None:
    with append_answers(folder, HEADER, process) as file:
        write_rows(file, map(row, numbers))


def test_a_file_cut_anywhere_loses_its_torn_line_alone(tmp_path):
    append(tmp_path, 1, 2, 3)
    (part,) = tmp_path.glob("*.jsonl")
    whole = part.read_bytes()
    ends = [index for index, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole)):
        part.write_bytes(whole[:length])
        complete = sum(end < length for end in ends)
        assert len(read_answers(tmp_path, HEADER)) == max(0, complete - 1)
        append(tmp_path, *range(max(0, complete - 1) + 1, 4))
        assert part.read_bytes() == whole


def test_parts_become_one_file_in_the_order_asked_for(tmp_path):
    append(tmp_path, 3, 1)
    append(tmp_path, 2, 4, process=1)
    # A kill between the merged file's appearance and the end of the parts leaves rows twice.
    first = merge_answers(tmp_path, HEADER, [(f"q{number}", "own") for number in (1, 2, 3)])
    append(tmp_path, 2, process=1)
    assert merge_answers(tmp_path, HEADER, [(f"q{number}", "own") for number in (1, 2, 3)]) == first
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
    # One line each: a line separator of Unicode ends none.
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_bytes().splitlines()]
    assert rows == [HEADER, *map(row, (1, 2, 3, 4))]


def test_two_runs_do_not_write_one_file(tmp_path):
    pytest.importorskip("fcntl")
    with (
        append_answers(tmp_path, HEADER, 0),
        pytest.raises(EmmaError, match="process-0.jsonl is being written by another run. Wait for it"),
        append_answers(tmp_path, HEADER, 0),
    ):
        pass
    append(tmp_path, 1)


@pytest.mark.parametrize("name", HEADER)
def test_another_run_is_refused_by_both_names(tmp_path, name):
    append(tmp_path, 1)
    with pytest.raises(EmmaError) as error:
        read_answers(tmp_path, HEADER | {name: "another"})
    assert f'its {name} is {json.dumps(HEADER[name])}, that of this run is "another". Name another' in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no", "line 3, is no JSON object (Expecting value"),
        ("[]", "line 3, is no JSON object (it holds a list). Remove that line; it is asked again."),
        ("{}", "line 3: a row needs an id and a rule."),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    append(tmp_path, 1)
    (part,) = tmp_path.glob("*.jsonl")
    part.write_text(part.read_text() + line + "\n")
    with pytest.raises(EmmaError) as error:
        read_answers(tmp_path, HEADER)
    assert message in str(error.value)
