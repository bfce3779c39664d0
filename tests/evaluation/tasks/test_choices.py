"""Lettered options: ScienceQA, MMBench's rotations, MuirBench with several images and with one."""

import pytest
from PIL import Image
from support.benchmark_files import task_of, write_benchmark

from emma_hf.evaluation.tasks.choices import paste

LETTER = "Answer with the option's letter from the given choices directly."


def load(name, folder):
    write_benchmark(name, folder)
    return task_of(name), task_of(name).load(folder)


def test_scienceqa_asks_about_images_alone(tmp_path):
    _, samples = load("scienceqa", tmp_path)
    assert [sample.id for sample in samples] == ["4", "5", "7", "8"]
    hinted = samples[1]
    assert hinted.prompt == f"Context: Look at it.\nTwice.\nWhich is a rock?\nA. a bird\nB. granite\n{LETTER}"
    assert (hinted.question, hinted.authors_instruction) == ("Which is a rock?", "Context: Look at it.")
    assert hinted.images == (tmp_path / "test/5/image.png",)


def test_five_answers_of_scienceqa_scored_by_hand(tmp_path):
    task, (north, rock, wool, here) = load("scienceqa", tmp_path)
    answers = [(north, "A"), (rock, "B. granite"), (wool, "wool"), (here, "The answer is A."), (here, "A or so")]
    rows = [task.answered(sample, answer) for sample, answer in answers]
    assert [row.score for row in rows] == [1, 1, 1, 1, 0]
    figures = task.summarize(rows)
    assert (figures["accuracy"].value, figures["answers not parsed"].value) == (4 / 5, 1 / 5)
    assert [sample.kind for sample in (north, rock)] == ["social science", "natural science"]
    # The authors' script does not take an option's text.
    assert task.authors_figures(rows)["accuracy"].value == 3 / 5


def test_mmbench_makes_the_rotations(tmp_path):
    _, samples = load("mmbench-en", tmp_path)
    assert [sample.id for sample in samples] == [f"241-{n}" for n in range(4)] + [f"252-{n}" for n in range(2)] + [
        f"258-{n}" for n in range(3)
    ]
    assert [sample.target for sample in samples] == list("ADCB") + list("BA") + list("CBA")
    assert all(sample.extra["options"][sample.target] in ("cat", "blue", "above") for sample in samples)
    rotated = "A. dog\nB. cow\nC. pig\nD. cat"
    assert samples[1].prompt == f"Look at it.\nTwice.\nWhich one is right?\n{rotated}\n{LETTER}"
    assert (samples[1].question, samples[1].authors_instruction) == ("Which one is right?", "Look at it.")
    assert samples[4].prompt == f'Which "color"?\tOr none?\nA. red\nB. blue\n{LETTER}'
    assert samples[0].images[0]().size == (24 + 241 % 9 % 5, 20)


def test_mmbench_in_chinese_asks_in_chinese(tmp_path):
    _, samples = load("mmbench-cn", tmp_path)
    assert samples[0].prompt.endswith("D. pig\n请直接回答选项字母。")


def test_mmbench_scored_by_hand(tmp_path):
    task, samples = load("mmbench-en", tmp_path)
    # One wrong letter in the first question, all right in the second, a letter with a mark in the third.
    answers = ["A", "D", "C", "C", "B", " A ", "C", "B.", "A"]
    rows = [task.answered(sample, answer) for sample, answer in zip(samples, answers)]
    assert [row.score for row in rows] == [1, 1, 1, 0, 1, 1, 1, 0, 1]
    figures = task.summarize(rows)
    assert figures["circular accuracy"].value == 1 / 3
    assert figures["circular accuracy"].of == 3
    assert figures["accuracy over all rotations"].value == 7 / 9
    assert figures["accuracy of the first order"].value == 3 / 3
    assert [sample.kind for sample in samples[3:5]] == ["object_localization", "attribute_recognition"]
    assert figures["answers not parsed"].value == 1 / 9
    assert figures['circular accuracy of always "A"'].value == 0
    # Of a question of which not all rotations were asked it cannot be said.
    assert task.figures(rows[:3])["circular accuracy"].of == 0
    assert (task.figures(rows[:5])["circular accuracy"].value, task.figures(rows[:5])["circular accuracy"].of) == (0, 1)


def test_images_are_pasted_side_by_side_on_black():
    red, white = Image.new("RGB", (2, 3), "red"), Image.new("L", (3, 1), 255)
    whole = paste([lambda: red, lambda: white])()
    assert whole.size == (5, 3)
    assert [whole.getpixel(place) for place in ((0, 2), (1, 0), (2, 0), (4, 0), (2, 1))] == [
        (255, 0, 0), (255, 0, 0), (255, 255, 255), (255, 255, 255), (0, 0, 0),
    ]  # fmt: skip


def test_muirbench_with_several_images(tmp_path):
    pytest.importorskip("pyarrow")
    _, samples = load("muirbench", tmp_path)
    assert samples[0].prompt == f"Do <image> and <image> match?\nA. Yes\nB. No\nC. None of them\n{LETTER}"
    assert samples[1].prompt == f"Which fits <image>?\nA. <image>\nB. <image>\n{LETTER}"
    assert [len(sample.images) for sample in samples] == [2, 3, 2, 2]
    assert samples[1].authors_instruction == "Which fits <image>?"
    assert samples[1].question == "Which fits ?"


def test_muirbench_with_images_pasted_into_one(tmp_path):
    pytest.importorskip("pyarrow")
    _, samples = load("muirbench-pasted", tmp_path)
    ending = "Answer with the option's letter A, B directly ."
    assert samples[0].prompt.startswith("Do <image> and Right Image match?\nA. Yes\n")
    assert samples[1].prompt == f"Which fits <image>?\nA. Image 2\nB. Image 3\n{ending}"
    assert samples[2].prompt == f"How many dogs are in all?\nA. one\nB. two\n{ending}"
    # 2 + 1 and 2 + 2 pixels more than 24.
    assert [sample.images[0]().size for sample in samples[1:3]] == [(26 + 27 + 28, 20), (27 + 28, 20)]


def test_five_answers_of_muirbench_scored_by_hand(tmp_path):
    pytest.importorskip("pyarrow")
    task, (match, fits, dogs, older) = load("muirbench", tmp_path)
    answers = [(match, "A. Yes"), (fits, "B"), (dogs, "two"), (older, "b"), (older, "neither")]
    rows = [task.answered(sample, answer) for sample, answer in answers]
    assert [row.score for row in rows] == [1, 1, 1, 0, 0]
    figures = task.summarize(rows)
    assert (figures["accuracy"].value, figures["answers not parsed"].value) == (3 / 5, 1 / 5)
    assert [sample.kind for sample in (match, dogs)] == ["Scene Understanding", "Counting"]
    authors = task.authors_figures(rows)
    assert {name: figure.value for name, figure in authors.items()} == {
        "accuracy": 1 / 5,
        "accuracy, Ordered_Pages": 0,
        "accuracy, Partial Similarity": 1 / 2,
    }


def test_images_that_no_place_is_named_for_stand_in_front(tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    write_benchmark("muirbench", tmp_path)
    path = tmp_path / "data/test-00000-of-00001.parquet"
    rows = pyarrow.read_table(path).to_pylist()
    rows[0]["image_list"].append(rows[0]["image_list"][0])
    pyarrow.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
    sample = task_of("muirbench").load(tmp_path)[0]
    assert sample.prompt.startswith("Do (image) and (image) match?")
    assert len(sample.images) == 3
