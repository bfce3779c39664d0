"""Tables and figures of the replication: arms compared question by question, seed by seed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...model.errors_emma import EmmaError
from ...training.plots import figure_class
from .arms import ALL, ARMS, FEW, SECOND_RATE, SECOND_SEEDS, Row, Task
from .questions import SMALLEST, questions_of_test
from .running import read_results

RESAMPLES = 10_000
SIGNIFICANCE = 0.05
# Points that a panel's axis shows at least, so that it does not magnify differences of single questions.
SMALLEST_SPAN = 10
# Colors that remain apart for readers who confuse red and green (Okabe and Ito), on light and dark paper alike.
COLORS = {
    "A": "#999999", "B": "#56B4E9", "C": "#D55E00", "D": "#E69F00", "E": "#009E73", "F": "#0072B2", "G": "#CC79A7",
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Two conditions of the table whose answers are compared.

    Args:
        first: arm and instruction at test of what is expected to be better.
        second: those of the other.
        task: what both have in common.
        primary: whether it was named as primary before the runs.
        rate: learning rate of both rows' text weights, in units of that of all others.
        exploratory: whether it was added after its first results were seen. It takes no part in Holm's correction.
        seeds: those that count, in an experiment of its own. Default: all that both have.
    """

    first: tuple[str, str]
    second: tuple[str, str]
    task: Task
    primary: bool = False
    rate: float = 1.0
    exploratory: bool = False
    seeds: range | None = None

    @property
    def name(self) -> str:
        """Such as `C - D`, with the instruction at test where it is another, a rate that is not 1, and chosen seeds."""
        arms = [arm if test == "as trained" else f"{arm} {test}" for arm, test in (self.first, self.second)]
        rate = f", rate {self.rate:g}" if self.rate != 1 else ""
        seeds = "" if self.seeds is None else f", seeds {self.seeds[0]} to {self.seeds[-1]}"
        return " - ".join(arms) + rate + seeds


# All but the exploratory ones were written down before any row that they compare was run.
COMPARISONS = (
    Comparison(("C", "as trained"), ("D", "as trained"), FEW, primary=True),
    Comparison(("C", "as trained"), ("E", "as trained"), FEW, primary=True),
    *(
        Comparison(("C", "as trained"), second, task)
        for task in (FEW, ALL)
        for second in (("B", "as trained"), ("A", "as trained"), ("C", "swapped"))
    ),
    Comparison(("C", "as trained"), ("E", "as trained"), ALL),
    *(
        Comparison(("C", "as trained"), second, FEW, rate=SECOND_RATE, seeds=SECOND_SEEDS)
        for second in (("D", "as trained"), ("E", "as trained"), ("C", "swapped"))
    ),
    *(
        Comparison(("C", "as trained"), (arm, "as trained"), FEW, rate=SECOND_RATE, exploratory=True, seeds=range(2))
        for arm in "DE"
    ),
)


def compare(results: Sequence[dict[str, Any]], comparison: Comparison) -> dict[str, Any] | None:
    """The difference of two conditions over the seeds that both have, or None where there is none.

    Seeds and images are drawn anew together (a bootstrap over both: questions about one image are not independent).

    Returns:
        `difference`, `low` and `high` in points, `p` (two-sided), `seeds`, `questions`, and `effect`, the difference in
        units of its standard deviation over seeds (not a number without one).
    """
    conditions = comparison.first, comparison.second
    hits = [_hits_by_seed(results, *condition, comparison.task, comparison.rate) for condition in conditions]
    seeds = sorted(set(hits[0]) & set(hits[1]) & set(comparison.seeds or hits[0]))
    if not seeds:
        return None
    scenes = results[0]["budget"]["scenes"]
    asked = questions_of_test(scenes, results[0]["budget"]["families"])
    counted = np.array([question.family != SMALLEST for _, question in asked])
    scene_of = np.array([scene for scene, _ in asked])[counted]
    differences = np.array([hits[0][seed][counted].astype(float) - hits[1][seed][counted] for seed in seeds])
    sums = np.stack([np.bincount(scene_of, row, minlength=scenes) for row in differences])
    counts = np.bincount(scene_of, minlength=scenes)

    rng = np.random.default_rng(0)
    drawn = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        some_seeds, some_scenes = rng.integers(0, len(seeds), len(seeds)), rng.integers(0, scenes, scenes)
        drawn[index] = sums[some_seeds][:, some_scenes].sum() / (len(seeds) * counts[some_scenes].sum())
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    by_seed = 100 * differences.mean(1)
    spread = by_seed.std(ddof=1) if len(seeds) > 1 else 0.0
    return {
        "difference": float(by_seed.mean()),
        "low": float(100 * np.quantile(drawn, SIGNIFICANCE / 2)),
        "high": float(100 * np.quantile(drawn, 1 - SIGNIFICANCE / 2)),
        "p": min(1.0, 2 * (int(tail) + 1) / (RESAMPLES + 1)),
        "seeds": len(seeds),
        "questions": int(counted.sum()),
        "effect": float(by_seed.mean() / spread) if spread else float("nan"),
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number (Holm 1979), in the same order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def write_report(results_path: str | Path, folder: str | Path) -> str:
    """Write `tables.md`, `accuracy.png` and `instruction.png` of a results file into a folder.

    Returns:
        The tables as Markdown.

    Raises:
        EmmaError: no result, or results of several budgets.
        MissingPackageError: matplotlib is not installed.
    """
    figure_class()
    results = read_results(results_path)
    if not results:
        raise EmmaError(
            f"A report needs results: {results_path} holds none. Run `emma-hf tiny replicate ROW` or `--all` first."
        )
    if any(line["budget"] != results[0]["budget"] for line in results):
        raise EmmaError(f"Rows of one budget can be compared: {results_path} holds several. Keep one of them.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = [(each, compare(results, each)) for each in COMPARISONS]
    present = [(comparison, figures) for comparison, figures in found if figures is not None]
    text = f"{_table_of_rows(results)}\n{_table_of_comparisons(present)}\n{_table_of_families(results)}"
    (folder / "tables.md").write_text(text, encoding="utf-8")
    _plot_accuracy(results, folder / "accuracy.png")
    _plot_instruction(present, folder / "instruction.png")
    return text


def _row_of(line: dict[str, Any]) -> Row:
    return Row.parse(line["row"])


def _hits_by_seed(
    results: Iterable[dict[str, Any]], arm: str, test: str, task: Task, rate: float
) -> dict[int, np.ndarray]:
    """Whether each question is right, by seed."""
    return {
        line["seed"]: np.array([digit == "1" for digit in line["hits"][test]])
        for line in results
        if (line["arm"], line["rate"], _row_of(line).task) == (arm, rate, task) and test in line["hits"]
    }


def _groups(results: Iterable[dict[str, Any]]) -> dict[tuple[Task, str, float], list[dict[str, Any]]]:
    """Lines by task, arm and rate; the narrowest tasks first."""
    groups: dict[tuple[Task, str, float], list[dict[str, Any]]] = {}
    for line in sorted(results, key=lambda line: (line["tokens"], line["depth"], line["width"] or 0, line["row"])):
        groups.setdefault((_row_of(line).task, line["arm"], line["rate"]), []).append(line)
    return groups


def _mean(lines: Sequence[dict[str, Any]], test: str, family: str = "all") -> str:
    values = [100 * line["accuracy"][test][family]["share"] for line in lines if test in line["accuracy"]]
    if not values:
        return "-"
    return f"{np.mean(values):.1f}" + (f" ({np.std(values, ddof=1):.1f})" if len(values) > 1 else "")


def _table_of_rows(results: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| task | arm | rate of text | seeds | as trained | own | swapped | empty | images all right "
        "| smallest thing | gate index | question's share of F | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, arm, rate), group in _groups(results).items():
        whole, smallest = (
            100 * np.mean([line[name]["share"] for line in group]) for name in ("images_right", "smallest")
        )
        gates, share = (100 * np.mean([line[name] for line in group]) for name in ("gate_index", "question_share"))
        minutes = np.mean([line["seconds"]["training"] for line in group]) / 60
        tests = " | ".join(_mean(group, test) for test in ("as trained", "own", "swapped", "empty"))
        lines.append(
            f"| {task} | {arm}: {ARMS[arm].title} | {rate:g} | {len(group)} | {tests} | {whole:.1f} "
            f"| {smallest:.1f} | {gates:.2f}% | {share:.1f}% | {minutes:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _table_of_comparisons(present: Sequence[tuple[Comparison, dict[str, Any]]]) -> str:
    adjusted: dict[Comparison, str] = {}
    # Each experiment has its own correction.
    for seeds in (None, SECOND_SEEDS):
        stated = [found for found in present if not found[0].exploratory and found[0].seeds == seeds]
        p_values = holm([figures["p"] for _, figures in stated])
        adjusted |= {comparison: f"{p:.4f}" for (comparison, _), p in zip(stated, p_values)}
    lines = [
        "| comparison | task | seeds | difference in points [95%] | effect size over seeds | p | p (Holm) |",
        "|---|---|---|---|---|---|---|",
    ]
    for comparison, figures in present:
        name = f"**{comparison.name}** (primary)" if comparison.primary else comparison.name
        corrected = adjusted.get(comparison, "exploratory")
        effect = "-" if np.isnan(figures["effect"]) else f"{figures['effect']:.1f}"
        lines.append(
            f"| {name} | {comparison.task} | {figures['seeds']} | {figures['difference']:+.1f} "
            f"[{figures['low']:+.1f}, {figures['high']:+.1f}] | {effect} | {figures['p']:.4f} | {corrected} |"
        )
    return "\n".join(lines) + "\n"


def _table_of_families(results: Sequence[dict[str, Any]]) -> str:
    families = results[0]["budget"]["families"]
    lines = [f"| task | arm | rate of text | {' | '.join(families)} | each seed |", "|---" * (4 + len(families)) + "|"]
    for (task, arm, rate), group in _groups(results).items():
        cells = " | ".join(_mean(group, "as trained", family) for family in families)
        shares = {line["seed"]: 100 * line["accuracy"]["as trained"]["all"]["share"] for line in group}
        seeds = ", ".join(f"{seed}: {share:.1f}" for seed, share in shares.items())
        lines.append(f"| {task} | {arm} | {rate:g} | {cells} | {seeds} |")
    return "\n".join(lines) + "\n"


def _plot_accuracy(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy of every arm and rate, a point for each seed and their mean as a line, a panel for each task."""
    groups = _groups(results)
    panels = list(dict.fromkeys(task for task, _, _ in groups))
    figure = figure_class()(figsize=(2 + 4 * len(panels), 4.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    for panel, task in zip(axes, panels):
        shown = sorted((arm, rate) for each, arm, rate in groups if each == task)
        for place, (arm, rate) in enumerate(shown):
            values = [100 * line["accuracy"]["as trained"]["all"]["share"] for line in groups[task, arm, rate]]
            panel.plot([place] * len(values), values, "o", color=COLORS[arm], markersize=5)
            panel.hlines(np.mean(values), place - 0.3, place + 0.3, color=COLORS[arm], linewidth=2.5)
        panel.set_xticks(range(len(shown)), [arm if rate == 1 else f"{arm}\nrate {rate:g}" for arm, rate in shown])
        panel.set_title(str(task))
        panel.grid(axis="y", alpha=0.3)
        panel.margins(x=0.15)
        low, high = panel.get_ylim()
        top = min(100.5, high + max(0, SMALLEST_SPAN - (high - low)) / 2)
        panel.set_ylim(min(low, top - SMALLEST_SPAN), top)
    axes[0].set_ylabel("right answers in %, not from 0")
    arms = sorted({arm for _, arm, _ in groups})
    figure.supxlabel("\n".join(f"{arm}: {ARMS[arm].title}" for arm in arms), fontsize=8, x=0.02, ha="left")
    figure.suptitle("Each arm: a point for each seed, a line for their mean")
    figure.savefig(path, dpi=150)


def _plot_instruction(present: Sequence[tuple[Comparison, dict[str, Any]]], path: Path) -> None:
    """The stated comparisons with their intervals."""
    figure = figure_class()(figsize=(9, 1.6 + 0.36 * max(1, len(present))), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#777777", linewidth=1)
    for place, (comparison, figures) in enumerate(reversed(present)):
        color = COLORS["A" if comparison.exploratory else "C" if comparison.primary else "F"]
        axes.hlines(place, figures["low"], figures["high"], color=color, linewidth=2.5)
        axes.plot(figures["difference"], place, "o", color=color)
    labels = [
        f"{each.name}, {each.task}{' (primary)' * each.primary}{' (exploratory)' * each.exploratory}"
        for each, _ in reversed(present)
    ]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("difference in points, and its 95% interval")
    figure.suptitle("What the instruction is worth: EMMA (C) against its controls")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)


__all__ = ["COMPARISONS", "Comparison", "compare", "holm", "write_report"]
