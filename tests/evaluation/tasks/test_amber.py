"""AMBER: each dimension by hand, descriptions by hand, its one score, the authors' scoring, optional packages."""

import sys
import types

import pytest
from support.benchmark_files import SplitWords, perfect_answer, task_of, write_benchmark

from emma_hf.evaluation.tasks import TASKS, amber_score
from emma_hf.evaluation.tasks.amber import AmberGenerative, AmberLanguage
from emma_hf.model.errors_emma import MissingPackageError


@pytest.fixture
def questions(tmp_path):
    write_benchmark("amber-discriminative", tmp_path)
    return task_of("amber-discriminative").load(tmp_path)


@pytest.fixture
def descriptions(tmp_path):
    write_benchmark("amber-generative", tmp_path)
    return task_of("amber-generative").load(tmp_path)


def values(figures):
    return {name: figure.value for name, figure in figures.items()}


def answered(samples, answers):
    task = task_of("amber-discriminative")
    return [task.answered(sample, answer) for sample, answer in zip(samples, answers)]


def test_the_truth_of_a_question_is_the_annotation_of_its_own_id(questions):
    assert [(sample.id, sample.target) for sample in questions] == [
        ("7", "no"), ("8", "no"), ("9", "no"),
        ("3", "yes"), ("4", "no"), ("5", "yes"), ("6", "no"),
        ("10", "yes"), ("11", "no"), ("12", "no"),
    ]  # fmt: skip
    assert questions[0].prompt == "Is there a thing 7 in this image?\nAnswer with yes or no"
    assert questions[0].question == questions[0].authors_instruction == "Is there a thing 7 in this image?"


def test_answers_scored_by_hand(questions):
    rows = answered(questions, ["no", "Yes", "no", "yes", "No.", "no", "A", "yes", "yes", "no"])
    figures = values(task_of("amber-discriminative").summarize(rows))
    # Existence: 2 of 3; all that said no are right.
    assert figures["accuracy, existence"] == 2 / 3
    assert (figures['precision of "no", existence'], figures['recall of "no", existence']) == (1, 2 / 3)
    # Attribute: yes and no right, no for yes, "A" for no.
    assert figures["accuracy, attribute"] == 2 / 4
    assert (figures['precision of "no", attribute'], figures['recall of "no", attribute']) == (1 / 2, 1 / 2)
    assert figures['F1 of "no", attribute'] == pytest.approx(1 / 2)
    assert figures['answers "yes", attribute'] == 1 / 4
    assert figures["accuracy, relation"] == 2 / 3
    # All: 6 of 10; no said 5 times, 4 of them right, of 7.
    assert figures["accuracy"] == 6 / 10
    assert (figures['precision of "no"'], figures['recall of "no"']) == (4 / 5, 4 / 7)
    assert figures['F1 of "no"'] == pytest.approx(2 * (4 / 5) * (4 / 7) / (4 / 5 + 4 / 7))
    assert figures["answers not parsed"] == 1 / 10


def test_the_line_of_a_model_that_always_says_no(questions):
    figures = values(task_of("amber-discriminative").summarize(answered(questions, map(perfect_answer, questions))))
    # Every question on existence is to be denied.
    assert figures['accuracy, existence of always "no"'] == figures['F1 of "no", existence of always "no"'] == 1
    assert figures['accuracy, attribute of always "no"'] == 1 / 2
    assert figures['accuracy, relation of always "no"'] == 2 / 3
    assert figures['accuracy, existence of always "yes"'] == 0


def test_the_authors_rule_gives_nothing_to_a_perfect_attribute_answerer(questions):
    task = task_of("amber-discriminative")
    perfect = answered(questions, map(perfect_answer, questions))
    assert task.figures(perfect)["accuracy"].value == 1
    figures = task.authors_figures(perfect)
    assert figures["accuracy, attribute"].value == 0
    # Ids 7 and 8 against truths of 8 and 9; the last is not counted as right.
    assert figures["accuracy, existence"].value == 2 / 3
    # The last has no next question and ends the script; of the two before it the last is not counted.
    assert (figures["accuracy, relation"].value, figures["accuracy, relation"].of) == (0, 2)
    wrong = answered(questions, ["yes" if sample.target == "no" else "no" for sample in questions])
    assert task.authors_figures(wrong)["accuracy, attribute"].value == 3 / 4
    # "No." is not exactly the answer.
    assert task.authors_figures(answered(questions, ["No."] * 10))["accuracy, existence"].value == 0


def test_five_descriptions_scored_by_hand(descriptions):
    task = task_of("amber-generative")
    first, second = descriptions
    answers = [
        # sky and person (by "man") are there, dog is not and was imagined; "the", "and" are no words of AMBER's.
        (first, "The sky, a man and a dog."),
        # orange is harmless, sand is the beach.
        (second, "Orange sand."),
        # bird was imagined, woman is not there and was not.
        (second, "a bird and a woman"),
        # Nothing of AMBER's vocabulary.
        (second, "Nice."),
        (second, " "),
    ]
    rows = [task.answered(sample, answer) for sample, answer in answers]
    assert [row.parsed for row in rows] == ["sky man dog", "orange sand", "bird woman", "", None]
    assert [row.score for row in rows] == pytest.approx([2 / 3, 1, 0, 1, 0])
    figures = task.summarize(rows)
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(
        {
            "CHAIR": 3 / 7,
            "Cover": (2 + 1 + 0 + 0 + 0) / (2 + 1 + 1 + 1 + 1),
            "Hal": 2 / 5,
            "Cog": (1 + 0 + 1 + 0 + 0) / (2 + 1 + 1 + 1 + 1),
            "answers not parsed": 1 / 5,
        }
    )


def test_similar_words_are_what_they_are_similar_to(tmp_path):
    write_benchmark("amber-generative", tmp_path)

    class Similar(SplitWords):
        def similar(self, first, second):
            return {first, second} in ({"cloud", "sky"}, {"woman", "dog"})

    task = AmberGenerative(Similar)
    first = task.load(tmp_path)[0]
    # Similar to what is there: no hallucination, though it is of the imagined ones as well.
    row = task.answered(first, "cloud")
    assert row.score == 1
    figures = values(task.figures([row]))
    assert (figures["CHAIR"], figures["Cover"], figures["Cog"]) == (0, 1 / 2, 1 / 2)


def test_the_score_of_a_perfect_model_is_100(questions, descriptions):
    generative, discriminative = task_of("amber-generative"), task_of("amber-discriminative")
    told = generative.figures([generative.answered(sample, perfect_answer(sample)) for sample in descriptions])
    said = discriminative.figures(answered(questions, map(perfect_answer, questions)))
    assert (told["CHAIR"].value, told["Cover"].value, told["Hal"].value, told["Cog"].value) == (0, 1, 0, 0)
    assert 100 * amber_score(told, said).value == 100
    silent = generative.figures([generative.answered(descriptions[0], "bird")])
    half = amber_score(silent, said)
    assert (half.value, half.of) == (0.5, 1 + 7)
    assert half.low <= half.value <= half.high


def test_both_tasks_in_one_run_have_the_figures_of_each(questions, descriptions, tmp_path):
    task = task_of("amber")
    samples = task.load(tmp_path)
    assert [sample.id for sample in samples] == [sample.id for sample in descriptions + questions]
    rows = [task.answered(sample, perfect_answer(sample)) for sample in samples]
    figures = task.summarize(rows)
    assert next(iter(figures.items())) == ("AMBER score", amber_score(figures, figures))
    for part, name in ((questions, "amber-discriminative"), (descriptions, "amber-generative")):
        own = task_of(name).figures([task_of(name).answered(sample, perfect_answer(sample)) for sample in part])
        assert own.items() <= figures.items()
    assert task.authors_figures(rows)["accuracy, attribute"].value == 0
    assert "AMBER score" not in task.figures(rows[:2])
    assert "AMBER score" not in task.figures(rows[2:])


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    write_benchmark("amber-generative", tmp_path)
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(MissingPackageError, match=r"need NLTK and spaCy.*pip install 'emma-hf\[evaluation\]'"):
        TASKS["amber-generative"].load(tmp_path)


class FakeLemmatizer:
    def lemmatize(self, word):
        return word.removesuffix("s")


def fake_packages(monkeypatch, tagged, vectors):
    """Stand-ins for NLTK and spaCy that do what AMBER's evaluation asks of them."""

    def load(name):
        assert name == "en_core_web_lg"
        return vectors()

    nltk = types.SimpleNamespace(
        stem=types.SimpleNamespace(WordNetLemmatizer=FakeLemmatizer), word_tokenize=str.split, pos_tag=tagged
    )
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))


class Vector(str):
    def similarity(self, other):
        return 0.81 if self[0] == other[0] else 0.8


def tag(words):
    return [(word, "NNS" if word.endswith("s") else "VB") for word in words]


def test_nouns_and_similarity_are_asked_of_nltk_and_spacy(monkeypatch):
    fake_packages(monkeypatch, tag, lambda: Vector)
    language = AmberLanguage()
    assert language.nouns("dogs run cats") == ["dog", "cat"]
    assert language.similar("dog", "duck")
    assert not language.similar("dog", "cat")


def raising(error):
    def function(*_):
        raise error

    return function


@pytest.mark.parametrize(
    ("tagged", "vectors", "told"),
    [
        (raising(LookupError("Resource punkt_tab not found.")), lambda: Vector, "nltk.downloader punkt_tab averaged_"),
        (tag, raising(OSError("Can't find model")), "python -m spacy download en_core_web_lg"),
    ],
)
def test_data_of_packages_that_are_missing_are_named(monkeypatch, tagged, vectors, told):
    fake_packages(monkeypatch, tagged, vectors)
    with pytest.raises(MissingPackageError, match=told):
        AmberLanguage()
