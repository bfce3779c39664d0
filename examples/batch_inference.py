"""Answer a table of pictures and questions with Ray Data, on any number of workers and machines.

    python examples/batch_inference.py questions.csv answers.jsonl --model emma-7b --workers 4

The table (CSV, JSON lines or Parquet: a file, or a folder of files of one kind) has the columns `image` and `question`;
pictures are paths (beside the table, or in `--image-folder`), URLs, data URLs or, in Parquet, bytes. The output has the
rows and columns of the input, in its order, and `answer` and `error`: a row that cannot be answered says why, and the
others are answered all the same. On a cluster, run it where `ray` finds the cluster (`RAY_ADDRESS`); the pictures and
the model must be in reach of every machine.
"""

import argparse
import os
from pathlib import Path
from typing import Any

# Read where Ray starts: nothing is reported to anybody.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pyarrow
import ray
import torch

from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor

READERS = {".csv": ray.data.read_csv, ".jsonl": ray.data.read_json, ".parquet": ray.data.read_parquet}
# The row's place in the input, which no worker changes.
ORDER = "__row__"


class Answerer:
    """One worker: the model, loaded once, and the answers to one batch of rows after the other."""

    def __init__(self, model: str, image_folder: str, max_new_tokens: int) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor = EmmaProcessor.from_pretrained(model)
        # What stands before an answer must not differ in place from row to row.
        self.processor.tokenizer.padding_side = "left"
        self.model = EmmaForConditionalGeneration.from_pretrained(model, dtype="auto").to(self.device).eval()
        self.image_folder = Path(image_folder)
        self.max_new_tokens = max_new_tokens

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        """The table with `answer` and `error`, each null where the other is not."""
        answers: list[str | None] = [None] * len(batch)
        errors: list[str | None] = [None] * len(batch)
        images, prompts, places = [], [], []
        for place, row in enumerate(batch.select(["image", "question"]).to_pylist()):
            try:
                images.append(self._picture(row["image"]))
                prompts.append(self._prompt(row["question"]))
                places.append(place)
            except (ValueError, OSError) as error:
                del images[len(places) :]
                errors[place] = str(error)
        if places:
            for place, answer in zip(places, self._answers(images, prompts)):
                answers[place] = answer
        return batch.append_column("answer", pyarrow.array(answers, pyarrow.string())).append_column(
            "error", pyarrow.array(errors, pyarrow.string())
        )
