"""What the figures draw: the result's numbers, with legends and axes that say where they begin."""

import numpy as np
import pytest
import torch
from support.analyzed import noise, small, small_rows

from emma_hf.analysis import Row, analyze
from emma_hf.analysis.figures import FIGURES, THEMES, Canvas, draw_example

pytest.importorskip("matplotlib")


def drawn(name, result, theme="light"):
    (function, width, height) = next(entry[1:4] for entry in FIGURES if entry[0] == name)
    canvas = Canvas(theme, width, height)
    function(canvas, result)
    return canvas.figure.axes


def errorbar(axes, index=0):
    """Values, and the ends of their intervals, of points drawn with errors."""
    data, _, (bars,) = axes.containers[index].lines
    ends = np.array(bars.get_segments())
    return np.array(data.get_xdata(), float), np.array(data.get_ydata(), float), ends


def test_counterfactuals_are_drawn_with_their_intervals(result):
    left, right = drawn("counterfactuals", result)
    conditions = result["counterfactuals"]["conditions"]
    for axes, key in ((left, "accuracy"), (right, "changed")):
        values, _, ends = errorbar(axes)
        for row, figures in enumerate(conditions.values()):
            assert values[row] == pytest.approx(100 * figures[key]["share"])
            np.testing.assert_allclose(
                ends[row][:, 0], [100 * figures[key]["low"], 100 * figures[key]["high"]], atol=1e-6
            )
    assert [label.get_text() for label in left.get_yticklabels()] == list(conditions)


def test_terms_and_kinds_are_bars(result):
    left, right = drawn("terms", result)
    shares = result["terms"]["shares"]
    names = ("image", "image_varying", "text", "mean text", "question", "bias")
    np.testing.assert_allclose(
        [bar.get_width() for bar in left.patches], [100 * shares[name]["mean"] for name in names]
    )
    kinds = [100 * value for value in result["terms"]["question_by_kind"].values()]
    np.testing.assert_allclose([bar.get_width() for bar in right.patches], kinds)


def test_weights_are_maps_and_lines(result):
    one, two, three, four, *_ = drawn("weights", result)
    weights = result["weights"]
    np.testing.assert_allclose(one.images[0].get_array().data.ravel(), weights["visual_l2"])
    text, visual = np.array(weights["row_text_l1"]), np.array(weights["row_visual_l1"])
    np.testing.assert_allclose(two.images[0].get_array().data.ravel(), 100 * text / (text + visual))
    np.testing.assert_allclose(three.lines[0].get_ydata(), weights["text_l2"])
    for line, name in zip(four.lines, ("text", "text_varying")):
        np.testing.assert_allclose(line.get_ydata(), result["effective"][name])
    assert len(four.get_legend().get_texts()) == 2


def test_gates_and_variance(result):
    left, right = drawn("gates", result)
    split = [100 * result["variance"][name] for name in ("image", "question", "interaction")]
    np.testing.assert_allclose([bar.get_width() for bar in left.patches], split)
    np.testing.assert_allclose(
        [bar.get_height() for bar in right.patches], 100 * np.array(result["gates"]["histogram"])
    )
    assert f"{100 * result['gates']['index']:.2g}% do" in right.get_legend().get_texts()[0].get_text()


def test_mutual_information_has_an_interval_over_questions(result):
    one, two, three = drawn("mutual_information", result)
    for axes, name in ((one, "mutual_information"), (two, "cosine")):
        for index, stages in enumerate(result["mutual_information"][name].values()):
            values, _, ends = errorbar(axes, index)
            for row, tokens in enumerate(stages.values()):
                means = np.mean(tokens, axis=1)
                assert values[row] == pytest.approx(means.mean())
                half = 1.96 * means.std() / len(means) ** 0.5
                np.testing.assert_allclose(ends[row][:, 0], [means.mean() - half, means.mean() + half], atol=1e-4)
    medians = [np.median(values) for values in result["mutual_information"]["class_cosine"].values()]
    np.testing.assert_allclose([line.get_xdata()[0] for line in three.lines], medians)


def test_instruction_length(result):
    left, right = drawn("instruction_length", result)
    levels = result["instruction_length"]["wordiness"]
    for line, name in zip(left.lines, ("text", "moved", "cut")):
        np.testing.assert_allclose(line.get_ydata(), [100 * level[name] for level in levels])
    _, values, _ = errorbar(right)
    np.testing.assert_allclose(values, [100 * level["accuracy"]["share"] for level in levels])


def test_an_example_has_both_maps_at_one_scale(result):
    canvas, example = Canvas("dark", 13.0, 3.4), result["examples"][0]
    example = {**example, "question": "What costs $5 or $6?"}
    draw_example(canvas, result, example, noise(0))
    image, own, other, words, *_ = canvas.figure.axes
    # What a grayscale image is drawn in, with its own black and white.
    assert image.images[0].get_cmap().name == "gray"
    assert image.images[0].get_clim() == (0, 255)
    assert own.images[0].get_clim() == other.images[0].get_clim() == (0, max(example["map"] + example["other_map"]))
    np.testing.assert_allclose(own.images[0].get_array().data.ravel(), example["map"])
    np.testing.assert_allclose(
        [bar.get_width() for bar in words.patches], [100 * share for _, share in example["words"]]
    )
    assert own.get_title() == r"What costs \$5 or \$6?"


@pytest.mark.parametrize("name", [entry[0] for entry in FIGURES])
def test_axes_say_where_they_begin(name, result):
    """Each axis with numbers begins at 0, or its label says that it does not."""
    for axes in drawn(name, result):
        for axis, (low, _), scale in (
            (axes.xaxis, axes.get_xlim(), axes.get_xscale()), (axes.yaxis, axes.get_ylim(), axes.get_yscale())
        ):  # fmt: skip
            label = axis.label.get_text()
            if "from 0" in label or "begins at 0" in label:
                assert low in (0, -0.5), label
            if scale == "log":
                assert "logarithmic axis" in label
            if "begins at" in label:
                assert int(label.split("begins at ")[1].split(")")[0]) == low


def contrast(first: str, second: str) -> float:
    """WCAG 2.1's contrast ratio of two colors."""

    def luminance(color: str) -> float:
        values = [int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear))

    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", THEMES)
def test_texts_and_marks_stand_out_from_their_paper(theme):
    colors = THEMES[theme]
    assert contrast(colors["ink"], colors["paper"]) > 7
    for color in colors["colors"]:
        # What WCAG asks of graphics.
        assert contrast(color, colors["paper"]) >= 3


@pytest.mark.parametrize("variant", [{"visual_offset": True}, {"class_token": True}], ids=str)
def test_variants_are_drawn(variant):
    """Another term, a token without a place in the image, and no answers."""
    model, processor = small(**variant)
    rows = [Row(row.image, row.question) for row in small_rows()[:3]]
    found = analyze(model.to(torch.bfloat16), processor, rows, max_new_tokens=1)
    assert found["model"]["dtype"] == "bfloat16"
    assert found["mutual_information"] is None
    names = [entry[0] for entry in FIGURES if found.get(entry[4])]
    assert len(names) == len(FIGURES) - 1
    axes = {name: drawn(name, found) for name in names}
    assert axes["weights"][0].images[0].get_array().shape == (4, 4)
    labels = [label.get_text() for label in axes["terms"][0].get_yticklabels()]
    assert ("learned offset" in labels) == ("visual_offset" in variant)
