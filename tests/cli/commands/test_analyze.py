"""`emma-hf analyze`: which words are what, its errors, and its report."""

import json
import sys

import pytest
from support.analyzed import small, small_rows

from emma_hf.analysis.figures import FIGURES
from emma_hf.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small model, images and a file of questions."""
    folder = tmp_path_factory.mktemp("analyze")
    model, processor = small()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows = []
    for number, row in enumerate(small_rows()):
        row.image.save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": row.question, "answer": row.answer, "kind": row.kind})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "broken.jsonl").write_text(json.dumps({"image": "0.png", "question": "Who?", "answer": "Me"}) + "\n{}")
    (folder / "same.jsonl").write_text("\n".join([json.dumps({"image": "0.png", "question": "Who?"})] * 2))
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def test_a_report_of_a_file_of_questions(here, tmp_path, capfd, monkeypatch):
    # The figures have tests of their own, and take their time.
    monkeypatch.setattr("emma_hf.analysis.figures.FIGURES", FIGURES[:1])
    output = tmp_path / "out"
    arguments = ["analyze", "model", "1.png", "Is there a cross?", "--questions", "rows.jsonl", "--max-new-tokens", "2"]
    assert main([*arguments, "--count", "4", "--seed", "3", "--output", str(output)]) == 0
    out, err = capfd.readouterr()
    result = json.loads((output / "analysis.json").read_text())
    assert out.splitlines() == result["verdict"]
    assert len(result["verdict"]) == 3
    assert result["seed"] == 3
    assert [row["question"] for row in result["rows"]] == [row.question for row in small_rows()[:4]]
    assert [example["question"] for example in result["examples"]] == ["Is there a cross?"]
    assert (output / "example-1-dark.png").is_file()
    assert f"wrote {output / 'report.html'}" in err
    for bar in ("encoding images", "answers (own)", "mutual information"):
        assert f"{bar}:" in err


def test_named_images_are_questions_where_there_is_no_file(here, monkeypatch, capfd):
    seen = {}

    def analyze(model, processor, rows, examples, *arguments, **options):
        seen.update(rows=rows, examples=examples)
        return {"verdict": ["a", "b", "c"]}

    monkeypatch.setattr("emma_hf.analysis.analyze", analyze)
    assert main(["analyze", "model", "0.png", "Who?", "1.png", "Where?"]) == 0
    assert capfd.readouterr().out == "a\nb\nc\n"
    assert seen["rows"] == seen["examples"]
    assert [row.question for row in seen["rows"]] == ["Who?", "Where?"]
    # emma-tiny draws its own scenes beside what is named.
    assert main(["analyze", "0.png", "Who?", "--count", "9"]) == 0
    assert [row.question for row in seen["examples"]] == ["Who?"]
    assert len(seen["rows"]) == 9
    assert {row.kind for row in seen["rows"]} == {
        "colour",
        "shape",
        "size",
        "count",
        "existence",
        "position",
        "side",
        "same",
    }
    assert all(row.answer for row in seen["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model"], "Pass `--questions FILE`, or IMAGE QUESTION pairs; emma-tiny alone draws its own"),
        (["model", "--questions", "none.jsonl"], "there is none at none.jsonl"),
        (["model", "--questions", "broken.jsonl"], "Row 2 of broken.jsonl must have `image`"),
        (["model", "--questions", "same.jsonl"], "there must be 2 at least: row 1 ('Who?') has none"),
        (["model", "0.png", "Who?"], "there must be 2 at least: row 1 ('Who?') has none"),
        (["model", "none.png", "Who?", "0.png", "Where?"], "none.png"),
        (["model", "0.png", " "], "A question must have words: got ' '"),
        (["model", *["0.png", "Who?"] * 5], "4 images with a question at most: got 5"),
        (["--max-new-tokens", "0"], "`--max-new-tokens` must be at least 1: got 0"),
        (["--count", "1"], "`--count` must be at least 2, as questions are compared: got 1"),
        (["--dtype", "int"], "must be auto, float32, float16 or bfloat16: got 'int'"),
        (["--output", "model"], "OUTPUT must not exist yet: model does"),
        (["none"], "neither a folder nor a Hub id"),
        # Where no scenes are drawn, any seed will do.
        (["none", "0.png", "Who?", "0.png", "Where?", "--seed", "50"], "neither a folder nor a Hub id"),
        (["--seed", "50"], "`--seed` of scenes must be 0 to 49: got 50"),
    ],
)
def test_mistakes_are_one_line_and_status_2(here, capfd, arguments, message):
    if arguments == ["none"]:
        arguments = ["none", "--questions", "rows.jsonl"]
    assert main(["analyze", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("emma-hf: ")]
    assert message in line


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("sklearn.feature_selection", "Mutual information needs scikit-learn"),
        ("matplotlib.figure", "Plots need matplotlib"),
    ],
)
def test_missing_packages_are_named_before_a_model_is_loaded(here, tmp_path, monkeypatch, capfd, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    arguments = ["analyze", "none", "--questions", "rows.jsonl", "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert message in line
    assert 'pip install "emma-hf[analysis]"' in line


@pytest.mark.slow
def test_emma_tiny_does_not_use_its_instruction(tmp_path, capfd):
    """The figures measured of it before, on other questions: EVIDENCE sections 2 and 3."""
    output = tmp_path / "out"
    assert main(["analyze", "--seed", "41", "--output", str(output)]) == 0
    first, second, third = capfd.readouterr().out.splitlines()
    assert first.startswith("The answers do not depend on the instruction: ")
    assert second.startswith("What the text adds is as good as a constant: ")
    assert third.endswith("so that large weights are no sign of use here.")
    result = json.loads((output / "analysis.json").read_text())
    before = {
        "own": 96.2, "another question of another kind": 96.5, "another question of the same kind": 96.2, "empty": 96.7,
        "constant: Describe the picture.": 96.3, "off-domain sentence": 96.7, "mean text term": 96.3,
        "text term removed": 93.8,
    }  # fmt: skip
    conditions = result["counterfactuals"]["conditions"]
    assert set(conditions) == set(before)
    for name, share in before.items():
        assert conditions[name]["accuracy"]["low"] < share / 100 < conditions[name]["accuracy"]["high"], name
    shares = result["terms"]["shares"]
    # Mean and standard deviation over 600 questions.
    for name, mean, deviation in (("text", 0.409, 0.030), ("question", 0.067, 0.035)):
        assert shares[name]["mean"] == pytest.approx(mean, abs=4 * deviation / 200**0.5)
    assert shares["image"]["mean"] == pytest.approx(0.908, abs=0.01)
    assert result["weights"]["text_share_l1"] == pytest.approx(0.510, abs=0.001)
    assert result["weights"]["text_share_l2"] == pytest.approx(0.276, abs=0.001)
    assert result["effective"]["text"][0] == pytest.approx(85, abs=1)
    assert result["effective"]["text_varying"][0] == 0
    assert result["variance"]["image"] > 0.995
    assert result["variance"]["interaction"] < 0.001
    assert result["terms"]["moved_from_no_text"] == pytest.approx(0.209, abs=0.01)
    assert result["terms"]["moved_from_mean_text"] == pytest.approx(0.0275, abs=0.005)
    information = result["mutual_information"]["mutual_information"]["start token"]
    means = {stage: sum(map(sum, rows)) / sum(map(len, rows)) for stage, rows in information.items()}
    # It rises from V to F, and as much with another question's instruction.
    assert means["F, own question"] > 2 * means["V"]
    assert means["F, another question"] == pytest.approx(means["F, own question"], rel=0.25)


@pytest.mark.once
@pytest.mark.slow
def test_4_bits_give_a_report(tmp_path, capfd):
    assert main(["analyze", "--quantization", "4bit", "--count", "24", "--output", str(tmp_path / "out")]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 3
    assert json.loads((tmp_path / "out" / "analysis.json").read_text())["model"]["quantized"] is True
