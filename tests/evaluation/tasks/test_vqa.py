"""Free answers: soft accuracy by hand, prompts as published."""

import pytest
from support.benchmark_files import people, task_of, write_benchmark

from emma_hf.evaluation.tasks.vqa import soft_accuracy


@pytest.mark.parametrize(
    ("votes", "accuracy"),
    # Ten people; n agree: the mean over leaving each out of min(n' / 3, 1), n' = n - 1 for n of them and n for the rest.
    [(0, 0), (1, (0 + 9 * 1 / 3) / 10), (2, (2 / 3 + 8 * 2 / 3) / 10), (3, (3 * 2 / 3 + 7) / 10), (4, 1), (10, 1)],
)
def test_soft_accuracy(votes, accuracy):
    assert soft_accuracy("yes", people(("yes", votes), ("no", 10 - votes))) == pytest.approx(accuracy)


def test_five_answers_of_vqav2_scored_by_hand(tmp_path):
    write_benchmark("vqav2", tmp_path)
    task = task_of("vqav2")
    day, dog, cats, car = task.load(tmp_path)
    answers = [(day, "Yes."), (dog, "yes"), (cats, "three"), (cats, "two"), (car, "the red")]
    rows = [task.answered(sample, answer) for sample, answer in answers]
    assert [row.parsed for row in rows] == ["yes", "yes", "3", "2", "red"]
    assert [row.score for row in rows] == pytest.approx([1, 0.3, 1, 1, 0.9])
    figures = task.summarize(rows)
    assert figures["accuracy"].value == pytest.approx(4.2 / 5)
    assert [sample.kind for sample in (day, dog, cats, car)] == ["yes/no", "yes/no", "number", "other"]
    assert figures['accuracy of always "no"'].value == pytest.approx((0 + 1 + 0 + 0 + 0) / 5)
    assert day.prompt == "Is it day?\nAnswer the question using a single word or phrase."
    assert day.question == day.authors_instruction == "Is it day?"
    assert day.images == (tmp_path / "val2014/COCO_val2014_000000000100.jpg",)


def test_okvqa_names_its_categories(tmp_path):
    write_benchmark("okvqa", tmp_path)
    task = task_of("okvqa")
    assert [sample.kind for sample in task.load(tmp_path)][1:3] == [
        "Vehicles and Transportation",
        "Brands, Companies and Products",
    ]
    assert task.constants == ()


def test_five_answers_of_vizwiz_scored_by_hand(tmp_path):
    write_benchmark("vizwiz", tmp_path)
    task = task_of("vizwiz")
    nothing, color, milk, readable = task.load(tmp_path)
    assert nothing.question == "What is this?"
    assert nothing.prompt.split("\n")[1:] == [
        "When the provided information is insufficient, respond with 'Unanswerable'.",
        "Answer the question using a single word or phrase.",
    ]
    answers = [(nothing, "Unanswerable"), (color, "Unanswerable"), (milk, "no"), (readable, "no"), (readable, "")]
    rows = [task.answered(sample, answer) for sample, answer in answers]
    # Two of ten: (2 * 1/3 + 8 * 2/3) / 10 = 0.6.
    assert [row.score for row in rows] == pytest.approx([1, 0.6, 0, 1, 0])
    figures = task.summarize(rows)
    assert figures["accuracy"].value == pytest.approx(2.6 / 5)
    assert figures['answers "unanswerable"'].value == 2 / 5
    assert figures["answers not parsed"].value == 1 / 5
    assert figures['accuracy of always "unanswerable"'].value == pytest.approx((1 + 0.6 + 0 + 1 + 1) / 5)


def test_textvqa_with_and_without_ocr_tokens(tmp_path):
    write_benchmark("textvqa", tmp_path)
    ending = "\nAnswer the question using a single word or phrase."
    prompts = [sample.prompt for sample in task_of("textvqa").load(tmp_path)]
    assert prompts[0] == f"What is the brand?\nReference OCR token: NOKIA, STOP{ending}"
    assert prompts[2] == f"Is it open?\nReference OCR token: {ending}"
    (tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    assert task_of("textvqa-no-ocr").load(tmp_path)[0].prompt == f"What is the brand?{ending}"


def test_five_answers_of_textvqa_scored_by_hand(tmp_path):
    write_benchmark("textvqa", tmp_path)
    task = task_of("textvqa")
    samples = task.load(tmp_path)
    rows = [task.answered(samples[n], a) for n, a in [(0, "Nokia"), (1, "stop"), (1, "no"), (3, "twelve"), (3, "12.")]]
    assert [row.score for row in rows] == [1, 1, 1, 0, 1]
    assert task.figures(rows)["accuracy"].value == 4 / 5


def test_five_answers_of_gqa_scored_by_hand(tmp_path):
    write_benchmark("gqa", tmp_path)
    task = task_of("gqa")
    samples = task.load(tmp_path)
    rows = [task.answered(sample, a) for sample, a in zip(samples, ["Yes.", "no", "yes", "the man", "Fire Hydrant"])]
    assert [row.score for row in rows] == [1, 1, 0, 0, 1]
    assert task.figures(rows)["accuracy"].value == 3 / 5
    assert [sample.kind for sample in samples] == ["verify"] * 3 + ["query"] * 2
