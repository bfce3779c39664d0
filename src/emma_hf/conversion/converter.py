"""Between the authors' checkpoint layout and a Hub folder of this package, both ways."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..model.compat_emma import nested_tower_name
from ..model.configuration_emma import EmmaConfig
from ..model.errors_emma import EmmaError
from ..model.image_processing_emma import EmmaImageProcessor
from ..model.modeling_emma import EmmaForConditionalGeneration, default_generation_config
from ..model.processing_emma import EmmaProcessor
from ..model.quantization_emma import bitsandbytes_config
from ..model.token_selection_emma import check_visual_tokens
from ..storage.folders import damaged_files_named, new_folder, read_json, write_json
from ..storage.hub_access import resolve
from ..storage.tensors import (
    AppendedTensor,
    ShortenedTensor,
    StoredTensor,
    cast,
    mean_row,
    most_common_dtype,
    parse_size,
    read_checkpoint,
    write_safetensors,
    write_shards,
)
from .authors_config import (
    DEFAULT_CLIP,
    clip_config_values,
    clip_preprocessor_values,
    config_from_authors,
    config_to_authors,
    read_clip_config,
)
from .instruction_vocabulary import BPE_NAME
from .key_tables import (
    CLIP_KEYS,
    REVERSE_CLIP_KEYS,
    REVERSE_FUSION_KEYS,
    REVERSE_LANGUAGE_MODEL_KEYS,
    rename_keys,
    select_and_rename,
)
from .partial_checkpoints import (
    ADAPTER_NAMES,
    PROJECTOR_NAME,
    TOWER_NAME,
    TRAINED_NAME,
    read_fusion,
    read_language_model,
    resolve_base,
)
from .tokenizers import instruction_tokenizer, prompt_tokenizer, write_authors_tokenizers

DEFAULT_SOURCE = "saraghznfri/emma-7b"
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"

CONVERTED_FILES = [
    "*.json",
    "*.safetensors",
    "pytorch_model*.bin",
    TOWER_NAME,
    PROJECTOR_NAME,
    TRAINED_NAME,
    *ADAPTER_NAMES,
    "tokenizer.model",
    "merges.txt",
    BPE_NAME,
]


def convert(
    source: str | Path = DEFAULT_SOURCE,
    output: str | Path = "emma-7b",
    clip: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
    quantization: str | None = None,
    base: str | Path | None = None,
    visual_tokens: int | None = None,
) -> Path:
    """Convert the authors' checkpoint to a complete Hub folder.

    A folder that holds only what was trained, the projector of stage 1 or a LoRA adapter, is completed by its `base`.
    Adapters are merged in float32, and each weight is rounded once.

    Args:
        source: folder or Hub id of the authors' checkpoint.
        output: folder to write; it must not exist. It appears when it is complete, or not at all.
        clip: folder or Hub id of the CLIP checkpoint. Default: the folder `clip` of the checkpoint, or
            else the one that its config names.
        dtype: dtype of all floating-point tensors. Default: each tensor keeps its own.
        max_shard_size: largest weight file, in bytes or like `"5GB"`. No more than one tensor is ever in memory.
        progress: show a progress bar.
        quantization: `4bit` or `8bit`, for a folder that loads quantized. The unquantized weights are written to a
            temporary folder first, and the model is loaded.
        base: for a stage-1 or LoRA folder, folder or Hub id of the model that it was trained from: a language model as
            Transformers saves it, or a complete checkpoint of the authors' code.
        visual_tokens: visual tokens that the config and the processor keep of each image. Default: all. The weights
            are the same.

    Raises:
        EmmaError: unknown or missing weights, damaged files, a variant that cannot run, a `base` that is missing or
            does not fit, `visual_tokens` that the vision tower does not give, an `output` that exists.
        FileNotFoundError: a folder, or a file in it, that is not there.
        HubError: the Hub cannot be reached, or refuses.
        MissingPackageError: with `quantization`, bitsandbytes is missing or too old.
    """
    dtype, limit = _dtype(dtype), parse_size(max_shard_size)
    if quantization is None:
        with new_folder(output) as folder, damaged_files_named(source):
            _write_converted(folder, source, clip, base, dtype, limit, progress, visual_tokens)
        return Path(output)
    config = bitsandbytes_config(quantization)
    # Inside the hidden folder, so that a killed run leaves nothing complete behind.
    with new_folder(output) as folder, tempfile.TemporaryDirectory(dir=folder) as unquantized:
        with damaged_files_named(source):
            _write_converted(Path(unquantized), source, clip, base, dtype, limit, progress, visual_tokens)
        model = EmmaForConditionalGeneration.from_pretrained(unquantized, quantization_config=config, dtype="auto")
        shutil.copytree(unquantized, folder, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
        model.save_pretrained(folder, max_shard_size=limit)
    return Path(output)


def _write_converted(
    folder: Path,
    source: str | Path,
    clip: str | Path | None,
    base: str | Path | None,
    dtype: torch.dtype | None,
    max_shard_size: int,
    progress: bool,
    visual_tokens: int | None,
) -> None:
    source = resolve(source, CONVERTED_FILES)
    authors = read_json(source / "config.json")
    if authors.get("model_type") == EmmaConfig.model_type:
        raise EmmaError(
            f"`convert` starts from the authors' checkpoint: {source} is a model of this package already. The other "
            "direction is `--reverse`."
        )
    # Towers that were trained lie where `reverse` wrote them.
    own = source / "clip" if (source / "clip" / "config.json").is_file() else None
    clip = resolve(clip or own or authors.get("mm_vision_tower") or DEFAULT_CLIP, CONVERTED_FILES)
    config = config_from_authors(authors, read_clip_config(clip))
    if visual_tokens is not None:
        check_visual_tokens(visual_tokens, config.vision_seq_length)
    config.visual_tokens = visual_tokens
    base = resolve_base(source, base, authors, CONVERTED_FILES)

    tensors = read_language_model(source, base, dtype)
    tensors |= read_fusion(source)
    if not config.visual_offset:
        # The authors' v1 loader ignores it, too.
        tensors.pop("model.modality_adaptation.visual_offset", None)
    tensors |= rename_keys(read_checkpoint(clip), CLIP_KEYS, clip)
    if EMBEDDING in tensors:
        tensors[EMBEDDING] = AppendedTensor(tensors[EMBEDDING], mean_row(tensors[EMBEDDING]))
    if HEAD in tensors:
        tensors[HEAD] = AppendedTensor(tensors[HEAD], torch.zeros(tensors[HEAD].shape[1]))
    tensors = _validate_against_model(tensors, config, source)
    tensors = {name: cast(tensor, dtype) for name, tensor in tensors.items()}

    config.architectures = ["EmmaForConditionalGeneration"]
    config.dtype = most_common_dtype(tensors.values())
    tokenizer = prompt_tokenizer(base or source, authors, config.text_config.vocab_size - 1)
    _processor(tokenizer, source, clip, authors, config).save_pretrained(folder)
    config.save_pretrained(folder)
    default_generation_config(config).save_pretrained(folder)
    if ((base or source) / "tokenizer.model").is_file():
        shutil.copyfile((base or source) / "tokenizer.model", folder / "tokenizer.model")
    write_shards(folder, tensors, max_shard_size, progress)


def reverse(
    source: str | Path,
    output: str | Path,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> Path:
    """Convert a Hub folder of this package to the authors' layout: the checkpoint, and CLIP in `clip/` inside it.

    Converting the result again gives the same tensors, bit for bit. CLIP's contrastive head, which no loader of EMMA
    uses, is not written.

    Args:
        source: folder or Hub id of a converted model.
        output: folder to write; it must not exist. It appears when it is complete, or not at all.
        dtype: dtype of all floating-point tensors. Default: each tensor keeps its own.
        max_shard_size: largest weight file, in bytes or like `"5GB"`.
        progress: show a progress bar.

    Raises:
        EmmaError: not a model of this package, damaged files, an `output` that exists.
        FileNotFoundError: a folder, or a file in it, that is not there.
        HubError: the Hub cannot be reached, or refuses.
    """
    dtype, limit = _dtype(dtype), parse_size(max_shard_size)
    with new_folder(output) as folder, damaged_files_named(source):
        source = resolve(source, CONVERTED_FILES)
        config, tensors = _read_converted(source)
        config.dtype = dtype or config.dtype
        write_json(folder / "config.json", config_to_authors(config, source))
        tensors = {name: cast(tensor, dtype) for name, tensor in tensors.items()}
        write_shards(folder, select_and_rename(tensors, REVERSE_LANGUAGE_MODEL_KEYS), limit, progress)
        fusion = select_and_rename(tensors, REVERSE_FUSION_KEYS)
        torch.save({name: tensor.load() for name, tensor in fusion.items()}, folder / "vision_tower.bin")
        write_authors_tokenizers(source, folder)
        (folder / "clip").mkdir()
        write_safetensors(folder / "clip" / "model.safetensors", select_and_rename(tensors, REVERSE_CLIP_KEYS))
        write_json(folder / "clip" / "config.json", clip_config_values(config))
        write_json(folder / "clip" / "preprocessor_config.json", clip_preprocessor_values(source))
    return Path(output)


def _read_converted(source: Path) -> tuple[EmmaConfig, dict[str, StoredTensor]]:
    """Config and tensors of a model of this package, without the rows of `<image>`."""
    values = read_json(source / "config.json")
    if values.get("model_type") != EmmaConfig.model_type:
        raise EmmaError(
            f"`--reverse` starts from a model of this package (model_type 'emma'): {source} has "
            f"{values.get('model_type')!r}."
        )
    config = EmmaConfig.from_pretrained(source)
    if config.text_config.model_type == "qwen2":
        raise EmmaError(f"`--reverse` writes Llama's tokenizer.model: {source} is a 'qwen2', which has none.")
    if not (source / "tokenizer.model").is_file():
        raise FileNotFoundError(
            f"The authors' code reads tokenizer.model, which {source} lacks. Copy it from the language model."
        )
    tensors = {nested_tower_name(name): tensor for name, tensor in read_checkpoint(source).items()}
    tensors = _validate_against_model(tensors, config, source)
    last = config.text_config.vocab_size - 1
    if config.image_token_index != last:
        raise EmmaError(
            f"The row of `<image>` must be the vocabulary's last, {last}, to be taken off again: got "
            f"{config.image_token_index}."
        )
    for name in (EMBEDDING, HEAD):
        if name in tensors:
            tensors[name] = ShortenedTensor(tensors[name])
    return config, tensors


def _validate_against_model(
    tensors: dict[str, StoredTensor], config: EmmaConfig, folder: Path
) -> dict[str, StoredTensor]:
    """The tensors in the model's order. Each weight of the model must be there, in its shape, and no other.

    A head that is tied to the embedding is left out.
    """
    with torch.device("meta"):
        expected = EmmaForConditionalGeneration(config).state_dict()
    expected = {nested_tower_name(name): value for name, value in expected.items()}
    if config.tie_word_embeddings:
        expected.pop(HEAD)
        tensors = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise EmmaError(f"{folder} lacks {len(missing)} weights of the model, first {missing[0]!r}.")
    unexpected = sorted(set(tensors) - set(expected))
    if unexpected:
        raise EmmaError(f"{folder} holds {len(unexpected)} weights that the model has not, first {unexpected[0]!r}.")
    for name, value in expected.items():
        if tuple(value.shape) != tensors[name].shape:
            raise EmmaError(
                f"The config and the weights disagree: by the config {name!r} has shape {tuple(value.shape)}, in the "
                f"file {tensors[name].shape}. Is this the CLIP, and the config, of this checkpoint?"
            )
    return {name: tensors[name] for name in expected}


def _processor(tokenizer: Any, source: Path, clip: Path, authors: dict[str, Any], config: EmmaConfig) -> EmmaProcessor:
    preprocessor = clip / "preprocessor_config.json"
    values = read_json(preprocessor) if preprocessor.is_file() else {}
    side = config.vision_config.image_size
    image_processor = EmmaImageProcessor(
        do_pad=authors.get("image_aspect_ratio") == "pad",
        size=values.get("size", side),
        resample=values.get("resample", 3),
        crop_size=values.get("crop_size", side),
        image_mean=values.get("image_mean"),
        image_std=values.get("image_std"),
    )
    return EmmaProcessor(
        image_processor,
        tokenizer,
        instruction_tokenizer(source, clip),
        image_seq_length=config.image_seq_length,
        instruction_length=config.instruction_length,
        vision_seq_length=config.vision_seq_length,
    )


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise EmmaError(f"`dtype` must be float32, float16 or bfloat16: got {dtype!r}.")
    return DTYPES[dtype]
