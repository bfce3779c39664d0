"""The benchmarks, by the name that `--task` takes."""

from .amber import AMBER_TASKS, amber_score
from .base import Figure, ImageSource, Sample, ScoredRow, Task
from .choices import CHOICE_TASKS
from .mathvista import MathVista
from .mmmu import MMMU_TASKS
from .pairs import MMVP, Foil
from .vqa import VQA_TASKS
from .yes_no import Pope

TASKS: dict[str, Task] = {
    task.name: task
    for task in (*VQA_TASKS, *CHOICE_TASKS, *MMMU_TASKS, MathVista(), MMVP(), Pope(), *AMBER_TASKS, Foil())
}

__all__ = ["TASKS", "Figure", "ImageSource", "Sample", "ScoredRow", "Task", "amber_score"]
