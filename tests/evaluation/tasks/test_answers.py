"""What answers say: letters, yes and no, and the words that VQA compares."""

import pytest

from emma_hf.evaluation.tasks.answers import (
    is_right,
    lettered,
    option_lines,
    parse_letter,
    parse_yes_no,
    process_answer,
)

OPTIONS = {"A": "a red dog", "B": "Blue.", "C": "none", "D": "none"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" b. ", "B"),
        ("(A)", "A"),
        ("(c) it is", "C"),
        ("D: none", "D"),
        ("A. a red dog", "A"),
        ("The answer is B.", "B"),
        ("I would say the answer is (C), not D", "C"),
        ("Answer: D", "D"),
        ("option A", "A"),
        ("the answer is b.", "B"),
        ("the Answer is (a)", "A"),
        ("option c", "C"),
        ("The answer is b because it is blue", "B"),
        ("answer: c; sure", "C"),
        ("The answer is a!", "A"),
        ("the answer is a - red", "A"),
        ("the answer is a\nred", "A"),
        ("blue", "B"),
        ("A red dog.", "A"),
        # Not told: two options, another letter, an article, one text of two options, nothing.
        ("option A or option B", None),
        ("E", None),
        ("A blue dog", None),
        ("The answer is a blue dog.", None),
        ("The answer is a-frames", None),
        ("The answer is blue dogs", None),
        ("Answer: a dog, option B", "B"),
        ("none", None),
        ("And", None),
        ("", None),
        (".", None),
    ],
)
def test_the_letter_of_an_answer(answer, letter):
    assert parse_letter(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("Yes, there is no doubt", "yes"),
        ("There is not a dog", "no"),
        ("It isn't", "no"),
        ("I think yes", "yes"),
        ("perhaps yes or no", None),
        ("A", None),
        ("nobody", None),
        ("", None),
    ],
)
def test_yes_and_no(answer, word):
    assert parse_yes_no(answer) == word


@pytest.mark.parametrize(
    ("answer", "processed"),
    # As EvalAI's processor of VQA leaves them.
    [
        ("The Dog.", "dog"),
        ("Two", "2"),
        ("none", "0"),
        ("a", ""),
        ("don't know", "don't know"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("its", "its"),
        ("the man's hat", "man 's hat"),
        ("red/white", "red white"),
        ("red / white", "red white"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("black and-white!", "black and white"),
        ("yes\n", "yes"),
    ],
)
def test_answers_as_vqa_compares_them(answer, processed):
    assert process_answer(answer) == processed


def test_options_have_letters_and_lines():
    assert lettered(["x", "y"]) == {"A": "x", "B": "y"}
    assert option_lines(lettered(["x", "y"])) == "A. x\nB. y"


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("Red", "red", True),
        (" red. ", "Red", True),
        ("Red", "Red.", True),
        ("dark red", "red", False),
        (" 2", "2", True),
        ("Redder", "Red", False),
        ("", "no", False),
    ],
)
def test_case_and_a_final_period_do_not_matter(prediction, answer, right):
    assert is_right(prediction, answer) is right
