"""MMVP and FOIL: pairs that count together, labels that were corrected, orders of captions."""

from support.benchmark_files import perfect_answer, task_of, write_benchmark


def load(name, folder):
    write_benchmark(name, folder)
    return task_of(name), task_of(name).load(folder)


def test_mmvp_asks_with_letters(tmp_path):
    _, samples = load("mmvp", tmp_path)
    assert samples[2].prompt == (
        "Is the door open?\nA. Open\nB. Closed\nAnswer with the option's letter from the given choices directly."
    )
    assert samples[2].authors_instruction == samples[2].question == "Is the door open?"
    assert samples[2].images == (tmp_path / "MMVP Images/3.jpg",)


def test_mmvp_corrects_four_labels(tmp_path):
    _, samples = load("mmvp", tmp_path)
    assert [(sample.id, sample.target, sample.extra["published"]) for sample in samples[4:]] == [
        ("99", "B", "A"),
        ("100", "A", "B"),
    ]


def test_mmvp_scored_by_hand(tmp_path):
    task, samples = load("mmvp", tmp_path)
    # The first pair is right; the second half right; of the third both follow the published labels.
    answers = ["B", "Yes", "Closed.", "B", "A", "(b)"]
    rows = [task.answered(sample, answer) for sample, answer in zip(samples, answers)]
    assert [row.score for row in rows] == [1, 1, 1, 0, 0, 0]
    figures = task.summarize(rows)
    assert (figures["pair accuracy"].value, figures["pair accuracy"].of) == (1 / 3, 3)
    assert figures["accuracy"].value == 3 / 6
    assert figures['pair accuracy of always "B"'].value == 0
    assert (task.figures(rows[:3])["pair accuracy"].value, task.figures(rows[:3])["pair accuracy"].of) == (1, 1)


def test_the_authors_find_letters_in_words(tmp_path):
    task, samples = load("mmvp", tmp_path)
    # "A" and "B" occur in all of these, and the labels are those published.
    rows = [task.answered(sample, "And Both") for sample in samples]
    assert task.figures(rows)["pair accuracy"].value == 0
    assert task.authors_figures(rows)["pair accuracy"].value == 1
    right = [task.answered(sample, sample.target) for sample in samples]
    assert task.figures(right)["pair accuracy"].value == 1
    assert task.authors_figures(right)["pair accuracy"].value == 2 / 3


def test_foil_asks_both_orders(tmp_path):
    _, samples = load("foil", tmp_path)
    assert [sample.id for sample in samples] == ["770-A", "770-B", "771-A", "771-B", "772-A", "772-B"]
    assert samples[1].prompt == (
        "Which of the following captions better fits the image: \n (A)A cat on chair 0. \n (B)A dog on chair 0.\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert {sample.authors_instruction for sample in samples} == {
        "Which of the following captions better fits the image: "
    }
    assert len({sample.question for sample in samples}) == 6


def test_foil_scored_by_hand(tmp_path):
    task, samples = load("foil", tmp_path)
    # Both right; always A; nothing and wrong.
    rows = [task.answered(sample, answer) for sample, answer in zip(samples, ["A", "b", "A", "(A)", "neither", "A"])]
    assert [row.score for row in rows] == [1, 1, 1, 0, 0, 0]
    figures = task.summarize(rows)
    assert (figures["accuracy"].value, figures["accuracy"].of) == (0.5, 3)
    assert figures["both orders right"].value == 1 / 3
    assert (task.figures(rows[:3])["both orders right"].value, task.figures(rows[:3])["both orders right"].of) == (1, 1)
    assert figures['answers "A"'].value == 4 / 6
    assert figures["answers not parsed"].value == 1 / 6
    assert figures['accuracy of always "A"'].value == 1 / 2


def test_the_authors_draw_one_order_of_each_pair(tmp_path):
    task, samples = load("foil", tmp_path)
    # `random.Random(0)` gives 1, 1, 0: the order B of the first two pairs, A of the last.
    rows = [task.answered(sample, "A") for sample in samples]
    assert task.authors_figures(rows)["accuracy, order by seed 0"].value == 1 / 3
    assert (
        task.authors_figures([task.answered(s, perfect_answer(s)) for s in samples])["accuracy, order by seed 0"].value
        == 1
    )


def test_a_caption_with_two_foils_makes_two_pairs(tmp_path):
    import json

    write_benchmark("foil", tmp_path)
    path = tmp_path / "foilv1.0_test_2017.json"
    content = json.loads(path.read_text())
    content["annotations"].append({**content["annotations"][1], "caption": "A cow on chair 0."})
    path.write_text(json.dumps(content))
    samples = task_of("foil").load(tmp_path)
    assert [sample.id for sample in samples[:4]] == ["770-1-A", "770-1-B", "770-2-A", "770-2-B"]
