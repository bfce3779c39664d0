"""4-bit and 8-bit loading: what is quantized, what cannot be, and saving it exactly."""

import copy
import inspect
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from .compat_emma import is_left_unquantized
from .errors_emma import EmmaError
from .loading_emma import UNQUANTIZED_REMEDY, loading_errors

# All but the language model's layers keep their dtype. With and without the name of the base model, because
# Transformers 5 compares from the start of a module's path.
_UNQUANTIZED_MODULES = ("vision_tower", "instruction_encoder", "modality_adaptation", "multi_modal_projector")
NOT_QUANTIZED = ("lm_head", *_UNQUANTIZED_MODULES, *(f"model.{name}" for name in _UNQUANTIZED_MODULES))

# How the quantizers of Transformers call their lists of what to leave alone.
_SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
# bitsandbytes takes 64 values of a row together, and on a CPU 32 rows.
_PACKED = 64


def bitsandbytes_config(bits: str) -> BitsAndBytesConfig:
    """The usual quantization: nf4 with double quantization, or int8 with outliers apart.

    Args:
        bits: `4bit` or `8bit`.

    Raises:
        EmmaError: another word.
        MissingPackageError: bitsandbytes is missing or too old.
    """
    if bits not in ("4bit", "8bit"):
        raise EmmaError(f"`quantization` must be 4bit or 8bit: got {bits!r}.")
    with loading_errors(bits):
        if bits == "8bit":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )


def add_modules_to_skip(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `from_pretrained` whose quantization leaves all but the language model's layers alone.

    Args:
        kwargs: with a `quantization_config` of any method, an object or its dictionary, or with the shorthands
            `load_in_4bit` and `load_in_8bit`. A list of modules to leave alone is kept, and added to.
    """
    kwargs = dict(kwargs)
    config = kwargs.pop("quantization_config", None)
    if kwargs.get("load_in_4bit") or kwargs.get("load_in_8bit"):
        if config is not None:
            raise EmmaError(
                "`load_in_4bit` and `load_in_8bit` are short for a `quantization_config`: got both. Set them in "
                "the config."
            )
        names = set(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"}
        config = BitsAndBytesConfig(**{name: kwargs.pop(name) for name in list(kwargs) if name in names})
    if config is None:
        return kwargs
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy.deepcopy(config)
    for name in _SKIP_LISTS:
        if name in vars(config):
            chosen = vars(config)[name] or []
            setattr(config, name, [*chosen, *(part for part in NOT_QUANTIZED if part not in chosen)])
    return {**kwargs, "quantization_config": config}


def check_quantizable(language_model: nn.Module, quantization_config: Any) -> None:
    """Refuse sizes that 4 bits cannot pack, before any weight is read.

    Args:
        language_model: with its linear layers, of any device.
        quantization_config: an object or its dictionary.

    Raises:
        EmmaError: a linear layer with a size that is no multiple of 64.
    """
    values = quantization_config if isinstance(quantization_config, dict) else vars(quantization_config)
    if not (values.get("load_in_4bit") or values.get("_load_in_4bit")):
        return
    skipped = values.get("llm_int8_skip_modules") or []
    for name, module in language_model.named_modules():
        name = f"model.language_model.{name}"
        if (
            isinstance(module, nn.Linear)
            and not is_left_unquantized(name, skipped)
            and (module.in_features % _PACKED or module.out_features % _PACKED)
        ):
            raise EmmaError(
                f"4-bit loading needs layers whose sizes are multiples of {_PACKED}: `{name}` has {module.in_features} "
                f"inputs and {module.out_features} outputs. Name it in `llm_int8_skip_modules`, or load in 8 bits."
            )


def check_quantized(model: nn.Module, source: object) -> None:
    """Refuse a loaded model whose layers wait for quantized weights and got others.

    Args:
        model: a model that `from_pretrained` has loaded.
        source: name of the checkpoint, for the message.

    Raises:
        EmmaError: the config says that the weights are quantized, and they are not.
    """
    for name, module in model.named_modules():
        # What bitsandbytes loads or makes has a class of its own.
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt") and type(module.weight) is nn.Parameter:
            raise EmmaError(
                f"The weights must be quantized as config.json says: {source} has `{name}` in {module.weight.dtype}. "
                f"{UNQUANTIZED_REMEDY}"
            )


def is_quantized(model: nn.Module) -> bool:
    """Whether a quantizer of Transformers replaced layers of `model`."""
    return bool(getattr(model, "is_quantized", False))


def keep_exact(model: nn.Module) -> None:
    """Make the weights of 4-bit layers that run on a CPU read as they were loaded, wherever they are read.

    With AVX-512 BF16 bitsandbytes 0.50 rearranges the weights when they first run, which a single token reads up to a
    hundred times faster. It rounds their statistics and cannot undo that: what is saved, dequantized, merged or trained
    then is another model. A class with a `weight` property, because PEFT merges without calling anything of the model,
    so that no call of ours could undo the rearrangement in time.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and module.weight.quant_state is not None:
            exact = _exact_linear()
            if exact is None:
                module.support_avx512bf16_for_cpu = False
            else:
                module.__class__ = exact


@cache
def _exact_linear() -> type | None:
    # In a `try` also because whoever loads code from the Hub is asked to install what it imports elsewhere.
    try:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse
        from bitsandbytes.nn import Linear4bit
    except ImportError:
        # Another version than 0.50: its layers are kept from arranging anything.
        return None

    class ExactLinear4bit(Linear4bit):
        """A `Linear4bit` whose weight is only seen as it was loaded."""

        running = False

        @property
        def weight(self) -> nn.Parameter:
            weight = self._parameters["weight"]
            if not self.running and getattr(weight.quant_state, "packing_format_for_cpu", False):
                weight.data, _ = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
                weight.quant_state = self.quant_state = self.statistics
            return weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = self._parameters["weight"].quant_state
            # The new arrangement has no gradient.
            if self.training or x.requires_grad:
                state = self.weight.quant_state
            if not getattr(state, "packing_format_for_cpu", False):
                self.statistics = copy.copy(state)
            self.running = True
            try:
                return super().forward(x)
            finally:
                self.running = False

    return ExactLinear4bit


__all__ = [
    "NOT_QUANTIZED",
    "add_modules_to_skip",
    "bitsandbytes_config",
    "check_quantizable",
    "check_quantized",
    "keep_exact",
]
