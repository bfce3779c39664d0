"""MMMU: prompts of both ways, letters and free answers as its own evaluation reads them."""

import pytest
from support.benchmark_files import task_of, write_benchmark, write_parquet

from emma_hf.evaluation.tasks.mmmu import candidates, is_right, normalize, parse_choice
from emma_hf.model.errors_emma import EmmaError

OPTIONS = {"A": "a red dog", "B": "blue", "C": "The Cat"}


def load(name, folder):
    pytest.importorskip("pyarrow")
    write_benchmark(name, folder)
    return task_of(name), task_of(name).load(folder)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C) because", "C"),
        ("(A) is wrong, (B) is right", "B"),
        ("A or rather C", "C"),
        ("C.because", "C"),
        ("I think that it must be the cat here", "C"),
        # Five words are too few for an option's text, and nothing is drawn at random.
        ("it is the cat", None),
        ("b", None),
        ("", None),
    ],
)
def test_the_letter_as_mmmu_reads_it(answer, letter):
    assert parse_choice(answer, OPTIONS) == letter


def test_free_answers_are_numbers_or_text():
    assert normalize("1,234.567 ") == [1234.57]
    assert normalize("Red Fox") == ["red fox"]
    assert normalize("X") == [" x", "x "]
    assert candidates("The answer is 42 m.\nSo it is a Fox.") == ["42 m.", "a fox", 42.0]


@pytest.mark.parametrize(
    ("answer", "truths", "right"),
    [
        ("The answer is 42.", ["42"], True),
        ("42", ["42.001"], True),
        ("x = 1,000", ["1000"], True),
        ("It is a red fox", ["red fox"], True),
        ("so 3.5 or 4", ["4"], True),
        ("420", ["42"], False),
        ("fox", ["red fox"], False),
        ("1/3", ["0.333", "1/3"], True),
        ("", ["1"], False),
    ],
)
def test_free_answers_that_are_right(answer, truths, right):
    assert is_right(answer, truths) is right


def test_prompts_with_several_images(tmp_path):
    _, (painter, compare, unknown, _) = load("mmmu", tmp_path)
    letter = "\n\nAnswer with the option's letter from the given choices directly."
    assert compare.prompt == f"Compare <image 1> and <image 2>.\nA. older\nB. newer{letter}"
    assert unknown.prompt == "What is x in <image 1>?\n\nAnswer the question using a single word or phrase."
    assert [len(sample.images) for sample in (painter, compare, unknown)] == [1, 2, 1]
    assert (painter.question, painter.authors_instruction) == ("Who painted ?", "Who painted <image 1>?")
    assert (painter.kind, unknown.kind) == ("Art_Theory", "Math")


def test_prompts_with_images_pasted_into_one(tmp_path):
    _, (_, compare, unknown, _) = load("mmmu-pasted", tmp_path)
    letter = "\nAnswer with the option's letter from the given choices directly."
    assert compare.prompt == f"Compare <image 1> and <image 2>.\nA. older\nB. newer{letter}"
    # The authors ask for a letter here, too.
    assert unknown.prompt == f"What is x in <image 1>?{letter}"
    assert [image().size for image in compare.images] == [(25 + 26, 20)]


def test_five_answers_scored_by_hand(tmp_path):
    task, (painter, compare, x, y) = load("mmmu", tmp_path)
    answers = [(painter, "(A) Monet"), (compare, "Newer"), (x, "x is 42"), (y, "1/3"), (y, "")]
    rows = [task.answered(sample, answer) for sample, answer in answers]
    assert [row.parsed for row in rows] == ["A", None, "x is 42", "1/3", None]
    assert [row.score for row in rows] == [1, 0, 1, 1, 0]
    figures = task.summarize(rows)
    assert figures["accuracy"].value == 3 / 5
    assert figures["answers not parsed"].value == 2 / 5
    assert figures['accuracy of always "A"'].value == 1 / 5
    # None of them is the target exactly.
    assert task.authors_figures(rows)["accuracy"].value == 0
    assert task.authors_figures([task.answered(x, "42")])["accuracy"].value == 1


def test_options_that_are_no_list_are_named(tmp_path):
    pytest.importorskip("pyarrow")
    row = {"id": "validation_Math_1", "question": "?", "options": "A, B", "answer": "A", "question_type": "open"}
    write_parquet(tmp_path / "Math/validation-0.parquet", [row])
    with pytest.raises(
        EmmaError, match=r"validation-0.parquet, row 1: the field 'options' must be a list as Python writes"
    ):
        task_of("mmmu").load(tmp_path)
