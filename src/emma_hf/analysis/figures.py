"""Figures of an analysis, each drawn from the numbers of `analyze`'s result, for a light and for a dark page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.statistics import QUANTILE
from ..training.plots import figure_class

# Colors after Okabe and Ito (2008), which the color-blind can tell apart: darker on light pages, lighter on dark ones.
THEMES: dict[str, dict[str, Any]] = {
    "light": {"paper": "#ffffff", "ink": "#1f2328", "faint": "#8c959f",
              "colors": ("#0072b2", "#d55e00", "#009e73", "#b8608f")},
    "dark": {"paper": "#0d1117", "ink": "#e6edf3", "faint": "#8b949e",
             "colors": ("#56b4e9", "#e69f00", "#2fc79a", "#e3a3c7")},
}  # fmt: skip
MARKERS = ("o", "s", "^", "D")
DPI = 120


class Canvas:
    """A figure in one theme.

    Args:
        theme: `light` or `dark`.
        width, height: inches.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """

    def __init__(self, theme: str, width: float, height: float) -> None:
        self.ink, self.faint, self.paper = (THEMES[theme][name] for name in ("ink", "faint", "paper"))
        self.colors: Sequence[str] = THEMES[theme]["colors"]
        self.figure = figure_class("analysis")(figsize=(width, height), layout="constrained", facecolor=self.paper)

    def axes(self, *shape: int, **kwargs: Any) -> list[Any]:
        """Axes in rows and columns, in one list."""
        return list(np.ravel(self.figure.subplots(*shape, **kwargs)))

    def finish(self, path: Path) -> None:
        """Give texts, lines and legends the theme's colors, and write the file."""
        for axes in self.figure.axes:
            axes.set_facecolor(self.paper)
            axes.tick_params(which="both", colors=self.ink, labelcolor=self.ink)
            for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
                text.set_color(self.ink)
            for spine in axes.spines.values():
                spine.set_color(self.faint)
            legend = axes.get_legend()
            if legend is not None:
                legend.get_frame().set(facecolor=self.paper, edgecolor=self.faint)
                for text in legend.get_texts():
                    text.set_color(self.ink)
        self.figure.savefig(path, dpi=DPI, facecolor=self.paper)

    def grid(self, axes: Any, axis: str) -> None:
        """Faint lines behind the data."""
        axes.grid(axis=axis, alpha=0.25, color=self.faint)
        axes.set_axisbelow(True)

    def map(self, axes: Any, values: Sequence[float], label: str, side: int, limits: tuple[float, float]) -> None:
        """Values of the visual tokens where they lie in the image, with their scale."""
        image = axes.imshow(np.reshape(values, (side, side)), cmap="cividis", vmin=limits[0], vmax=limits[1])
        axes.set(xticks=[], yticks=[])
        bar = self.figure.colorbar(image, ax=axes, shrink=0.85)
        bar.set_label(label)

    def intervals(self, axes: Any, rows: Sequence[dict[str, float]], names: Sequence[str], color: str) -> None:
        """Shares in percent with their 95% intervals, one below the other."""
        values = [100 * row["share"] for row in rows]
        errors = [[100 * max(0.0, sign * (row["share"] - row[end])) for row in rows]
                  for end, sign in (("low", 1), ("high", -1))]  # fmt: skip
        axes.errorbar(values, range(len(rows)), xerr=errors, fmt="o", color=color, capsize=3)
        axes.set_yticks(range(len(rows)), list(names))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        self.grid(axes, "x")


def on_grid(values: Sequence[float], result: dict[str, Any]) -> tuple[list[float], int]:
    """Values of the tokens that have a place in the image, and the tokens along its side."""
    values = list(values)[1:] if result["model"]["class_token"] else list(values)
    return values, round(len(values) ** 0.5)


def draw_weights(canvas: Canvas, result: dict[str, Any]) -> None:
    """Norms of Wa beside what its columns add to F."""
    weights, effective = result["weights"], result["effective"]
    one, two, three, four = canvas.axes(2, 2)
    columns, side = on_grid(weights["visual_l2"], result)
    canvas.map(one, columns, f"norm ({min(columns):.2f} to {max(columns):.2f})", side, (min(columns), max(columns)))
    one.set_title("Visual columns: l2 norm of each input token")
    text, visual = (np.array(weights[f"row_{name}_l1"]) for name in ("text", "visual"))
    shares, _ = on_grid(100 * text / (text + visual), result)
    canvas.map(two, shares, "% of the row's l1 norm (from 0)", side, (0, max(*shares, 1e-9)))
    two.set_title("Text's share in the row of each output token")
    positions = np.arange(len(weights["text_l2"])) + result["model"]["first_position"]
    three.plot(positions, weights["text_l2"], "-", color=canvas.colors[0], label="l2 norm of the column")
    three.set(title="Text columns: weights alone", ylabel="norm (from 0)", ylim=(0, None))
    four.plot(positions, effective["text"], "-", color=canvas.colors[0], label="weight x size of the token")
    four.plot(
        positions, effective["text_varying"], "--", color=canvas.colors[1], label="of it, varies with the question"
    )
    four.set(title="Text columns: what they add to F", ylabel="norm (from 0)", ylim=(0, None))
    for axes in (three, four):
        axes.set(xlabel="position in the instruction (0: start token)", xlim=(-0.5, max(positions[-1], 1) + 0.5))
        canvas.grid(axes, "y")
        axes.legend()


def draw_terms(canvas: Canvas, result: dict[str, Any]) -> None:
    """How large each term of F is beside F, and the question's by kind of question."""
    terms, kinds = result["terms"]["shares"], result["terms"]["question_by_kind"]
    names = {
        "image": "image: Wv V", "image_varying": "of it, varies with the image", "text": "text: Wt P",
        "mean text": "of it, its mean (a constant)", "question": "of it, varies with the question",
        "bias": "bias", "offset": "learned offset",
    }  # fmt: skip
    names = {name: label for name, label in names.items() if name in terms}
    left, *right = canvas.axes(1, 2 if kinds else 1)
    colors = [canvas.colors[int(name in ("text", "mean text", "question"))] for name in names]
    values = [100 * terms[name]["mean"] for name in names]
    spread = [100 * terms[name]["sd"] for name in names]
    left.barh(range(len(names)), values, xerr=spread, color=colors, ecolor=canvas.ink, capsize=3)
    left.set_yticks(range(len(names)), list(names.values()))
    left.set(title="Terms of F", xlabel="% of |F|, mean and deviation (axis begins at 0)")
    left.set_xlim(0, None)
    for axes in right:
        values = [100 * value for value in kinds.values()]
        axes.barh(range(len(kinds)), values, color=canvas.colors[1])
        axes.set_yticks(range(len(kinds)), list(kinds))
        axes.set(title="What varies with the question, by kind", xlabel="% of |F| (axis begins at 0)")
    for axes in (left, *right):
        axes.invert_yaxis()
        canvas.grid(axes, "x")


def draw_gates(canvas: Canvas, result: dict[str, Any]) -> None:
    """The variance of Z split in two ways, and how far gates move."""
    left, right = canvas.axes(1, 2)
    split, gates = result["variance"], result["gates"]
    if split and split["image"] is not None:
        values = [100 * max(split[name], 1e-6) for name in ("image", "question", "interaction")]
        left.barh(range(3), values, color=[*canvas.colors[:3]])
        for row, value in enumerate(values):
            left.annotate(f" {value:.3g}%", (value, row), va="center", color=canvas.ink)
        left.set_yticks(range(3), ["image", "question", "both together"])
        left.invert_yaxis()
        left.set(xscale="log", xlim=(min(0.01, *values) / 2, 1000), title="What the variance of Z comes from")
        left.set_xlabel("% of the variance (logarithmic axis, does not begin at 0)")
    else:
        left.set_axis_off()
    shares = 100 * np.array(gates["histogram"])
    edges = np.linspace(0, 1, len(shares) + 1)
    right.bar(
        edges[:-1], shares, 1 / len(shares), align="edge", color=canvas.colors[0], label="pairs of token and unit"
    )
    right.axvline(0.5, color=canvas.colors[1], linestyle="--", label=f"a gate turns: {100 * gates['index']:.2g}% do")
    lowest = min([value for value in shares if value > 0], default=0.1) / 2
    right.set(yscale="log", ylim=(lowest, 200), xlim=(0, 1), title="Gates, from one question to another")
    right.set(xlabel="movement of the gate (axis begins at 0)", ylabel="% of pairs (logarithmic axis)")
    right.legend()
    canvas.grid(right, "y")


def draw_counterfactuals(canvas: Canvas, result: dict[str, Any]) -> None:
    """Accuracy and changed answers under each condition."""
    conditions = result["counterfactuals"]["conditions"]
    known = all("accuracy" in figures for figures in conditions.values())
    *left, right = canvas.axes(1, 2 if known else 1, sharey=True)
    for axes in left:
        rows = [figures["accuracy"] for figures in conditions.values()]
        canvas.intervals(axes, rows, list(conditions), canvas.colors[0])
        start = 10 * int(max(0, 10 * min(row["low"] for row in rows) - 0.3))
        axes.set(title="Right answers", xlim=(start, 101), xticks=range(start, 101, 5 if start >= 50 else 10))
        axes.set_xlabel(f"% of {rows[0]['of']}, with 95% intervals (axis begins at {start})")
    rows = [figures["changed"] for figures in conditions.values()]
    canvas.intervals(right, rows, list(conditions), canvas.colors[1])
    right.set(title="Answers that differ from the own")
    right.set_xlim(0, max(5, 110 * max(row["high"] for row in rows)))
    right.set_xlabel(f"% of {rows[0]['of']}, with 95% intervals (axis begins at 0)")


def draw_mutual_information(canvas: Canvas, result: dict[str, Any]) -> None:
    """Mutual information and cosine by stage, with the controls beside each."""
    one, two, three = canvas.axes(1, 3, sharey=True)
    figures = result["mutual_information"]
    for axes, name, label in (
        (one, "mutual_information", "mutual information with the answer\n(nats, axis begins at 0)"),
        (two, "cosine", "cosine with the answer"),
    ):
        for index, (answer, stages) in enumerate(figures[name].items()):
            # Tokens of one image are alike: the interval is over the questions.
            questions = [np.mean(values, axis=1) for values in stages.values()]
            means = [values.mean() for values in questions]
            errors = [QUANTILE * values.std() / len(values) ** 0.5 for values in questions]
            rows = np.arange(len(stages)) + 0.17 * (index - 1.5)
            axes.errorbar(
                means, rows, xerr=errors, fmt=MARKERS[index], color=canvas.colors[index], capsize=2, label=answer,
                markerfacecolor=canvas.paper if "shuffled" in answer else canvas.colors[index],
            )  # fmt: skip
        axes.set_xlabel(f"{label}, mean and 95% interval")
    one.set_xlim(0, None)
    stages = figures["class_cosine"]
    for row, values in enumerate(stages.values()):
        low, first, median, third, high = np.percentile(values, (0, 25, 50, 75, 100))
        three.hlines(row, low, high, color=canvas.faint)
        three.hlines(row, first, third, color=canvas.colors[0], linewidth=8)
        three.plot(median, row, "D", color=canvas.paper, markersize=5)
    three.set_xlabel("cosine with the image's class token,\nmedian, quartiles and range of all tokens")
    one.set_yticks(range(len(stages)), list(stages))
    one.set_ylim(len(stages) - 0.5, -0.5)
    handles, labels = one.get_legend_handles_labels()
    legend = canvas.figure.legend(handles, labels, loc="outside lower center", ncols=2, title="the answer's vector")
    legend.get_frame().set(facecolor=canvas.paper, edgecolor=canvas.faint)
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_color(canvas.ink)
    for axes in (one, two, three):
        canvas.grid(axes, "x")


def draw_instruction_length(canvas: Canvas, result: dict[str, Any]) -> None:
    """Text term and accuracy as words before the question grow."""
    levels = result["instruction_length"]["wordiness"]
    known = all("accuracy" in level for level in levels)
    left, *right = canvas.axes(1, 2 if known else 1)
    filler = [level["filler"] for level in levels]
    for index, (name, label) in enumerate(
        (
            ("text", "text term, % of |F|"),
            ("moved", "its change, % of |F|"),
            ("cut", "tokens of the question cut off, %"),
        )
    ):
        values = [100 * level[name] for level in levels]
        left.plot(filler, values, f"{MARKERS[index]}-", color=canvas.colors[index], label=label)
    left.set(title="The text term", ylabel="% (axis begins at 0)", ylim=(0, 105))
    left.legend()
    for axes in right:
        rows = [level["accuracy"] for level in levels]
        values = [100 * row["share"] for row in rows]
        errors = [[100 * max(0.0, abs(row["share"] - row[end])) for row in rows] for end in ("low", "high")]
        axes.errorbar(
            filler,
            values,
            yerr=errors,
            fmt="o-",
            color=canvas.colors[0],
            capsize=3,
            label="right, with its 95% interval",
        )
        start = 10 * int(max(0, 10 * min(row["low"] for row in rows) - 0.3))
        axes.set(title="Right answers", ylim=(start, 101), yticks=range(start, 101, 5 if start >= 50 else 10))
        axes.set_ylabel(f"% of {rows[0]['of']} (axis begins at {start})")
        axes.legend()
    for axes in (left, *right):
        axes.set_xlabel("tokens of filler before the question (axis begins at 0)")
        axes.set_xlim(0, max(filler) * 1.03)
        canvas.grid(axes, "y")


def draw_example(canvas: Canvas, result: dict[str, Any], example: dict[str, Any], image: Any) -> None:
    """Where one question moved the visual tokens of its image, where another does, and which words do it."""
    one, two, three, four = canvas.axes(1, 4, width_ratios=(1, 1.15, 1.15, 1.3))
    # Of grayscale images alone; they would be drawn in false colors, and stretched from black to white.
    one.imshow(image, cmap="gray", vmin=0, vmax=255)
    one.set(xticks=[], yticks=[], title="Image")
    own, side = on_grid(example["map"], result)
    other, _ = on_grid(example["other_map"], result)
    top = max(*own, *other, 1e-9)
    for axes, values, text in ((two, own, example["question"]), (three, other, example["other_question"])):
        canvas.map(axes, values, "movement of Z (from 0)", side, (0, top))
        axes.set_title("\n".join(_lines(text, 30)), fontsize=9)
    words = example["words"][-16:]
    four.barh(range(len(words)), [100 * share for _, share in words], color=canvas.colors[1])
    four.set_yticks(range(len(words)), [_printable(word) for word, _ in words])
    four.invert_yaxis()
    four.set(title="Without this token Z moves by", xlabel="% of |Z| (axis begins at 0)")
    canvas.grid(four, "x")


def _lines(text: str, width: int) -> list[str]:
    lines = [""]
    for word in _printable(text).split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:3]


def _printable(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


# Name, function, width and height in inches, and the part of the result that the figure needs.
FIGURES = (
    ("counterfactuals", draw_counterfactuals, 11.0, 4.2, "counterfactuals"),
    ("terms", draw_terms, 11.0, 3.8, "terms"),
    ("weights", draw_weights, 11.0, 7.5, "weights"),
    ("gates", draw_gates, 11.0, 3.6, "gates"),
    ("mutual_information", draw_mutual_information, 13.0, 5.0, "mutual_information"),
    ("instruction_length", draw_instruction_length, 11.0, 4.0, "instruction_length"),
)


def draw_all(result: dict[str, Any], images: Sequence[Any], folder: Path) -> dict[str, dict[str, Path]]:
    """Write every figure that the result has the numbers for.

    Args:
        result: of `analyze`.
        images: the image of each of its examples.
        folder: folder that exists.

    Returns:
        By name and theme, the file: `NAME.png` for light pages, `NAME-dark.png` for dark ones.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    files: dict[str, dict[str, Path]] = {}
    for theme in THEMES:
        ending = "" if theme == "light" else f"-{theme}"
        for name, function, width, height, part in FIGURES:
            if result.get(part):
                canvas = Canvas(theme, width, height)
                function(canvas, result)
                files.setdefault(name, {})[theme] = folder / f"{name}{ending}.png"
                canvas.finish(files[name][theme])
        for number, (example, image) in enumerate(zip(result["examples"], images), 1):
            canvas = Canvas(theme, 13.0, 3.4)
            draw_example(canvas, result, example, image)
            files.setdefault(f"example-{number}", {})[theme] = folder / f"example-{number}{ending}.png"
            canvas.finish(files[f"example-{number}"][theme])
    return files


__all__ = ["Canvas", "draw_all"]
