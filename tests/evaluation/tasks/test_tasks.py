"""All tasks: what perfect and constant answerers get, and what a broken folder is told."""

import math
import shutil
from pathlib import Path

import pytest
from PIL import Image
from support.benchmark_files import WRITERS, perfect_answer, task_of, write_benchmark

from emma_hf.evaluation.tasks import TASKS, Sample, Task
from emma_hf.model.errors_emma import EmmaError

PARQUET = ("mmmu", "mmmu-pasted", "muirbench", "muirbench-pasted")
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(name in PARQUET and not shutil.which, reason="")) for name in TASKS
]

# The headline of the perfect answerer, of always "yes", "no" and "A", computed by hand from the rows of the builders.
HEADLINES = {
    # "red" has three of ten votes: three people leave 2/3, seven leave 1. One of ten "yes" is (9 * 1/3) / 10 = 0.3.
    "vqav2": ((1 + 1 + 1 + 0.9) / 4, (1 + 0.3) / 4, 1 / 4, 0),
    "okvqa": ((1 + 1 + 1 + 0.9) / 4, (1 + 0.3) / 4, 1 / 4, 0),
    "vizwiz": (1, 1 / 4, 1 / 4, 0),
    "textvqa": (1, 1 / 4, 1 / 4, 0),
    "textvqa-no-ocr": (1, 1 / 4, 1 / 4, 0),
    "gqa": (1, 1 / 5, 2 / 5, 0),
    "scienceqa": (1, 0, 0, 1 / 2),
    # No letter is right in all rotations.
    "mmbench-en": (1, 0, 0, 0),
    "mmbench-cn": (1, 0, 0, 0),
    # "Yes" and "No" are texts of options of one question, whose answer is yes.
    "muirbench": (1, 1 / 4, 0, 1 / 2),
    "muirbench-pasted": (1, 1 / 4, 0, 1 / 2),
    "mmmu": (1, 0, 0, 1 / 4),
    "mmmu-pasted": (1, 0, 0, 1 / 4),
    "mathvista": (1, 0, 0, 1 / 5),
    # "Yes" and "No" are texts of options of the first pair, and each is right for one of its images.
    "mmvp": (1, 0, 0, 0),
    "pope": (1, 4 / 9, 5 / 9, 0),
    "amber-discriminative": (1, 3 / 10, 7 / 10, 0),
    # CHAIR: no answer names an object that is not there, and these three name none at all.
    "amber-generative": (0, 0, 0, 0),
    # (1 - CHAIR + F1) / 2; of seven no among ten the F1 of always "no" is 2 * 0.7 / 1.7.
    "amber": (1, 1 / 2, (1 + 1.4 / 1.7) / 2, 1 / 2),
    "foil": (1, 0, 0, 1 / 2),
}


def test_the_documentation_names_every_task_with_its_files_and_their_source():
    page = (Path(__file__).parents[3] / "docs/evaluation.md").read_text(encoding="utf-8")
    for name, task in TASKS.items():
        lines = [line for line in page.splitlines() if f"`{name}`" in line and "http" in line]
        assert len(lines) == 1, name
        for file, source in task.files.items():
            # Files of one family are named by what differs.
            assert f"`{file}`" in lines[0] or f"-{file.rpartition('-')[2]}`" in lines[0], file
            address = next(part for part in source.replace(",", " ").split() if part.startswith("http"))
            assert address in page


@pytest.fixture(params=list(TASKS))
def task(request) -> Task:
    if request.param in PARQUET:
        pytest.importorskip("pyarrow")
    return task_of(request.param)


@pytest.fixture
def folder(task, tmp_path) -> Path:
    write_benchmark(task.name, tmp_path)
    return tmp_path


def rows_of(task: Task, samples: list[Sample], answer) -> list:
    return [task.answered(sample, answer(sample)) for sample in samples]


def test_every_task_has_rows_and_a_name_of_its_own():
    assert list(WRITERS) == list(TASKS) == list(HEADLINES)
    assert all(task.name == name for name, task in TASKS.items())
    assert len({task.title for task in TASKS.values()}) == len(TASKS)


def test_the_headlines_of_perfect_and_constant_answers(task, folder):
    samples = task.load(folder)
    answers = (perfect_answer, lambda _: "yes", lambda _: "No.", lambda _: "A")
    headlines = [next(iter(task.summarize(rows_of(task, samples, answer)).values())).value for answer in answers]
    assert headlines == pytest.approx(HEADLINES[task.name])


def test_every_figure_lies_in_its_interval(task, folder):
    samples = task.load(folder)
    for answer in (perfect_answer, lambda _: "yes", lambda _: "", lambda sample: "A" if len(sample.id) % 2 else "no"):
        rows = rows_of(task, samples, answer)
        figures = {**task.summarize(rows), **task.authors_figures(rows)}
        for name, figure in figures.items():
            assert 0 <= figure.low <= figure.value + 1e-12, name
            assert figure.value - 1e-12 <= figure.high <= 1, name
            assert figure.of == int(figure.of), name
        if not rows_of(task, samples, answer)[0].answer:
            assert figures["answers not parsed"].value == 1


def test_a_constant_answer_gets_what_the_summary_says(task, folder):
    samples = task.load(folder)
    perfect = rows_of(task, samples, perfect_answer)
    figures, compared = task.summarize(perfect), task.compared(task.figures(perfect))
    for constant in task.constants:
        own = task.figures(rows_of(task, samples, lambda _, constant=constant: constant))
        assert [figures[f'{name} of always "{constant}"'] for name in compared] == [own[name] for name in compared]
    assert sum("of always" in name for name in figures) == len(task.constants) * len(compared)


def test_the_samples_are_whole(task, folder):
    samples = task.load(folder)
    assert len({sample.id for sample in samples}) == len(samples) > 2 - (task.name == "amber-generative")
    for sample in samples:
        assert sample.question
        assert sample.authors_instruction in (sample.prompt, *sample.prompt.split("\n"))
        assert "<image>" not in sample.question
        assert sample.prompt.count("<image>") in (0, len(sample.images))
        assert sample.images
        for source in sample.images:
            image = Image.open(source) if isinstance(source, Path) else source()
            assert image.convert("RGB").height == 20
    assert samples == [*task.load(folder)] or task.name in PARQUET or task.name.startswith("mmbench")


def test_no_rows_are_figures_of_nothing(task, folder):
    figures = task.figures([])
    assert all(figure.of == 0 and not math.isnan(figure.value) for figure in figures.values())


def test_a_missing_file_is_named_with_its_source(task, folder):
    for name, source in task.files.items():
        path = next(folder.glob(name))
        away = folder.parent / "away"
        path.rename(away)
        # Of a pattern each match is one of several.
        others = [*folder.glob(name)]
        for number, other in enumerate(others):
            other.rename(folder.parent / f"other{number}")
        with pytest.raises(EmmaError) as raised:
            task.load(folder)
        assert f"The task {task.name} needs {name} in {folder}" in str(raised.value)
        assert source in str(raised.value)
        for number, other in enumerate(others):
            (folder.parent / f"other{number}").rename(other)
        away.rename(path)
    assert task.load(folder)
