"""When the kernels of `fused_alignment.py` compute the modality adaptation, and why they cannot.

They read the weights of `instruction_projection` and `visual_alignment` without calling these modules, which is right
only where the modules are unmodified.
"""

import torch
from torch import nn

from .errors_emma import EmmaError, MissingPackageError
from .fused_alignment import (
    DTYPES,
    INTERPRETED,
    has_forward_derivatives,
    instruction_projection,
    triton,
    visual_alignment,
    visual_alignment_of_rows,
)


def check_fusion_implementation(implementation: str) -> None:
    """Refuse, before any weight is made, what this machine can never run.

    Raises:
        MissingPackageError: `triton` was asked for and is not installed.
    """
    if implementation == "triton" and triton is None:
        raise MissingPackageError(
            "fusion_implementation='triton' needs the package triton, which is not installed: install it with "
            "`pip install \"emma-hf[kernels]\"`, or use 'auto' or 'eager'."
        )


def should_use_kernels(
    implementation: str, adaptation: nn.Module, vision_features: torch.Tensor, instruction_features: torch.Tensor
) -> bool:
    """Whether the kernels compute `adaptation` for these inputs; decided anew in each call, since models move.

    Args:
        implementation: `eager`, `auto` or `triton`.
        adaptation: an `EmmaModalityAdaptation`; its `kernel_modules` give the names of the modules whose weights the
            kernels read, and the classes that these modules must be of.
        vision_features: V (images, N, vision width).
        instruction_features: H (images, T, instruction width).

    Raises:
        EmmaError: `triton` was asked for and cannot run here.
    """
    if implementation == "eager":
        return False
    reason = _why_kernels_cannot_run(adaptation, vision_features, instruction_features)
    if implementation == "auto":
        # An exported program must run where this file is not.
        return reason is None and not torch.compiler.is_exporting()
    if reason is not None:
        raise EmmaError(f"fusion_implementation='triton' cannot run: {reason}; or use 'auto' or 'eager'.")
    return True


def fused_adaptation(
    adaptation: nn.Module,
    vision_features: torch.Tensor,
    instruction_features: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """F (images, N, vision width), or its chosen rows, from the kernels.

    Args:
        adaptation: an `EmmaModalityAdaptation` for which [`should_use_kernels`] is true.
        vision_features: V (images, N, vision width).
        instruction_features: H (images, T, instruction width).
        rows: the rows of F that are computed for each image, (images, K). Default: all.

    Returns:
        F in the dtype of the weights, or in that of autocast where it is on.
    """
    projection, alignment = adaptation.instruction_projection, adaptation.visual_alignment
    device, dtype = vision_features.device.type, alignment.weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    projected = instruction_projection(
        instruction_features.to(dtype), projection.weight.to(dtype), projection.bias.to(dtype)
    )
    features, weight, bias = vision_features.to(dtype), alignment.weight.to(dtype), alignment.bias.to(dtype)
    if rows is None:
        return visual_alignment(features, projected, weight, bias)
    # The kernel has one matrix for all images. Of few rows PyTorch's own product of batches takes no longer.
    return visual_alignment_of_rows(features, projected, weight, bias, rows)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its class's `forward`: hooks, or a `forward` that accelerate replaced."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def is_unmodified_linear(linear: nn.Module) -> bool:
    """Whether `linear.weight` can be read directly: a plain `nn.Linear` without hooks.

    A linear layer that is quantized, adapted, offloaded or sharded must be called.
    """
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not has_hooks(linear)


def _why_kernels_cannot_run(
    adaptation: nn.Module, vision_features: torch.Tensor, instruction_features: torch.Tensor
) -> str | None:
    """Why the kernels cannot run, and the remedy; None where they can."""
    if triton is None:
        return "the package triton is not installed; install it"
    if has_forward_derivatives():
        return "the kernels have derivatives in reverse mode alone; leave `torch.func.jvp`"
    device = vision_features.device
    if not _device_runs_kernels(device.type, device.index):
        return f"it needs a CUDA device of compute capability 8.0 or newer, and the features are on {device}; move them"
    dtype = adaptation.visual_alignment.weight.dtype
    for name, expected in adaptation.kernel_modules.items():
        reason = _why_weights_cannot_be_read(name, adaptation.get_submodule(name), expected, dtype, device)
        if reason is not None:
            return reason
    if instruction_features.device != device:
        return f"both features must be on one device: got {device} and {instruction_features.device}; move one"
    return None


def _why_weights_cannot_be_read(
    name: str, module: nn.Module, expected: type[nn.Module], dtype: torch.dtype, device: torch.device
) -> str | None:
    if type(module) is not expected:
        actual = f"{type(module).__module__}.{type(module).__name__}"
        return f"`{name}` must be a plain {expected.__name__}: got {actual}; merge or unwrap it"
    if has_hooks(module):
        return f"`{name}` must be called for its hooks (offloading, ZeRO-3, yours); remove them"
    for parameter in (module.weight, module.bias):
        if type(parameter) is not nn.Parameter and type(parameter) is not torch.Tensor:
            return f"`{name}` must have plain weights: got {type(parameter).__name__}; load it unquantized"
        if parameter.dtype not in DTYPES or parameter.dtype != dtype:
            return f"weights must all be float32, float16 or bfloat16: `{name}` has {parameter.dtype}; convert them"
        if parameter.device != device:
            return f"weights and features must be on one device: `{name}` is on {parameter.device}; move it"
    return None


@torch.compiler.assume_constant_result
def _device_runs_kernels(device_type: str, index: int | None) -> bool:
    if device_type != "cuda":
        return device_type == "cpu" and INTERPRETED
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)


__all__ = [
    "check_fusion_implementation",
    "fused_adaptation",
    "has_hooks",
    "is_unmodified_linear",
    "should_use_kernels",
]
