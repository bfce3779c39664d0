"""POPE: counts by hand, the share of yes among the predictions, LLaVA's reading of answers."""

import pytest
from support.benchmark_files import task_of, write_benchmark


@pytest.fixture
def samples(tmp_path):
    write_benchmark("pope", tmp_path)
    return task_of("pope").load(tmp_path)


def values(figures):
    return {name: figure.value for name, figure in figures.items()}


def test_questions_are_asked_in_short(samples):
    assert [sample.id for sample in samples[:3]] == ["random-1", "random-2", "popular-1"]
    assert samples[0].prompt == (
        "Is there a random thing in the image?\nAnswer the question using a single word or phrase."
    )
    assert samples[0].authors_instruction == samples[0].question == "Is there a random thing in the image?"
    assert [sample.kind for sample in samples] == ["random"] * 2 + ["popular"] * 3 + ["adversarial"] * 4


def test_five_answers_scored_by_hand(samples):
    task = task_of("pope")
    # Truths: yes, no, yes, no, no.
    answers = ["Yes.", "Yes, I see it", "no", "There is not", "maybe"]
    rows = [task.answered(sample, answer) for sample, answer in zip(samples, answers)]
    figures = values(task.summarize(rows))
    assert figures["accuracy"] == 2 / 5
    assert figures['precision of "yes"'] == 1 / 2
    assert figures['recall of "yes"'] == 1 / 2
    assert figures['F1 of "yes"'] == pytest.approx(1 / 2)
    assert figures['answers "yes"'] == 2 / 5
    assert figures["answers not parsed"] == 1 / 5
    assert figures["accuracy, random"] == 1 / 2
    assert figures["accuracy, popular"] == 1 / 3
    assert figures['answers "yes", popular'] == 0
    assert figures['accuracy of always "no"'] == 3 / 5
    assert "accuracy, adversarial" not in figures


def test_a_model_that_never_says_yes_has_a_precision_of_zero(samples):
    task = task_of("pope")
    figures = task.figures([task.answered(sample, "no") for sample in samples])
    assert (figures['precision of "yes"'].value, figures['precision of "yes"'].of) == (0, 0)
    assert figures['recall of "yes"'].value == figures['F1 of "yes"'].value == figures['answers "yes"'].value == 0
    assert figures["accuracy"].value == 5 / 9


def test_llavas_script_takes_anything_for_yes(samples):
    task = task_of("pope")
    # Truths: yes, no, yes, no, no. It reads yes, yes, no, yes and no.
    answers = ["A", "isn't", "not sure. Yes", "Nothing", "perhaps, no"]
    rows = [task.answered(sample, answer) for sample, answer in zip(samples, answers)]
    figures = values(task.authors_figures(rows))
    assert figures["accuracy"] == 2 / 5
    assert figures['answers "yes"'] == 3 / 5
    assert figures['precision of "yes"'] == 1 / 3
