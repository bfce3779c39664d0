"""The two training stages of EMMA (paper section 4), with full weights, LoRA or QLoRA, for Transformers' `Trainer`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..model.compat_emma import WARMUP_SHARE
from ..model.errors_emma import EmmaError, MissingPackageError
from ..model.modeling_emma import EmmaForConditionalGeneration, EmmaPreTrainedModel
from ..model.quantization_emma import is_quantized

# The linear layers of the language model and nothing else: `q_proj` alone would also match both CLIP towers.
LORA_TARGETS = r"(?:.*\.)?language_model\.layers\.\d+\..*_proj"

# Modules that every stage trains; a LoRA checkpoint holds all their weights.
FUSION_MODULES = ("modality_adaptation", "multi_modal_projector")


@dataclass(frozen=True)
class Stage:
    """The authors' hyper-parameters of a stage, for their global batch.

    Args:
        learning_rate: learning rate of the language model or its adapter.
        projector_learning_rate: learning rate of projector and modality adaptation.
        batch_size: number of rows in a step, over all processes and accumulated steps.
        template: `template` of [`~emma_hf.data.ConversationDataset`].
    """

    learning_rate: float
    projector_learning_rate: float
    batch_size: int
    template: str = "vicuna_v1"

    def training_arguments(self) -> dict[str, Any]:
        """Keywords of `TrainingArguments`: learning rate, cosine schedule with 3% warm-up, no weight decay."""
        return {
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "cosine",
            WARMUP_SHARE: 0.03,
            "weight_decay": 0.0,
        }


STAGES = {
    "pretrain": Stage(1e-3, 1e-3, 256, template="plain"),
    "finetune": Stage(2e-5, 2e-5, 128),
    "lora": Stage(2e-4, 2e-5, 128),
    "qlora": Stage(2e-4, 2e-5, 128),
}


def stage_of(name: str) -> Stage:
    """The stage of that name.

    Raises:
        EmmaError: no such stage.
    """
    if name not in STAGES:
        raise EmmaError(f"`stage` must be one of {', '.join(map(repr, STAGES))}: got {name!r}.")
    return STAGES[name]


def prepare(
    model: EmmaForConditionalGeneration,
    stage: str,
    lora_r: int = 128,
    lora_alpha: int = 256,
    lora_dropout: float = 0.05,
    lora_targets: str | list[str] = LORA_TARGETS,
) -> nn.Module:
    """Freeze the weights that a stage does not train, and for LoRA add the adapter.

    `pretrain` trains projector and modality adaptation, `finetune` the language model too. `lora` and `qlora` train an
    adapter of the language model and all weights of both modules. CLIP is always frozen. With a visual offset (the
    authors' `encoder_version` v3) the instruction projection and the visual alignment are frozen, as in their code.

    Args:
        model: changed in place.
        stage: `"pretrain"`, `"finetune"`, `"lora"` or `"qlora"`; the last needs a model loaded in 4 or 8 bits.
        lora_r: rank of the adapter.
        lora_alpha: scale of the adapter, times `lora_r`.
        lora_dropout: dropout probability of the adapter's inputs.
        lora_targets: suffixes of the names of adapted layers, or a regular expression for the whole name.

    Returns:
        `model`, for LoRA wrapped in a `PeftModel`.

    Raises:
        EmmaError: an unknown stage, a stage that does not fit the model's quantization, targets that match no layer or
            a layer outside the language model.
        MissingPackageError: LoRA without peft.
    """
    stage_of(stage)
    quantized = is_quantized(model)
    if stage == "qlora" and not quantized:
        raise EmmaError(
            "`stage='qlora'` needs a quantized model: got one in full precision. Load it with `quantization_config=`, "
            "or use 'lora'."
        )
    if stage in ("finetune", "lora") and quantized:
        raise EmmaError(f"`stage={stage!r}` needs weights in full precision: got a quantized model. Use 'qlora'.")
    model.requires_grad_(False)
    if stage in ("lora", "qlora"):
        model = _with_adapter(model, lora_r, lora_alpha, lora_dropout, lora_targets)
    elif stage == "finetune":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    _unfreeze_fusion(model)
    return model


def _with_adapter(
    model: EmmaForConditionalGeneration, rank: int, alpha: int, dropout: float, targets: str | list[str]
) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingPackageError('LoRA needs peft: install it with `pip install "emma-hf[train]"`.') from error
    matched = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and _is_in(name, targets)
    ]
    if not matched:
        example = next(name for name, _ in model.named_modules() if _is_in(name, LORA_TARGETS))
        raise EmmaError(
            f"`lora_targets` must match linear layers of the language model: {targets!r} matches none. They are called "
            f"like {example!r}."
        )
    outside = [name for name in matched if "language_model." not in name]
    if outside:
        raise EmmaError(
            f"`lora_targets` must match the language model only, since CLIP stays frozen: {targets!r} also matches "
            f"{outside[0]!r} and {len(outside) - 1} more. Use `emma_hf.training.LORA_TARGETS`."
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        modules_to_save=list(FUSION_MODULES),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _is_in(name: str, targets: str | list[str]) -> bool:
    # As peft reads them: a regular expression for the whole name, or suffixes.
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _unfreeze_fusion(model: nn.Module) -> None:
    base = next(module for module in model.modules() if isinstance(module, EmmaPreTrainedModel))
    frozen = ("instruction_projection", "visual_alignment") if base.config.visual_offset else ()
    for name, parameter in model.named_parameters():
        # peft keeps the untrained original beside the copy that it trains.
        if is_fusion_parameter(name) and ".original_module." not in name:
            parameter.requires_grad_(not any(part in name.split(".") for part in frozen))


def is_fusion_parameter(name: str) -> bool:
    """Whether the parameter of that name belongs to the projector or the modality adaptation."""
    return any(module in name.split(".") for module in FUSION_MODULES)


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    projector_learning_rate: float,
    weight_decay: float = 0.0,
    decays: Callable[[str], bool] = lambda name: True,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, with a separate learning rate for projector and modality adaptation.

    Args:
        model: model returned by [`prepare`]; the groups hold its trainable parameters.
        learning_rate: learning rate of all other parameters.
        projector_learning_rate: learning rate of projector and modality adaptation.
        weight_decay: weight decay of the parameters for which `decays(name)` is true.
        decays: whether the parameter of that name decays; `Trainer` exempts biases and norms.

    Raises:
        EmmaError: nothing to train.
    """
    groups: dict[tuple[float, float], list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = projector_learning_rate if is_fusion_parameter(name) else learning_rate
            groups.setdefault((rate, weight_decay if decays(name) else 0.0), []).append(parameter)
    if not groups:
        raise EmmaError("No weight of this model is trained. Call `emma_hf.training.prepare(model, stage)` first.")
    return [{"params": values, "lr": rate, "weight_decay": decay} for (rate, decay), values in groups.items()]
