"""What fine-tuning EMMA adds to Transformers' `Trainer`: two rates, batches of one modality, sample answers, a plot."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.utils import logging

from ..data.datasets import IGNORED, DataCollator
from ..integrations.liger import register_with_liger
from ..model.errors_emma import EmmaError, MissingPackageError
from ..model.processing_emma import EmmaProcessor
from .stages import parameter_groups

logger = logging.get_logger(__name__)


class ModalityLengthSampler(Sampler[int]):
    """Rows in an order whose batches have one modality and similar lengths, as the authors train.

    Rows with and without pictures are grouped by length apart, cut into batches, and the batches shuffled. What fills
    no batch comes last, mixed.

    Args:
        lengths: one per row, negative where it has no picture, as `modality_lengths()` of a dataset gives them.
        batch_size: rows in a step, over all processes and accumulated steps.
        seed: with the epoch it decides the order, in every process the same.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """`Trainer` calls this before each epoch; a resumed run gets the order it would have had."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        batches: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for rows in (np.flatnonzero(self.lengths > 0), np.flatnonzero(self.lengths <= 0)):
            if len(rows):
                lengths = np.abs(self.lengths[rows]).tolist()
                rows = rows[get_length_grouped_indices(lengths, self.batch_size, generator=generator)]
                whole = len(rows) // self.batch_size * self.batch_size
                batches.extend(rows[:whole].reshape(-1, self.batch_size))
                rest.append(rows[whole:])
        order = torch.randperm(len(batches), generator=generator).tolist()
        for rows in [*(batches[index] for index in order), *rest]:
            yield from rows.tolist()


class EmmaTrainer(Trainer):
    """`Trainer` with a rate of its own for projector and modality adaptation, and batches of one modality.

    `args.use_liger_kernel` applies Liger's kernels ([`emma_hf.integrations.liger`]). Everything else is `Trainer`,
    which trains EMMA as well where none of these is wanted. At the end it tells which rows a dataset with
    `on_error="skip"` left out.

    Args:
        projector_learning_rate: of projector and modality adaptation. Default: `args.learning_rate`.
        group_by_modality: order the rows by [`ModalityLengthSampler`], where the dataset knows `modality_lengths`.
        **kwargs: of `Trainer`.
    """

    optimizer_cls_and_kwargs: Any

    def __init__(
        self,
        *args: Any,
        projector_learning_rate: float | None = None,
        group_by_modality: bool = True,
        **kwargs: Any,
    ) -> None:
        arguments = kwargs.get("args", args[1] if len(args) > 1 else None)
        if arguments is not None and arguments.use_liger_kernel:
            register_with_liger()
        super().__init__(*args, **kwargs)
        self.projector_learning_rate = projector_learning_rate
        self.group_by_modality = group_by_modality
        self.add_callback(_ReportSkipped(self))

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, with the groups of [`emma_hf.training.parameter_groups`]."""
        if self.optimizer is None:
            model = args[0] if args and args[0] is not None else self.model
            rate = self.args.learning_rate
            groups = parameter_groups(
                model,
                rate,
                rate if self.projector_learning_rate is None else self.projector_learning_rate,
                self.args.weight_decay,
                decays=set(self.get_decay_parameter_names(model)).__contains__,
            )
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer_cls_and_kwargs = (kind, {**options, "params": groups})
        return super().create_optimizer(*args)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.group_by_modality or not hasattr(dataset, "modality_lengths"):
            return super()._get_train_sampler(dataset)
        args = self.args
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return ModalityLengthSampler(dataset.modality_lengths(), rows, seed)


class _ReportSkipped(TrainerCallback):
    def __init__(self, trainer: Trainer) -> None:
        self.datasets = [trainer.train_dataset, trainer.eval_dataset]

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for dataset in self.datasets:
            report = dataset.skipped_report() if hasattr(dataset, "skipped_report") else None
            if report:
                logger.warning(report)


class SampleAnswers(TrainerCallback):
    """At each evaluation, answer a few rows: what the numbers mean, in words.

    The answers stand in the log, and with what was expected in `sample_answers.jsonl` in the output folder.

    Args:
        dataset: rows to answer, a [`~emma_hf.data.ConversationDataset`] or [`~emma_hf.data.ChatDataset`].
        processor: reads the answers.
        rows: how many, the first of the dataset.
        max_new_tokens: longest answer, in tokens.
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
        item = self.dataset[row]
        learned = item["labels"] != IGNORED
        first = int(learned.nonzero()[0])
        # The first answer alone: in a longer row the next user turn follows it.
        length = int((~learned[first:]).nonzero()[0]) if not learned[first:].all() else len(learned) - first
        prompt = {name: value for name, value in item.items() if name not in ("input_ids", "labels")}
        batch = self.collate([{**prompt, "input_ids": item["input_ids"][:first], "labels": item["labels"][:first]}])
        del batch["labels"]
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        batch = {
            name: value.to(model.device, dtype if value.is_floating_point() else None) for name, value in batch.items()
        }
        tokens = model.generate(**batch, max_new_tokens=self.max_new_tokens, do_sample=False)[0, first:]
        expected = item["labels"][first : first + length]
        decode = self.processor.tokenizer.decode
        texts = [decode(ids.tolist(), skip_special_tokens=True).strip() for ids in (expected, tokens)]
        return {"expected": texts[0], "answer": texts[1]}


def figure_class() -> Any:
    """matplotlib's `Figure`; what draws at its end asks for it at its beginning.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError('Plots need matplotlib: install it with `pip install "emma-hf[train]"`.') from error
    return Figure


def plot_loss(log_history: list[dict[str, Any]], path: str | Path, unit: str = "nats per token") -> None:
    """Draw training and evaluation loss over the steps.

    Args:
        log_history: of `trainer.state`.
        path: of the picture; its ending decides the format.
        unit: of the loss.

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
    axes.set(xlabel="step", ylabel=f"loss ({unit})")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
