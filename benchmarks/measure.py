"""What the benchmarks share: alternatives timed in turns, limits of the device, tables, JSON and plots."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tqdm import tqdm


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, to the end of what it started on the device."""
    _finish(device)
    start = time.perf_counter()
    function()
    _finish(device)
    return time.perf_counter() - start


def in_turns(
    alternatives: dict[str, Callable[[], object]], runs: int, device: torch.device, title: str
) -> dict[str, list[float]]:
    """Seconds of each alternative in each round, after one round that is not counted.

    All run in each round, so that what else the machine does falls on all.
    """
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in tqdm(range(runs + 1), desc=title, leave=False):
        for name, function in alternatives.items():
            took = seconds(function, device)
            if turn:
                times[name].append(took)
    return times


def ratio(over: list[float], under: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the ratio within a round."""
    low, middle, high = statistics.quantiles([above / below for above, below in zip(over, under)], n=4)
    return middle, low, high


def shown(of: tuple[float, float, float]) -> str:
    return f"{of[0]:.3f} [{of[1]:.3f}, {of[2]:.3f}]"


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second of one large product, the best of ten."""
    side = 8192 if device.type == "cuda" else 2048
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds(lambda: one @ other, device)
    return 2 * side**3 / min(seconds(lambda: one @ other, device) for _ in range(10))


def bandwidth(device: torch.device) -> float:
    """Bytes a second that are read: a matrix far larger than the caches times one vector, the best of ten."""
    side = 32768 if device.type == "cuda" else 16384
    matrix = torch.ones(side, side, device=device, dtype=torch.bfloat16)
    vector = torch.ones(side, device=device, dtype=torch.bfloat16)
    seconds(lambda: matrix @ vector, device)
    return matrix.nbytes / min(seconds(lambda: matrix @ vector, device) for _ in range(10))


class Report:
    """Rows of one benchmark: a table on standard output and, where a folder is given, JSON and a plot."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.rows: list[dict] = []
        print(f"\n### {name}\n\n{about(device)}\n")

    def add(self, **row: object) -> None:
        self.rows.append(row)

    def print_table(self) -> None:
        columns = list(self.rows[0])
        print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        for row in self.rows:
            print("| " + " | ".join(_cell(row[column]) for column in columns) + " |")

    def save(self, folder: Path | None, across: str, plotted: str, group: str) -> None:
        """Print, and write `NAME.json` and `NAME.png`: `plotted` (a ratio with quartiles) across a column, by group."""
        self.print_table()
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        result = {"about": about(self.device), "rows": self.rows}
        (folder / f"{self.name}.json").write_text(json.dumps(result, indent=2) + "\n")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for name in dict.fromkeys(row[group] for row in self.rows):
            mine = [row for row in self.rows if row[group] == name and row[plotted] is not None]
            places = [row[across] for row in mine]
            middles = [row[plotted][0] for row in mine]
            spread = [[abs(row[plotted][0] - row[plotted][side]) for row in mine] for side in (1, 2)]
            axes.errorbar(places, middles, yerr=spread, marker="o", capsize=3, label=str(name))
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xlabel=across, ylabel=plotted, title=self.name)
        axes.legend()
        figure.savefig(folder / f"{self.name}.png", dpi=150)


def about(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, Transformers {transformers.__version__}"
    return f"{name}; {versions}"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return shown(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
