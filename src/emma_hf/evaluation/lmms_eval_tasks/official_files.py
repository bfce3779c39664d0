"""A benchmark of this package as a task of lmms-eval, read from the official files and scored by the same functions."""

import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from ...model.errors_emma import EmmaError, MissingPackageError
from ..runner import read_image
from ..tasks import TASKS

try:
    from datasets import Dataset, DatasetDict
    from lmms_eval.api.task import ConfigurableTask
except ImportError as error:
    raise MissingPackageError(
        f"These task files are for lmms-eval, which cannot be imported here: {error}. Install it with "
        "`pip install lmms-eval`."
    ) from error

# The environment variable that names the folder of the official files, as `--data` of `emma-hf evaluate` does.
DATA = "EMMA_HF_DATA"


class OfficialFilesTask(ConfigurableTask):
    """What the `class` of a task file names; its `metadata` says which `benchmark`.

    Args:
        config: the task file.

    Raises:
        EmmaError: `EMMA_HF_DATA` is not set, or the folder lacks a file.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        folder = os.environ.get(DATA)
        self.benchmark = TASKS[config["metadata"]["benchmark"]]
        if folder is None:
            raise EmmaError(
                f"The task {config['task']} reads the official files of {self.benchmark.title}: set the environment "
                f"variable {DATA} to their folder."
            )
        self.samples = {sample.id: sample for sample in self.benchmark.load(Path(folder))}
        # lmms-eval puts the name of a filter behind a comma.
        rows = [self.benchmark.answered(sample, "") for sample in self.samples.values()]
        self.metrics = {name.replace(",", ""): name for name in self.benchmark.summarize(rows)}
        # lmms-eval asks for each metric by itself.
        self.figures = lru_cache(maxsize=1)(self._figures)
        super().__init__(
            config={
                "task": config["task"],
                "metadata": config["metadata"],
                "output_type": "generate_until",
                "test_split": "test",
                "doc_to_text": "prompt",
                "doc_to_target": "target",
                "process_results": self.process_results,
                "metric_list": [{"metric": name, "aggregation": partial(self._figure, name)} for name in self.metrics],
                "generation_kwargs": {"max_new_tokens": self.benchmark.max_new_tokens, "temperature": 0, "until": []},
            }
        )

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Put the samples in the place of a data set that would be downloaded."""
        rows = [
            {"id": each.id, "prompt": each.prompt, "question": each.question, "target": str(each.target)}
            for each in self.samples.values()
        ]
        self.dataset = self.dataset_no_image = DatasetDict(test=Dataset.from_list(rows))

    def doc_to_visual(self, doc: dict[str, Any]) -> list[Image.Image]:
        """The images of one question."""
        return [read_image(source) for source in self.samples[doc["id"]].images]

    def process_results(self, doc: dict[str, Any], results: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Id and answer of one question, for each metric: figures are of all answers together."""
        return dict.fromkeys(self.metrics, (doc["id"], results[0]))

    def higher_is_better(self) -> dict[str, bool]:
        """Of each metric. CHAIR, Hal and Cog count mistakes; the share not parsed does, too."""
        worse = ("CHAIR", "Hal", "Cog", "answers not parsed")
        return {name: not name.startswith(worse) for name in self.metrics}

    def aggregation(self) -> dict[str, Callable[[Sequence[tuple[str, str]]], float]]:
        """The function of all answers for each metric, in percent."""
        return {name: partial(self._figure, name) for name in self.metrics}

    def _figure(self, metric: str, answers: Sequence[tuple[str, str]]) -> float:
        return self.figures(tuple(map(tuple, answers)))[self.metrics[metric]]

    def _figures(self, answers: tuple[tuple[str, str], ...]) -> dict[str, float]:
        given = dict(answers)
        rows = [self.benchmark.answered(sample, given[each]) for each, sample in self.samples.items() if each in given]
        return {name: 100 * figure.value for name, figure in self.benchmark.summarize(rows).items()}


__all__ = ["DATA", "OfficialFilesTask"]
