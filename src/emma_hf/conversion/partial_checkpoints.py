"""Folders of the authors' code that hold only what was trained (stage 1, LoRA), put together with their base model."""

import math
import re
from pathlib import Path
from typing import Any

import torch

from ..model.errors_emma import EmmaError
from ..storage.folders import read_json
from ..storage.hub_access import resolve
from ..storage.tensors import (
    MergedTensor,
    StoredTensor,
    has_checkpoint,
    read_checkpoint,
    read_pickle,
    read_safetensors,
)
from .authors_config import LANGUAGE_MODELS
from .key_tables import FUSION_KEYS, LANGUAGE_MODEL_KEYS, rename_keys

PROJECTOR_NAME = "mm_projector.bin"
TRAINED_NAME = "non_lora_trainables.bin"
TOWER_NAME = "vision_tower.bin"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")

# Values of `adapter_config.json` with which the merged weight is W + alpha / r * B A (with rslora alpha / sqrt(r)).
# The first is that of a config without the key.
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "peft_type": (None, "LORA"),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    # The others change the base model's weights before training.
    "init_lora_weights": (None, True, False, "gaussian"),
}


def resolve_base(source: Path, base: str | Path | None, authors: dict[str, Any], patterns: list[str]) -> Path | None:
    """The folder of the base model that `source` needs, or None for a complete checkpoint.

    Args:
        source: folder in the authors' layout.
        base: folder or Hub id that the user named.
        authors: `config.json` of `source`.
        patterns: glob patterns of the files to download.

    Raises:
        EmmaError: a base that is missing, superfluous, or of another architecture.
        FileNotFoundError, HubError: `base` is not there.
    """
    if has_checkpoint(source):
        if base is not None:
            raise EmmaError(f"`--base` completes a stage-1 or LoRA folder: {source} holds a complete model. Drop it.")
        return None
    kind = _kind_of(source)
    if kind is None:
        # Whose error names the files that a complete checkpoint has.
        read_checkpoint(source)
    if base is None:
        known = _base_name(source, authors)
        raise EmmaError(
            f"{source} holds {kind} and no language model. Name the one that it was trained from: `emma-hf convert "
            f"--base BASE {source} OUTPUT`, where BASE is a folder or Hub id"
            + (f" ({known!r}, as the folder says)." if known else ".")
        )
    folder = resolve(base, patterns)
    wanted, found = (
        LANGUAGE_MODELS.get(str(values.get("model_type")), values.get("model_type"))
        for values in (authors, read_json(folder / "config.json"))
    )
    if wanted != found:
        raise EmmaError(
            f"`--base` must be a language model of type {wanted!r}, by itself or in the authors' layout: {folder} has "
            f"the model_type {found!r}."
        )
    return folder


def read_language_model(source: Path, base: Path | None, dtype: torch.dtype | None) -> dict[str, StoredTensor]:
    """Language model and projector under this package's names, with what `source` trained in place or merged.

    Args:
        source: folder in the authors' layout.
        base: folder of the base model; None if `source` is complete.
        dtype: dtype of merged weights. Default: that of the base model's weight.

    Raises:
        EmmaError: unknown weights, damaged files, or an adapter that cannot be merged exactly.
        FileNotFoundError: a file that is not there.
    """
    if base is None:
        return rename_keys(read_checkpoint(source), LANGUAGE_MODEL_KEYS, source)
    tensors = rename_keys(read_checkpoint(base), LANGUAGE_MODEL_KEYS, base)
    for name in (PROJECTOR_NAME, TRAINED_NAME):
        if (source / name).is_file():
            tensors |= rename_keys(_read_trained(source / name), LANGUAGE_MODEL_KEYS, source / name)
    if (source / ADAPTER_CONFIG_NAME).is_file():
        _merge_adapter(tensors, source, dtype)
    return tensors


def read_fusion(source: Path) -> dict[str, StoredTensor]:
    """The trained weights of the modality adaptation under this package's names.

    Raises:
        EmmaError: unknown weights, or a damaged file.
        FileNotFoundError: no file holds them.
    """
    fusion: dict[str, StoredTensor] = {}
    path = source / TRAINED_NAME
    if path.is_file():
        tower = {name: tensor for name, tensor in _read_trained(path).items() if name.startswith("model.vision_tower.")}
        fusion |= rename_keys(tower, FUSION_KEYS, path)
    path = source / TOWER_NAME
    if path.is_file():
        # DeepSpeed's ZeRO-3 leaves empty tensors in a module's own state dict.
        tower = {name: tensor for name, tensor in read_pickle(path).items() if tensor.nbytes}
        fusion |= rename_keys(tower, FUSION_KEYS, path)
    elif not fusion:
        raise FileNotFoundError(f"{source} lacks {TOWER_NAME}, which holds the trained fusion weights. Fetch it.")
    return fusion


def _kind_of(source: Path) -> str | None:
    if (source / ADAPTER_CONFIG_NAME).is_file():
        return f"a LoRA adapter ({ADAPTER_CONFIG_NAME})"
    if (source / PROJECTOR_NAME).is_file():
        return f"what stage 1 trains ({PROJECTOR_NAME})"
    return None


def _base_name(source: Path, authors: dict[str, Any]) -> str | None:
    path = source / ADAPTER_CONFIG_NAME
    name = read_json(path).get("base_model_name_or_path") if path.is_file() else None
    return name or authors.get("_name_or_path") or None


def _read_trained(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a file of named parameters, without the prefix of PEFT's wrapper."""
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def _merge_adapter(tensors: dict[str, StoredTensor], source: Path, dtype: torch.dtype | None) -> None:
    path = next((source / name for name in ADAPTER_NAMES if (source / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{source} lacks the adapter's weights: expected {' or '.join(ADAPTER_NAMES)}.")
    alpha, rank_exponent = _read_scale(source / ADAPTER_CONFIG_NAME)
    factors: dict[str, dict[str, StoredTensor]] = {}
    others: dict[str, StoredTensor] = {}
    for name, tensor in _read_trained(path).items():
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if match:
            factors.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
        else:
            others[name] = tensor
    tensors |= rename_keys(others, LANGUAGE_MODEL_KEYS, path)
    for name, pair in factors.items():
        # A tower's weight has no new name, and so is none of the base model's.
        renamed = next(iter(rename_keys({name: next(iter(pair.values()))}, LANGUAGE_MODEL_KEYS, path)), name)
        if len(pair) != 2 or renamed not in tensors:
            raise EmmaError(f"{path} must hold lora_A and lora_B of weights that the base model has: see {name!r}.")
        weight, down, up = tensors[renamed], pair["A"], pair["B"]
        if (up.shape[0], down.shape[1]) != weight.shape or up.shape[1] != down.shape[0]:
            raise EmmaError(
                f"{path} does not fit the base model: {name!r} has the shape {weight.shape}, its lora_B and lora_A "
                f"{up.shape} and {down.shape}. Name the base model that it was trained from."
            )
        scale = alpha / down.shape[0] ** rank_exponent
        tensors[renamed] = MergedTensor(weight, down, up, scale, dtype or weight.dtype)


def _read_scale(path: Path) -> tuple[float, float]:
    """`lora_alpha`, and the power of the rank that divides it."""
    values = read_json(path)
    for name, plain in _PLAIN_LORA.items():
        if values.get(name) not in plain:
            raise EmmaError(
                f"{path}: {name}={values[name]!r} is not merged here, only plain LoRA. Merge it with PEFT's "
                "`merge_and_unload`, and convert the complete model."
            )
    alpha = values.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise EmmaError(f"{path}: `lora_alpha` must be a number: got {alpha!r}. Fetch it again.")
    return float(alpha), 0.5 if values.get("use_rslora") else 1.0
