"""MathVista: its queries, what is extracted from answers, the authors' rule."""

import pytest
from support.benchmark_files import task_of, write_benchmark

from emma_hf.evaluation.tasks.mathvista import parse_list, parse_number


@pytest.fixture
def samples(tmp_path):
    write_benchmark("mathvista", tmp_path)
    return task_of("mathvista").load(tmp_path)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("14", "14"),
        ("The missing number is 14.", "14"),
        ("2 and 3 make 5, so the answer is 5 apples", "5"),
        ("3 + 4 = 7", "7"),
        ("Luca needs $1.45", "1.45"),
        ("1,234", "1234"),
        ("-.5", "-.5"),
        ("between 2 and 3", None),
        ("fourteen", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(answer, number):
    assert parse_number(answer) == number


def test_the_list_of_an_answer():
    assert parse_list("It is [2007, 2008.0].") == parse_list("[2007,2008]") == "[2007.0, 2008.0]"
    assert parse_list("between 2007 and 2008") is None


def test_queries_are_those_of_mathvista(samples):
    given, chosen, integer, price, years = samples
    assert given.prompt == "Hint: Choose.\nQuestion: What fraction is blue?"
    assert chosen.prompt == (
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
        "Question: Which?\nChoices:\n(A) larger\n(B) smaller"
    )
    assert integer.prompt.startswith(
        "Hint: Please answer the question requiring an integer answer and provide the final"
    )
    assert price.prompt == (
        "Hint: Please answer the question requiring a floating-point number with two decimal places and provide the "
        "final value, e.g., 1.23, 1.34, 1.45, at the end.\nQuestion: How much does it cost? (Unit: $)"
    )
    assert "[1, 2, 3], [1.2, 1.3, 1.4], at the end.\n" in years.prompt
    assert chosen.authors_instruction == chosen.prompt.split("\n")[0]
    assert chosen.question == "Which?"


def test_the_authors_show_no_image(samples, tmp_path):
    task = task_of("mathvista")
    blind = task.load(tmp_path, authors=True)
    assert [sample.prompt for sample in blind] == [sample.prompt for sample in samples]
    assert not any(sample.images for sample in blind)
    assert all(len(sample.images) == 1 for sample in samples)


def test_five_answers_scored_by_hand(samples):
    task = task_of("mathvista")
    answers = ["The answer is (A) 3/11.", "larger", "14.0", "$1.449", "[2007, 2008]"]
    rows = [task.answered(sample, answer) for sample, answer in zip(samples, answers)]
    assert [row.parsed for row in rows] == ["A", "A", "14.0", "1.449", "[2007.0, 2008.0]"]
    assert [row.score for row in rows] == [1, 0, 1, 1, 1]
    figures = task.summarize(rows)
    assert figures["accuracy"].value == 4 / 5
    assert samples[1].kind == "geometry problem solving"
    # Their text occurs in the first, the third and the last.
    assert task.authors_figures(rows)["accuracy"].value == 3 / 5


def test_a_number_that_never_ends_is_only_wrong(samples):
    task = task_of("mathvista")
    assert task.answered(samples[2], "1" * 900).score == task.answered(samples[3], "1" * 900).score == 0
