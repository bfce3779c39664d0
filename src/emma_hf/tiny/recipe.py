"""Sizes, budgets and settings that all phases of training share."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from ..model.compat_emma import WARMUP_SHARE
from ..training.checkpoints import last_complete_checkpoint
from ..training.plots import plot_loss
from .muon import MuonWithAdamW

SIDE, PATCH = 112, 14
VISUAL_TOKENS = (SIDE // PATCH) ** 2
VISION = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
INSTRUCTION = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 3}
PROMPT_VOCABULARY, INSTRUCTION_MERGES = 600, 400
# Largest number of scenes in a group of contrastive learning.
GROUP = 4
# Steps in which the second stage's rate rises, at most, and the share of all steps, the last, in which it falls to 0.
RISING_STEPS, FALLING_SHARE = 300, 0.2


@dataclass(frozen=True)
class Budget:
    """Length and learning rates of training. Groups and rows of a step are those of all processes together.

    Args:
        clip_steps: number of steps of contrastive learning.
        clip_groups: number of groups in such a step, a scene and others that are like it each.
        pictures: number of images that both stages train on.
        pretrain_rows: number of rows of the first stage, an image and its caption each.
        finetune_rows: number of rows of the second stage, mostly an image and one question about it each.
        batch_size: number of rows in a step of the stages.
        clip_rate: highest learning rate of contrastive learning.
        pretrain_rate: highest learning rate of the first stage.
        finetune_rate: highest learning rate of the second stage.
    """

    clip_steps: int = 9_000
    clip_groups: int = 8
    pictures: int = 80_000
    pretrain_rows: int = 12_800
    finetune_rows: int = 614_400
    batch_size: int = 64
    clip_rate: float = 2e-3
    pretrain_rate: float = 1e-3
    finetune_rate: float = 1.5e-3


SMOKE = Budget(clip_steps=150, pictures=64, pretrain_rows=512, finetune_rows=768, batch_size=32)


class SequentialTrainer(Trainer):
    """`Trainer` with rows in order: no row is seen twice, so there is nothing to shuffle.

    Muon trains the matrices and AdamW everything else, at a learning rate of `adam_share` times Muon's.
    """

    adam_share = 0.5
    optimizer: Any

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        """[`MuonWithAdamW`]."""
        if self.optimizer is None:
            args = self.args
            rates = args.learning_rate, self.adam_share * args.learning_rate
            self.optimizer = MuonWithAdamW(self.model, *rates, args.weight_decay, (args.adam_beta1, args.adam_beta2))
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


def training_arguments(
    folder: Path, steps: int, batch_size: int, learning_rate: float, seed: int, overrides: dict
) -> TrainingArguments:
    """The arguments of a phase; `batch_size` is that of all processes together."""
    processes = PartialState().num_processes
    values: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size // processes,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        WARMUP_SHARE: 0.03,
        "weight_decay": 0.01,
        "adam_beta2": 0.95,
        "logging_steps": max(1, min(50, steps // 6)),
        "logging_first_step": True,
        "save_steps": max(1, min(100, steps // 3)),
        "save_total_limit": 1,
        "seed": seed,
        "report_to": "none",
        "bf16": torch.cuda.is_available() or has_fast_bfloat16(torch.cpu.get_capabilities()),
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_num_workers": 1,
        "ddp_backend": "gloo" if processes > 1 and not torch.cuda.is_available() else None,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
    }
    return TrainingArguments(output_dir=str(folder), **{**values, **overrides})


def stable_schedule(steps: int) -> dict[str, Any]:
    """Arguments of `TrainingArguments` for a rate that stays the same but at the beginning and at the end.

    Until it falls, it does not depend on the number of steps, but for fewer than 1,500.
    """
    falling = round(FALLING_SHARE * steps)
    return {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": falling, "decay_type": "1-sqrt"},
        "warmup_steps": min(RISING_STEPS, falling),
    }


def has_fast_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """Whether a CPU of these `torch.cpu.get_capabilities()` multiplies in bfloat16. On others float32 is faster."""
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def run_phase(trainer: Trainer, folder: Path, unit: str) -> None:
    """Train from the last complete checkpoint, if any, and save the model and the plot of the loss, in `unit`."""
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    trainer.save_model()
    trainer.save_state()
    plot_loss(trainer.state.log_history, folder / "loss.png", unit)
