"""A model and its processor, from a folder or the Hub, on a device."""

from pathlib import Path
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..model.configuration_emma import EmmaConfig
from ..model.errors_emma import EmmaError
from ..model.modeling_emma import EmmaForConditionalGeneration
from ..model.processing_emma import EmmaProcessor
from ..model.quantization_emma import bitsandbytes_config, is_quantized
from ..storage.folders import damaged_files_named, read_json
from ..storage.hub_access import resolve
from ..storage.tensors import read_weight_map

DTYPES = ("auto", "float32", "float16", "bfloat16")
# Files of a Hub repository that loading reads: neither pickles nor code.
FILES = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.txt")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
CONVERT = "`emma-hf convert SOURCE OUTPUT` writes such a folder from the authors' checkpoint."


def load_model(
    source: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    quantization: str | None = None,
    revision: str | None = None,
    visual_tokens: int | None = None,
) -> tuple[EmmaForConditionalGeneration, EmmaProcessor]:
    """Load a model for inference, and its processor.

    A Hub repository is looked up once: without a network, what the cache holds is loaded at once.

    Args:
        source: folder of a converted model, Hub id (`org/name`), or `emma-tiny` for the one that ships.
        device: such as `cpu` or `cuda:1`. Default: `cuda` where there is one, else `cpu`.
        dtype: dtype of the computation: a dtype, its name, or `auto` for that of the weights.
        quantization: `4bit` or `8bit`: quantize the language model while loading. Default: as stored.
        revision: branch, tag or commit of a Hub repository. Default: the main branch.
        visual_tokens: visual tokens to keep of each image. Default: as the model's config says.

    Returns:
        The model, in evaluation mode on `device`, and the processor.

    Raises:
        EmmaError: a device that this machine lacks, a `dtype` or `quantization` that does not exist, `visual_tokens`
            that the vision tower does not give, a folder that is no converted model or has damaged files.
        FileNotFoundError: no such folder or repository.
        HubError: a repository that cannot be fetched.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise EmmaError(f"`dtype` must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}: got {dtype!r}.")
    device = _checked_device(device)
    options: dict[str, Any] = {}
    tokens = {} if visual_tokens is None else {"visual_tokens": visual_tokens}
    if quantization is not None:
        options = {"quantization_config": bitsandbytes_config(quantization), "device_map": {"": device}}
    folder = resolve(source, FILES, revision)
    _check_converted(folder)
    # Before the weights, which take long: a wrong folder is reported at once.
    processor = _load_processor(folder, **tokens)
    with damaged_files_named(folder):
        model = EmmaForConditionalGeneration.from_pretrained(folder, dtype=dtype, **options, **tokens).eval()
    # Quantized weights are put on their device while they are read.
    return (model if is_quantized(model) else model.to(device)), processor


def _checked_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise EmmaError(f"`device` must be a device of this machine: got {str(device)!r} ({error}).") from error


def _check_converted(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise EmmaError(f"A model is a folder with config.json, weights and processor: {folder} has none. {CONVERT}")
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != EmmaConfig.model_type:
        raise EmmaError(
            f"Models of this package have the model_type {EmmaConfig.model_type!r}: {folder} has {model_type!r}. "
            f"{CONVERT}"
        )
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise EmmaError(f"A model needs its processor beside it: {folder} lacks {PROCESSOR_FILES[0]}. {CONVERT}")
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        read_weight_map(folder / SAFE_WEIGHTS_INDEX_NAME)
    elif not (folder / SAFE_WEIGHTS_NAME).is_file():
        # Pickles are not read here.
        raise EmmaError(f"A model needs its weights beside it: {folder} lacks {SAFE_WEIGHTS_NAME}. {CONVERT}")


def _load_processor(folder: Path, **options: Any) -> EmmaProcessor:
    try:
        return EmmaProcessor.from_pretrained(folder, **options)
    except EmmaError:
        raise
    # Damaged or missing files of tokenizers and image processors raise nearly anything, also KeyError.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise EmmaError(
            f"The processor's files must be complete: those of {folder} cannot be read ({type(error).__name__}: "
            f"{reason}). Save or fetch them again. {CONVERT}"
        ) from error
