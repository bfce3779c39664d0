"""The benchmarks, by the name that `--task` takes."""

from .base import Figure, ImageSource, Sample, ScoredRow, Task

TASKS: dict[str, Task] = {}

__all__ = ["TASKS", "Figure", "ImageSource", "Sample", "ScoredRow", "Task"]
