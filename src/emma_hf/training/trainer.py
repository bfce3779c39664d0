"""`Trainer` with a separate learning rate for projector and modality adaptation, and single-modality batches."""

from functools import partial
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Seq2SeqTrainer, Trainer

from ..data.collator import split_first_answers
from ..data.conversations import IGNORE_INDEX
from ..integrations.liger import register_with_liger
from ..model.modeling_emma import is_sharded
from .callbacks import SkippedRowsCallback
from .sampler import ModalityLengthSampler
from .stages import parameter_groups


class EmmaTrainer(Trainer):
    """`Trainer` with a separate learning rate for projector and modality adaptation, and single-modality batches.

    `args.use_liger_kernel` applies Liger's kernels ([`emma_hf.integrations.liger`]). At the end of training it logs
    which rows a dataset with `on_error="skip"` left out. A plain `Trainer` trains EMMA too, without these.

    With `args=Seq2SeqTrainingArguments(predict_with_generate=True)` it answers: `predict`, and `evaluate` where
    `compute_metrics` is given, generate the first answer of each row from what stands before it. Predictions are the
    ids of these answers and `label_ids` those of the expected ones, both (rows, tokens) padded with -100; the loss is
    that of all answers. Of the arguments, `generation_config` takes the place of the model's, `generation_max_length`
    is the maximum length of an answer in tokens, and `generation_num_beams` the number of beams.

    Args:
        projector_learning_rate: learning rate of projector and modality adaptation. Default: `args.learning_rate`.
        group_by_modality: order the rows by [`ModalityLengthSampler`] if the dataset has `modality_lengths`.
        **kwargs: arguments of `Trainer`.
    """

    optimizer_cls_and_kwargs: Any
    compute_loss_func: Any

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
        # `Trainer` knows the class by its name, which FSDP2 changes; 4.57 also scales an accumulated loss wrongly.
        if self.label_smoother is not None and self.compute_loss_func is None:
            self.compute_loss_func = partial(_smoothed_loss, self.label_smoother.epsilon)
        self.projector_learning_rate = projector_learning_rate
        self.group_by_modality = group_by_modality
        self.add_callback(SkippedRowsCallback(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, here also in several processes after an evaluation."""
        shards = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.accelerator.use_distributed and not shards and self.model_wrapped is self.model:
            # An evaluation marks the model as prepared. accelerate puts no DDP around a model that is, and each process
            # would train a model of its own.
            self.model._is_accelerate_prepared = False
        return super().train(*args, **kwargs)

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """Create the optimizer that the arguments name, with the groups of [`emma_hf.training.parameter_groups`]."""
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
            optimizer_class, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, model
            )
            self.optimizer_cls_and_kwargs = (optimizer_class, {**options, "params": groups})
        return super().create_optimizer(*args)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """`Trainer.prediction_step`, which generates where the arguments say so; see [`EmmaTrainer`]."""
        # A field of `Seq2SeqTrainingArguments`.
        generates = getattr(self.args, "predict_with_generate", False) and not prediction_loss_only
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only or generates, ignore_keys)
        if not generates:
            return loss, logits, labels
        batch = {name: value.to(self.args.device) for name, value in inputs.items()}
        prompts, expected = split_first_answers(batch, self.model.config)
        kwargs = self._generation_kwargs()
        with self.compute_loss_context_manager():
            tokens = self.model.generate(**prompts, **kwargs)
        answers = tokens[:, prompts["input_ids"].shape[1] :]
        configs = (kwargs.get("generation_config"), self.model.generation_config)
        ends = [config.eos_token_id for config in configs if config and config.eos_token_id is not None]
        is_end = torch.isin(answers, torch.tensor(ends[0] if ends else [], device=answers.device))
        return loss, answers.masked_fill(is_end.cumsum(1) > is_end.long(), IGNORE_INDEX), expected

    def _generation_kwargs(self) -> dict[str, Any]:
        """Keywords of `generate`, from `Seq2SeqTrainingArguments`."""
        args: Any = self.args
        kwargs = {"max_new_tokens": args.generation_max_length, "num_beams": args.generation_num_beams}
        if args.generation_config is not None:
            kwargs["generation_config"] = Seq2SeqTrainer.load_generation_config(args.generation_config)
        if any(map(is_sharded, self.model.parameters())):
            # Every process gathers weights until the longest answer of all is complete.
            kwargs["synced_gpus"] = True
        return {name: value for name, value in kwargs.items() if value is not None}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.group_by_modality or not hasattr(dataset, "modality_lengths"):
            return super()._get_train_sampler(dataset)
        args = self.args
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return ModalityLengthSampler(dataset.modality_lengths(), rows, seed)


def _smoothed_loss(
    epsilon: float, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Next-token cross-entropy against labels (batch, tokens) of which a share `epsilon` is spread over all tokens."""
    logits, labels = outputs["logits"][:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(
        logits, labels.to(logits.device), ignore_index=IGNORE_INDEX, label_smoothing=epsilon, reduction="sum"
    )
    return total / ((labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)
