"""The whole analysis: on models whose answer is known, its numbers, its files and its page."""

import json
import re
import sys

import pytest
import torch
from PIL import Image
from support.analyzed import noise, small_rows

from emma_hf.analysis import (
    Row,
    TooFewQuestionsError,
    analyze,
    contributions,
    counterfactuals,
    encode,
    gates,
    instruction_length,
    mutual_information,
    write_report,
)
from emma_hf.analysis.html_page import page


@pytest.fixture(scope="module")
def report(result, tmp_path_factory):
    images = [row.image for row in small_rows()[:2]]
    return write_report(result, images, tmp_path_factory.mktemp("report") / "out")


def same(found, expected):
    """Whether JSON's numbers are those of a function's result."""
    return found == json.loads(json.dumps(expected, default=lambda tensor: tensor.tolist()))


def test_every_part_is_its_functions(path, sample, result):
    """Each of these functions has its own test; here, that the result holds their figures and no others."""
    mean = sample.mean_tokens
    # Encoded in batches of another size, which rounds otherwise.
    sample = encode(path, small_rows())
    assert same(result["weights"], contributions.weights(path))
    assert same(result["effective"], contributions.effective(path, sample))
    assert same(result["gates"], gates.gate_index(path, sample, 5))
    assert same(result["variance"], gates.variance_split(path, sample.vision_features, sample.instruction_tokens))
    said = counterfactuals.compare_instructions(path, sample, 5, 4)
    assert same(result["counterfactuals"], {"conditions": said["conditions"]})
    assert same(result["mutual_information"], mutual_information.redundancy(path, sample, 5))
    assert same(result["instruction_length"]["wordiness"], instruction_length.wordiness(path, sample, max_new_tokens=4))
    shares = contributions.term_shares(path, sample)
    for name, values in shares.items():
        assert result["terms"]["shares"][name]["mean"] == pytest.approx(float(values.mean()))
        assert result["terms"]["shares"][name]["sd"] == pytest.approx(float(values.numpy().std()), rel=1e-4)
    assert result["terms"]["question_by_kind"]["count"] == pytest.approx(float(shares["question"][4:].mean()))
    moved = contributions.moved_by(path, sample, mean), contributions.moved_by(path, sample, torch.zeros_like(mean))
    assert result["terms"]["moved_from_mean_text"] == pytest.approx(float(moved[0].mean()), rel=1e-4)
    assert result["terms"]["moved_from_no_text"] == pytest.approx(float(moved[1].mean()), rel=1e-4)
    assert set(result) == {
        "verdict", "model", "rows", "seed", "weights", "effective", "terms", "gates", "variance", "counterfactuals",
        "mutual_information", "instruction_length", "examples", "left_out",
    }  # fmt: skip
    assert result["left_out"] == {}
    assert result["model"] == {
        "visual_tokens": 16, "instruction_tokens": 77, "instruction_length": 77, "first_position": 0,
        "class_token": False, "dtype": "float32", "quantized": False, "language_model": "llama",
    }  # fmt: skip


def test_examples_are_the_first_questions(path, sample, result):
    rows = small_rows()
    assert [example["question"] for example in result["examples"]] == [row.instruction for row in rows[:2]]
    for index, example in enumerate(result["examples"]):
        features = sample.vision_features[index]
        assert example["other_question"] != rows[index].instruction
        assert example["other_question"] in [row.instruction for row in rows]
        (other,) = path.instruction_tokens(path.instruction_ids([example["other_question"]]))
        for name, words in (("map", sample.instruction_tokens[index]), ("other_map", other)):
            expected = contributions.question_map(path, features, words, sample.instruction_tokens)
            torch.testing.assert_close(torch.tensor(example[name]), expected, rtol=1e-4, atol=1e-5)
        words = contributions.leave_one_out(path, features, rows[index].instruction)
        assert [word for word, _ in example["words"]] == [word for word, _ in words]
        assert example["cut"] == ""


def test_named_examples_are_shown_in_place_of_the_first(small_model):
    long = " ".join(["red"] * 80)
    rows = [*small_rows()[:3], Row(noise(9), long, "Yes", "count")]
    found = analyze(*small_model, rows, [Row(noise(8), "Is there a circle?"), rows[3]], max_new_tokens=1)
    assert [example["question"] for example in found["examples"]] == ["Is there a circle?", long]
    assert found["examples"][1]["cut"] == "red red red red red"
    assert found["instruction_length"]["cut"] == [{"row": 4, "words": "red red red red red"}]


def test_hand_written_weights_are_said_to_need_the_instruction(by_hand, by_hand_rows, monkeypatch):
    monkeypatch.setattr(mutual_information, "QUESTIONS", 2)
    first, second, third = analyze(*by_hand, by_hand_rows, max_new_tokens=2)["verdict"]
    assert re.match(
        r"The answers depend on the instruction: (100.0|99.\d)% of 80 are right with their own and 1\d", first
    )
    assert second.startswith("What the text adds is more than a constant: ")
    assert "large weights are no sign" not in third
    assert float(re.search(r"([\d.]+)% of the variance", third).group(1)) > 80


def test_an_untrained_emma_is_said_to_have_no_text(untrained):
    processor, model = untrained
    rows = [Row(noise(seed), f"Is there a {word}?") for seed, word in enumerate(("star", "heart", "cross"))]
    found = analyze(model, processor, rows, max_new_tokens=2)
    assert found["verdict"][0] == (
        "The text has no part in the visual tokens, as the alignment's text columns are zero: 0 of 3 answers change "
        "with the instruction of another question (the right answers were not given)."
    )
    assert found["weights"]["text_share_l1"] == found["weights"]["identity_distance"] == 0
    assert found["verdict"][2].startswith("The text columns hold 0.0% of the alignment's l1 norm, while 0.0% of |F|")
    assert "2 different answers at least, got 0" in found["left_out"]["mutual_information"]
    json.dumps(found, allow_nan=False)


def test_one_image_leaves_the_variance_out(small_model):
    image = noise(0)
    rows = [Row(image, row.question) for row in small_rows()[:3]]
    found = analyze(*small_model, rows, max_new_tokens=1)
    assert found["variance"] is None
    assert "got 1 images and 3 questions" in found["left_out"]["variance"]


def test_one_question_is_too_few(small_model):
    with pytest.raises(TooFewQuestionsError, match="there must be 2 at least: row 1"):
        analyze(*small_model, small_rows()[:1])


def test_the_json_file_is_the_result(result, report):
    assert json.loads((report / "analysis.json").read_text(encoding="utf-8")) == result


def test_the_page_needs_no_other_file_and_begins_with_the_verdict(result, report):
    text = (report / "report.html").read_text(encoding="utf-8")
    files = sorted(report.glob("*.png"))
    assert len(files) == 16
    assert text.count("data:image/png;base64,") == 16
    assert not re.search(r"(src|srcset|href)='(?!data:)", text)
    body = text.split("<body>")[1]
    sentences = " ".join(result["verdict"]).replace("'", "&#x27;")
    assert body.startswith(f"<h1>What the instruction does</h1><p class='verdict'>{sentences}</p>")
    for figures in result["counterfactuals"]["conditions"].values():
        right = figures["accuracy"]
        assert f"<td>{right['share']:.1%} ({right['low']:.1%} to {right['high']:.1%})</td>" in text
    assert body.count("Not to be concluded:") == 8


def test_what_users_wrote_is_text_on_the_page(result):
    hostile = json.loads(json.dumps(result))
    hostile["left_out"] = {"variance": "<script>alert(1)</script>"}
    hostile["instruction_length"]["cut"] = [{"row": 1, "words": "<img src=x>"}]
    text = page(hostile, {})
    assert "<script>" not in text
    assert "<img" not in text


def test_an_output_that_exists_and_missing_packages_are_refused(result, report, tmp_path, monkeypatch, small_model):
    with pytest.raises(ValueError, match="OUTPUT must not exist yet"):
        write_report(result, [], report)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'Plots need matplotlib: .*"emma-hf\[analysis\]"'):
        write_report(result, [], tmp_path / "other")
    assert not (tmp_path / "other").exists()
    monkeypatch.setitem(sys.modules, "sklearn.feature_selection", None)
    with pytest.raises(ImportError, match=r'pip install "emma-hf\[analysis\]"'):
        analyze(*small_model, small_rows())


def test_figures_have_a_light_and_a_dark_page(report):
    for path in report.glob("*.png"):
        corner = Image.open(path).convert("RGB").getpixel((0, 0))
        assert corner == ((13, 17, 23) if path.stem.endswith("-dark") else (255, 255, 255)), path.name
