"""The report of a run: as Markdown, as JSON and as a figure, with the printed figures beside those measured."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..storage.folders import write_json
from ..training.plots import figure_class
from .published import MARK, PUBLISHED, SOURCES, Published
from .runner import Run
from .statistics import paired_mean_difference
from .tasks.base import Figure, ScoredRow

# Samples with unreadable images that the Markdown names; the JSON names all.
NAMED = 20
# In the order of the columns: distinguishable without seeing red and green apart.
COLORS = ("#4878a8", "#c87838", "#8a8a8a")


def summarize(run: Run) -> dict[str, Any]:
    """All that a report shows, ready for JSON: the run, its figures and differences, and what is printed elsewhere."""
    first = next(iter(run.rows))
    return {
        "title": run.task.title,
        "run": dict(run.header),
        "questions": len(run.rows[first]),
        "figures": _by_column(run, run.task.summarize),
        "by the authors' scoring": _by_column(run, run.task.authors_figures),
        "by kind": _by_column(run, _by_kind),
        "differences": {
            f"{first} - {rule}": paired_mean_difference(
                [row.score for row in run.rows[first]], [row.score for row in rows]
            )
            | {"answers that differ": sum(a.answer != b.answer for a, b in zip(run.rows[first], rows))}
            for rule, rows in run.rows.items()
            if rule != first
        },
        "unreadable": dict(run.unreadable),
        "notes": [*run.notes, *([f"The authors' script: {run.task.authors_rule}"] if run.task.authors_rule else [])],
        "published": [asdict(each) | {"mark": MARK} for each in _published(run)],
    }


def write_report(run: Run, folder: Path) -> dict[str, Any]:
    """Write `results.json`, `results.md` and `results.png`.

    Returns:
        What [`summarize`] returns.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    summary = summarize(run)
    write_json(folder / "results.json", summary)
    (folder / "results.md").write_text(markdown(summary), encoding="utf-8")
    plot(summary, folder / "results.png")
    return summary


def markdown(summary: Mapping[str, Any]) -> str:
    """A summary as Markdown."""
    run = summary["run"]
    settings = ", ".join(f"{name} {run[name]}" for name in ("dtype", "quantization", "visual_tokens") if run.get(name))
    lines = [
        f"# {summary['title']}",
        "",
        f"{summary['questions']} questions to {run.get('model', 'a model')}, emma-hf {run['version']}"
        f"{settings and ', '}{settings}. In percent, with 95% intervals.",
        "",
        *_figures_table(summary["figures"]),
    ]
    for name in ("by the authors' scoring", "by kind"):
        if summary[name]:
            lines += ["", f"## {name.capitalize()}", "", *_figures_table(summary[name])]
    lines += _differences(summary["differences"])
    lines += _unreadable(summary)
    if summary["notes"]:
        lines += ["", "## Notes", "", *(f"- {note}" for note in summary["notes"])]
    lines += _published_table(summary["published"])
    return "\n".join(lines) + "\n"


def plot(summary: Mapping[str, Any], path: Path) -> None:
    """Draw the figures of a summary with their intervals, a bar for each instruction rule.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    columns, kinds = summary["figures"], summary["by kind"]
    figures = {rule: column | kinds.get(rule, {}) for rule, column in columns.items()}
    names = list(next(iter(figures.values())))
    figure = figure_class("evaluation")(figsize=(8, 1.6 + 0.16 * len(names) * (len(figures) + 1)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(figures)
    for number, (rule, color) in enumerate(zip(figures, COLORS)):
        rows = [figures[rule][name] for name in names]
        values = [100 * row["value"] for row in rows]
        errors = [[100 * abs(row["value"] - row[end]) for row in rows] for end in ("low", "high")]
        places = [index + (number - (len(figures) - 1) / 2) * height for index in range(len(rows))]
        axes.barh(places, values, 0.9 * height, xerr=errors, color=color, ecolor="#222222", capsize=2, label=rule)
    for model, marker in (("emma", "D"), ("llava", "s")):
        points = [
            (each[model], names.index(each["figure"]))
            for each in summary["published"]
            if each["figure"] in names and each[model] is not None
        ]
        if points:
            label = f"{'EMMA-7B' if model == 'emma' else 'LLaVA-1.5-7B'}, {MARK}"
            axes.plot(*zip(*points), marker, color="black", markerfacecolor="none", label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set(xlabel="percent, with 95% intervals", xlim=(0, 100), title=f"{summary['title']}: instruction by rule")
    axes.grid(axis="x", alpha=0.3)
    # Printed figures behind the bars, not between them.
    handles = sorted(zip(*axes.get_legend_handles_labels()), key=lambda pair: MARK in pair[1])
    figure.legend(*zip(*handles), loc="outside lower center", ncols=min(3, len(figures)), fontsize="small")
    figure.savefig(path, dpi=120)


def _by_column(run: Run, function: Any) -> dict[str, dict[str, dict[str, float]]]:
    columns = {
        rule: {name: asdict(figure) for name, figure in function(rows).items()} for rule, rows in run.rows.items()
    }
    return columns if any(columns.values()) else {}


def _by_kind(rows: Sequence[ScoredRow]) -> dict[str, Figure]:
    """The mean score of each kind, where there are several."""
    kinds: dict[str, list[float]] = {}
    for row in rows:
        kinds.setdefault(row.sample.kind, []).append(row.score)
    return {kind: Figure.of_values(scores) for kind, scores in kinds.items()} if len(kinds) > 1 else {}


def _published(run: Run) -> Iterator[Published]:
    return (each for each in PUBLISHED if run.task.name.startswith(each.task))


def _figures_table(columns: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    names = next(iter(columns.values()))
    lines = [f"| {' | '.join(['figure', *columns, 'of'])} |", "|---" * (len(columns) + 2) + "|"]
    for name, figure in names.items():
        cells = [
            f"{100 * row['value']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
            for row in (column[name] for column in columns.values())
        ]
        lines.append(f"| {' | '.join([name, *cells, str(figure['of'])])} |")
    return lines


def _differences(differences: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not differences:
        return []
    lines = [
        "",
        "## Differences",
        "",
        "Mean score of the same questions, in points, with 95% intervals.",
        "",
        "| columns | difference | only the first is better | only the second | answers that differ | of |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in differences.items():
        interval = f"{100 * row['difference']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
        counts = (row["only_first"], row["only_second"], row["answers that differ"], row["of"])
        lines.append(f"| {' | '.join([name, interval, *map(str, counts)])} |")
    return lines


def _unreadable(summary: Mapping[str, Any]) -> list[str]:
    unreadable = summary["unreadable"]
    if not unreadable:
        return []
    rest = len(unreadable) - NAMED
    return [
        "",
        "## Unreadable images",
        "",
        f"{len(unreadable)} of {summary['questions']} questions have an image that is missing or broken. They were not "
        "asked, and count as wrong.",
        "",
        *(f"- `{each}`: {reason}" for each, reason in list(unreadable.items())[:NAMED]),
        *([f"- and {rest} more, in results.json"] if rest > 0 else []),
    ]


def _published_table(published: Sequence[Mapping[str, Any]]) -> list[str]:
    if not published:
        return []

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value} ({MARK})"

    return [
        "",
        "## Printed elsewhere",
        "",
        SOURCES,
        "",
        "| benchmark | EMMA-7B | LLaVA-1.5-7B | how it was made, as far as is known |",
        "|---|---|---|---|",
        *(f"| {row['benchmark']} | {cell(row['emma'])} | {cell(row['llava'])} | {row['made']} |" for row in published),
    ]


__all__ = ["markdown", "plot", "summarize", "write_report"]
