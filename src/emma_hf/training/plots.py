"""Figures of a training run."""

import math
from pathlib import Path
from typing import Any

from ..model.errors_emma import EmmaError, MissingPackageError


def figure_class(extra: str = "train") -> Any:
    """matplotlib's `Figure`; a long run that draws at its end calls this at its beginning.

    Args:
        extra: the extra of this package that brings matplotlib to who needs it, for the error.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            f'Plots need matplotlib: install it with `pip install "emma-hf[{extra}]"`.'
        ) from error
    return Figure


def plot_loss(
    log_history: list[dict[str, Any]], path: str | Path, unit: str = "nats per token", title: str = "Training of EMMA"
) -> None:
    """Draw training and evaluation loss against optimizer steps.

    Args:
        log_history: `trainer.state.log_history`.
        path: file to write; its suffix decides the format.
        unit: unit of the loss.
        title: title of the figure.

    Raises:
        MissingPackageError: matplotlib is not installed.
        EmmaError: no loss in the history.
    """
    figure = figure_class()(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(entry["step"], entry[name]) for entry in log_history if math.isfinite(entry.get(name, math.nan))]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=4)
    if not axes.lines:
        raise EmmaError("There is no loss to draw: the history holds none. Log at least once (`logging_steps`).")
    axes.set(title=title, xlabel="optimizer step", ylabel=f"loss ({unit})")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
