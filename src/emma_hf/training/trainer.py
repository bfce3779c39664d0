"""What fine-tuning EMMA adds to Transformers' `Trainer`: two rates, batches of one modality, sample answers, a plot."""

from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.utils import logging

from ..integrations.liger import register_with_liger
from .callbacks import SkippedRowsCallback
from .sampler import ModalityLengthSampler
from .stages import parameter_groups

logger = logging.get_logger(__name__)


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
        self.add_callback(SkippedRowsCallback(self))

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
