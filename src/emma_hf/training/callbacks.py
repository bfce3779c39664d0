"""Callbacks of a training run."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..data.collator import DataCollator, split_first_answers
from ..data.datasets import TrainingDataset
from ..model.processing_emma import EmmaProcessor

logger = logging.get_logger(__name__)


def report_skipped_rows(dataset: Any) -> None:
    """Log which rows a dataset with `on_error="skip"` has left out."""
    report = dataset.skipped_report() if isinstance(dataset, TrainingDataset) else None
    if report:
        logger.warning(report)


class SkippedRowsCallback(TrainerCallback):
    """Log at the end of training which rows a dataset with `on_error="skip"` left out."""

    def __init__(self, trainer: Trainer) -> None:
        self.datasets = [trainer.train_dataset, trainer.eval_dataset]

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for dataset in self.datasets:
            report_skipped_rows(dataset)


class SampleAnswersCallback(TrainerCallback):
    """Answer the first rows of a dataset at each evaluation.

    The answers are logged, and appended with the expected ones to `sample_answers.jsonl` in the output folder.

    Args:
        dataset: a [`~emma_hf.data.ConversationDataset`] or [`~emma_hf.data.ChatDataset`].
        processor: its tokenizer decodes the answers.
        rows: number of rows to answer.
        max_new_tokens: maximum length of an answer, in tokens.
    """

    def __init__(self, dataset: Any, processor: EmmaProcessor, rows: int = 3, max_new_tokens: int = 64) -> None:
        self.dataset = dataset
        self.processor = processor
        self.rows = min(rows, len(dataset))
        self.max_new_tokens = max_new_tokens
        self.collate = DataCollator(processor)
        self.step: int | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            return
        self.step = state.global_step
        training = model.training
        model.eval()
        answers = [{"step": state.global_step, "row": row, **self._answer(model, row)} for row in range(self.rows)]
        model.train(training)
        if state.is_world_process_zero:
            with open(Path(args.output_dir) / "sample_answers.jsonl", "a", encoding="utf-8") as file:
                for answer in answers:
                    logger.warning(
                        f"step {answer['step']}, row {answer['row']}: expected {answer['expected']!r}, answered "
                        f"{answer['answer']!r}"
                    )
                    file.write(json.dumps(answer, ensure_ascii=False) + "\n")

    @torch.no_grad()
    def _answer(self, model: Any, row: int) -> dict[str, str]:
        batch = {name: value.to(model.device) for name, value in self.collate([self.dataset[row]]).items()}
        prompt, expected = split_first_answers(batch, model.config)
        tokens = model.generate(**prompt, max_new_tokens=self.max_new_tokens, do_sample=False)
        new_tokens = tokens[0, prompt["input_ids"].shape[1] :]
        decode = self.processor.tokenizer.decode
        texts = [decode(ids.tolist(), skip_special_tokens=True).strip() for ids in (expected[0], new_tokens)]
        return {"expected": texts[0], "answer": texts[1]}
