"""`examples/batch_inference.py`: two Ray workers answer as `generate` alone does, and bad rows cost only themselves."""

import csv
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.scenes import Scene

pytest.importorskip("ray", reason="batches on many machines need ray: `make test-app`")
import pyarrow
from pyarrow import parquet

SCRIPT = Path(__file__).parents[2] / "examples" / "batch_inference.py"
# In a rendered prompt, the last of them would seem to end at the word.
QUESTIONS = ("How many things are there?", "Is there a heart?", "What does ASSISTANT: mean here?")


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=1200,
        # A Ray that the machine happens to run is not the test's, and its workers need not be more polite than the tests.
        env={
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            "RAY_worker_niceness": "0",
        },
    )  # fmt: skip


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def generated(folder: Path, rows: list[dict]) -> list[str]:
    """The answers of one batch by the processor and `generate` alone."""
    processor = EmmaProcessor.from_pretrained(EMMA_TINY)
    model = EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, dtype="auto").eval()
    messages = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "url": str(folder / row["image"])},
                    {"type": "text", "text": row["question"]},
                ],
            }
        ]
        for row in rows
    ]
    prompts = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [[folder / row["image"]] for row in rows]
    instructions = [[row["question"]] for row in rows]
    inputs = processor(
        images=images, text=prompts, instructions=instructions, padding=True, padding_side="left", return_tensors="pt"
    )
    tokens = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=64, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four drawn scenes, and a file that is none."""
    folder = tmp_path_factory.mktemp("table")
    for seed in range(4):
        draw(Scene.random(seed)).save(folder / f"scene-{seed}.png")
    (folder / "broken.png").write_bytes((folder / "scene-0.png").read_bytes()[:500])
    return folder


@pytest.mark.slow
def test_two_workers_answer_as_generate_does(folder, tmp_path):
    rows = [
        {"id": 100 - index, "image": f"scene-{index % 4}.png", "question": QUESTIONS[index % 3]} for index in range(11)
    ]
    Image.new("RGB", (32, 32), "red").save(folder / "drawing.eps")
    bad = {
        2: ("image", "missing.png", "There is no picture at 'missing.png'."),
        3: ("image", "broken.png", "cannot be decoded"),
        7: ("image", "drawing.eps", "must be one of PNG, JPEG, WEBP, GIF, BMP, TIFF: got"),
        5: ("image", "", "There is no picture: `image` is empty."),
        6: ("question", "", "`question` must be words: got ''."),
        8: ("question", "heart " * 500, "Prompt and answer must fit into the model's 512 tokens"),
    }
    for index, (column, value, _) in bad.items():
        rows[index][column] = value
    with open(folder / "questions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "image", "question"])
        writer.writeheader()
        writer.writerows(rows)

    output = tmp_path / "answers.jsonl"
    done = run(folder / "questions.csv", output, "--workers", 2, "--batch-size", 4, "--max-new-tokens", 64)
    assert done.returncode == 0, done.stderr
    assert "11 rows, 6 of them with an error" in done.stderr
    answered = rows_of(output)
    assert [{name: row[name] for name in ("id", "image", "question")} for row in answered] == rows
    for index, (_, _, message) in bad.items():
        assert answered[index]["answer"] is None
        assert message in answered[index]["error"]
    for start in range(0, len(rows), 4):
        good = [index for index in range(start, min(start + 4, len(rows))) if index not in bad]
        expected = generated(folder, [rows[index] for index in good])
        assert [answered[index]["answer"] for index in good] == expected
        assert all(answered[index]["error"] is None for index in good)
        assert all(expected)
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.slow
def test_pictures_in_parquet_are_read_and_not_written(folder, tmp_path):
    pictures = [(folder / f"scene-{seed}.png").read_bytes() for seed in (0, 1)]
    table = pyarrow.table({"image": [{"bytes": data, "path": None} for data in pictures], "question": QUESTIONS[:2]})
    parquet.write_table(table, tmp_path / "questions.parquet")
    done = run(tmp_path / "questions.parquet", tmp_path / "answers.parquet", "--max-new-tokens", 64)
    assert done.returncode == 0, done.stderr
    answers = parquet.read_table(tmp_path / "answers.parquet")
    assert answers.column_names == ["question", "answer", "error"]
    rows = [{"image": f"scene-{seed}.png", "question": QUESTIONS[seed]} for seed in (0, 1)]
    assert answers["answer"].to_pylist() == generated(folder, rows)


@pytest.mark.slow
def test_a_folder_of_tables_beside_their_pictures(folder, tmp_path):
    """Names of pictures stay, also in the string type that pandas 3 writes."""
    # Other tests write tables of other kinds there.
    tables = shutil.copytree(folder, tmp_path / "tables", ignore=shutil.ignore_patterns("*.csv", "*.jsonl"))
    names = pyarrow.array(["scene-0.png", "scene-1.png"], pyarrow.large_string())
    parquet.write_table(pyarrow.table({"image": names, "question": QUESTIONS[:2]}), tables / "questions.parquet")
    done = run(tables, tmp_path / "answers.parquet", "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    answers = parquet.read_table(tmp_path / "answers.parquet")
    assert answers["image"].to_pylist() == names.to_pylist()
    assert answers["error"].to_pylist() == [None, None]


@pytest.mark.slow
def test_a_table_without_the_columns_is_refused(tmp_path):
    (tmp_path / "table.csv").write_text("picture,question\na.png,What?\n")
    done = run(tmp_path / "table.csv", tmp_path / "answers.csv")
    assert done.returncode == 2
    assert "the columns `image` and `question`" in done.stderr
    assert "['picture', 'question']" in done.stderr


def test_arguments_that_cannot_be(tmp_path, capsys):
    # Ray is not started for these.
    main = runpy.run_path(str(SCRIPT))["main"]
    table = tmp_path / "table.csv"
    table.write_text("image,question\na.png,What?\n")
    for arguments, message in (
        ([tmp_path / "none.csv", "out.csv"], "There is no table at"),
        (
            [__file__, "out.csv"],
            "A table must be a file, or a folder of files, of one of the kinds .csv, .jsonl, .parquet",
        ),
        ([table, "out.xml"], "The answers must be one of .csv, .jsonl, .parquet: got 'out.xml'."),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(table), "out.csv", "--workers", "0"])
    assert "--workers must be at least 1: got 0" in capsys.readouterr().err
