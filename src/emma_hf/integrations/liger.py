"""Liger's Triton kernels in EMMA's language model and its loss, by one call (package `liger-kernel`)."""

import os
import sys
from functools import partial
from typing import Any

import torch
from torch import nn

from ..model.errors_emma import EmmaError, MissingPackageError
from ..model.fusion_emma import is_unmodified_linear
from ..model.modeling_emma import EmmaForConditionalGeneration, is_sharded

# Families whose norms and gated MLPs compute what Liger's kernels for Llama do.
FAMILIES = ("llama", "ministral", "mistral", "qwen2", "qwen3", "smollm3")


def apply_liger_kernel_to_emma(
    model: nn.Module,
    rope: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    fused_linear_cross_entropy: bool = True,
    accum_dtype: torch.dtype | None = None,
) -> None:
    """Replace parts of the language model and the training loss by Liger's kernels.

    Norms, MLPs and the loss are replaced in this model alone. The rotary embedding is a function that all models of the
    same family in this process share: Liger's replaces it for all of them, unless `rope=False`. CLIP, the modality
    adaptation and the projector stay as they are.

    Args:
        model: an EMMA with its head, also inside a `PeftModel`; changed in place, before or after PEFT wraps it.
        rope: rotary position embedding.
        rms_norm: the norms.
        swiglu: the gated activation of the MLPs.
        fused_linear_cross_entropy: in training, the loss from the hidden states and `lm_head`, chunk by chunk:
            `logits` is then None. In evaluation there are logits, unless `forward` gets `skip_logits=True`.
        accum_dtype: dtype in which the chunks of the head's gradient are summed. Default: that of the weight; in
            bfloat16, float32 is closer to the gradient of the plain loss, and needs one more copy of the head.

    Raises:
        MissingPackageError: liger-kernel or triton is not installed, or too new for Transformers 4.57.
        EmmaError: a model that is not an EMMA with its head, a language model, an activation or a head that Liger's
            kernels do not compute, or no GPU.
    """
    try:
        from liger_kernel.transformers import LigerSwiGLUMLP, liger_rotary_pos_emb
        from liger_kernel.transformers.monkey_patch import _patch_rms_norm_module, _patch_swiglu_module
        from liger_kernel.utils import infer_device
    except ImportError as error:
        raise _missing_package(error) from error
    emma = next((module for module in model.modules() if isinstance(module, EmmaForConditionalGeneration)), None)
    if emma is None:
        raise EmmaError(
            f"`model` must be an EmmaForConditionalGeneration, or hold one: got {type(model).__name__}. For other "
            "models call Liger's own functions."
        )
    if infer_device() == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise EmmaError("Liger's kernels run on a GPU: there is none here. Leave them out.")
    language_model = emma.model.language_model
    _check_language_model(language_model.config, swiglu)
    if fused_linear_cross_entropy:
        _check_head(emma.lm_head)
    if rope:
        vars(sys.modules[type(language_model).__module__])["apply_rotary_pos_emb"] = liger_rotary_pos_emb
    for name, module in language_model.named_modules():
        if rms_norm and type(module) is type(language_model.norm):
            _patch_rms_norm_module(module)
        elif swiglu and name.endswith(".mlp"):
            _patch_swiglu_module(module, LigerSwiGLUMLP)
    emma.linear_loss = partial(_linear_loss, accum_dtype=accum_dtype) if fused_linear_cross_entropy else None


def register_with_liger() -> None:
    """Register EMMA with Liger: then `TrainingArguments(use_liger_kernel=True)` applies the kernels in any `Trainer`.

    Liger does nothing for a model type that it does not know, and says so only in its log.
    [`~emma_hf.training.EmmaTrainer`] calls this function.

    Raises:
        MissingPackageError: liger-kernel or triton is not installed, or too new for Transformers 4.57.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise _missing_package(error) from error
    MODEL_TYPE_TO_APPLY_LIGER_FN["emma"] = apply_liger_kernel_to_emma


def _linear_loss(
    hidden_states: torch.Tensor,
    head: nn.Module,
    labels: torch.Tensor,
    accum_dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Next-token cross-entropy of hidden states (batch, tokens, width) and labels (batch, tokens)."""
    from liger_kernel.transformers.model.loss_utils import LigerForCausalLMLoss

    weight = _check_head(head)
    return LigerForCausalLMLoss(
        hidden_states.contiguous(), weight, labels, weight.shape[1], accum_dtype=accum_dtype, **kwargs
    )


def _check_language_model(config: Any, swiglu: bool) -> None:
    if config.model_type not in FAMILIES:
        raise EmmaError(
            f"The language model must be of a family whose parts Liger's kernels compute ({', '.join(FAMILIES)}): it "
            f"has no kernels for {config.model_type!r}. Leave them out."
        )
    if swiglu and config.hidden_act not in ("silu", "swish"):
        raise EmmaError(
            f"Liger's MLP computes the activation 'silu' only: this language model has {config.hidden_act!r}. Pass "
            "`swiglu=False`."
        )


def _check_head(head: nn.Module) -> torch.Tensor:
    # Tensor parallelism leaves a DTensor, ZeRO-3 an empty weight between forward passes of the head.
    if is_unmodified_linear(head) and not is_sharded(head.weight) and head.weight.ndim == 2:
        return head.weight
    raise EmmaError(
        "Liger's fused loss reads the weight of `lm_head`, which must be a plain linear layer, whole on one device: "
        f"got {type(head).__name__} (quantized, adapted, offloaded or sharded). Pass "
        "`fused_linear_cross_entropy=False`."
    )


def _missing_package(error: ImportError) -> MissingPackageError:
    return MissingPackageError(
        f"Liger's kernels need the packages liger-kernel and triton: {str(error).rstrip('.')}. Install them with "
        '`pip install "emma-hf[liger]"`; with Transformers 4.57, liger-kernel 0.7.'
    )
