"""Between the authors' checkpoint layout and a Hub folder of this package, both ways."""

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AddedToken,
    AutoTokenizer,
    CLIPConfig,
    PretrainedConfig,
)

from ..model.compat_emma import nested_tower_name
from ..model.configuration_emma import EmmaConfig
from ..model.errors_emma import EmmaError
from ..model.image_processing_emma import EmmaImageProcessor
from ..model.modeling_emma import EmmaForConditionalGeneration, default_generation_config
from ..model.processing_emma import EmmaProcessor
from ..model.quantization_emma import bitsandbytes_config
from ..storage.folders import new_folder, read_json, write_json
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
    read_pickle,
    write_safetensors,
    write_shards,
)
from .instruction_vocabulary import BPE_NAME, load_instruction_tokenizer, write_merges

DEFAULT_SOURCE = "saraghznfri/emma-7b"
DEFAULT_CLIP = "openai/clip-vit-large-patch14-336"

# The key tables: a name in the authors' files (a whole match) and its name here; None is left out knowingly.
LANGUAGE_MODEL_KEYS = {
    r"model\.(embed_tokens|norm|layers)\.(.+)": r"model.language_model.\1.\2",
    r"model\.mm_projector\.0\.(weight|bias)": r"model.multi_modal_projector.linear_1.\1",
    r"model\.mm_projector\.2\.(weight|bias)": r"model.multi_modal_projector.linear_2.\1",
    r"lm_head\.weight": r"lm_head.weight",
    # The authors' loader takes the towers from CLIP and the fusion weights from vision_tower.bin; these are stale.
    r"model\.vision_tower\..+": None,
    # A table that old checkpoints store and every Transformers computes.
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": None,
}
FUSION_KEYS = {
    r"(?:model\.vision_tower\.)?text_projection\.(weight|bias)": r"model.modality_adaptation.instruction_projection.\1",
    r"(?:model\.vision_tower\.)?image_text_infusion\.(weight|bias)": r"model.modality_adaptation.visual_alignment.\1",
    r"(?:model\.vision_tower\.)?learnable_tokens": r"model.modality_adaptation.visual_offset",
}
CLIP_KEYS = {
    r"(?:vision|text)_model\.embeddings\.position_ids": None,
    r"vision_model\.(.+)": r"model.vision_tower.vision_model.\1",
    r"text_model\.(.+)": r"model.instruction_encoder.text_model.\1",
    # CLIP's contrastive head.
    r"logit_scale|(?:visual|text)_projection\.weight": None,
}
# The way back. A name that no rule knows stops it, too.
REVERSE_LANGUAGE_MODEL_KEYS = {
    r"model\.language_model\.(.+)": r"model.\1",
    r"model\.multi_modal_projector\.linear_1\.(.+)": r"model.mm_projector.0.\1",
    r"model\.multi_modal_projector\.linear_2\.(.+)": r"model.mm_projector.2.\1",
    r"lm_head\.weight": r"lm_head.weight",
}
REVERSE_FUSION_KEYS = {
    r"model\.modality_adaptation\.instruction_projection\.(.+)": r"model.vision_tower.text_projection.\1",
    r"model\.modality_adaptation\.visual_alignment\.(.+)": r"model.vision_tower.image_text_infusion.\1",
    r"model\.modality_adaptation\.visual_offset": r"model.vision_tower.learnable_tokens",
}
REVERSE_CLIP_KEYS = {
    r"model\.vision_tower\.(vision_model\..+)": r"\1",
    r"model\.instruction_encoder\.(text_model\..+)": r"\1",
}

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"

LANGUAGE_MODELS = {"llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen2": "qwen2", "llava_qwen": "qwen2"}
VISION_STRATEGIES = {"patch": "default", "cls_patch": "full"}
INSTRUCTION_STRATEGIES = {"cls_patch": "full", "patch": "patch", "cls": "cls"}

CONVERTED_FILES = [
    "*.json",
    "*.safetensors",
    "pytorch_model*.bin",
    "vision_tower.bin",
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
) -> Path:
    """Turn the authors' checkpoint into a complete Hub folder.

    Args:
        source: folder or Hub id of the authors' checkpoint.
        output: folder to write; it must not exist. It appears when it is complete, or not at all.
        clip: folder or Hub id of the CLIP checkpoint. Default: the one that the checkpoint's config names.
        dtype: dtype of all floating-point tensors. Default: each tensor keeps its own.
        max_shard_size: largest weight file, in bytes or like `"5GB"`. No more than one tensor is ever in memory.
        progress: show a progress bar.
        quantization: `4bit` or `8bit`, for a folder that loads quantized. The whole weights are written beside
            `output` in the meantime.

    Raises:
        EmmaError: unknown or missing weights, damaged files, a variant that cannot run, an `output` that exists.
        FileNotFoundError: a folder, or a file in it, that is not there.
        HubError: the Hub cannot be reached, or refuses.
        MissingPackageError: with `quantization`, bitsandbytes is missing or too old.
    """
    dtype, limit = _dtype(dtype), parse_size(max_shard_size)
    if quantization is not None:
        config = bitsandbytes_config(quantization)
        with new_folder(output) as folder, tempfile.TemporaryDirectory(dir=folder.parent) as beside:
            whole = convert(source, Path(beside) / "whole", clip, dtype, max_shard_size, progress)
            model = EmmaForConditionalGeneration.from_pretrained(whole, quantization_config=config, dtype="auto")
            shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
            model.save_pretrained(folder, max_shard_size=limit)
        return Path(output)
    with new_folder(output) as folder:
        source = resolve(source, CONVERTED_FILES)
        authors = read_json(source / "config.json")
        clip = resolve(clip or authors.get("mm_vision_tower") or DEFAULT_CLIP, CONVERTED_FILES)
        config = config_from_authors(authors, _clip_config(clip))

        tensors = _renamed(read_checkpoint(source), LANGUAGE_MODEL_KEYS, source)
        tensors |= _fusion_tensors(source, config)
        tensors |= _renamed(read_checkpoint(clip), CLIP_KEYS, clip)
        if EMBEDDING in tensors:
            tensors[EMBEDDING] = AppendedTensor(tensors[EMBEDDING], mean_row(tensors[EMBEDDING]))
        if HEAD in tensors:
            tensors[HEAD] = AppendedTensor(tensors[HEAD], torch.zeros(tensors[HEAD].shape[1]))
        tensors = _checked(tensors, config, source)
        tensors = {name: cast(tensor, dtype) for name, tensor in tensors.items()}

        config.architectures = ["EmmaForConditionalGeneration"]
        config.dtype = most_common_dtype(tensors.values())
        _processor(source, clip, authors, config).save_pretrained(folder)
        config.save_pretrained(folder)
        default_generation_config(config).save_pretrained(folder)
        if (source / "tokenizer.model").is_file():
            shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
        write_shards(folder, tensors, limit, progress)
    return Path(output)


def reverse(
    source: str | Path,
    output: str | Path,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> Path:
    """Turn a Hub folder of this package into the authors' layout: the checkpoint, and CLIP in `clip/` inside it.

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
    with new_folder(output) as folder:
        source = resolve(source, CONVERTED_FILES)
        values = read_json(source / "config.json")
        if values.get("model_type") != EmmaConfig.model_type:
            raise EmmaError(
                f"`--reverse` starts from a model of this package (model_type 'emma'): {source} has "
                f"{values.get('model_type')!r}."
            )
        config = EmmaConfig.from_pretrained(source)
        if not (source / "tokenizer.model").is_file():
            raise FileNotFoundError(
                f"The authors' code reads tokenizer.model, which {source} lacks. Copy it from the language model."
            )
        stored = _checked(_nested(read_checkpoint(source)), config, source)
        stored = {name: cast(tensor, dtype) for name, tensor in stored.items()}
        last = config.text_config.vocab_size - 1
        if config.image_token_index != last:
            raise EmmaError(
                f"The row of `<image>` must be the vocabulary's last, {last}, to be taken off again: got "
                f"{config.image_token_index}."
            )
        for name in (EMBEDDING, HEAD):
            if name in stored:
                stored[name] = ShortenedTensor(stored[name])

        tables = (REVERSE_LANGUAGE_MODEL_KEYS, REVERSE_FUSION_KEYS, REVERSE_CLIP_KEYS)
        language_model, fusion, towers = (_matching(stored, table) for table in tables)
        write_shards(folder, language_model, limit, progress)
        torch.save({name: tensor.load() for name, tensor in fusion.items()}, folder / "vision_tower.bin")
        write_json(folder / "config.json", config_to_authors(config, source))
        _write_authors_tokenizers(source, folder)
        (folder / "clip").mkdir()
        write_safetensors(folder / "clip" / "model.safetensors", towers)
        write_json(folder / "clip" / "config.json", _clip_values(config))
        write_json(folder / "clip" / "preprocessor_config.json", _clip_preprocessor(source))
    return Path(output)


def config_from_authors(authors: dict[str, Any], clip: CLIPConfig) -> EmmaConfig:
    """The configuration that the authors' `config.json` and its CLIP describe, with a row for `<image>`.

    A key that the released config lacks has its released value (v1, `cls_patch`, -2).

    Raises:
        EmmaError: a variant that cannot run here or in the authors' code.
    """
    version = authors.get("encoder_version") or "v1"
    if version not in ("v1", "v3"):
        raise EmmaError(
            f"`encoder_version` must be v1 or v3: got {version!r}. "
            + ("v2 cannot run in the authors' own code." if version == "v2" else "The authors' code knows no other.")
        )
    if authors.get("mm_projector_type", "mlp2x_gelu") != "mlp2x_gelu":
        raise EmmaError(f"`mm_projector_type` must be 'mlp2x_gelu': got {authors['mm_projector_type']!r}.")
    return EmmaConfig(
        vision_config=clip.vision_config,
        instruction_config=clip.text_config,
        text_config=_text_config(authors),
        vision_feature_layer=authors.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=_choice(authors, "mm_vision_select_feature", "patch", VISION_STRATEGIES),
        instruction_feature_layer=authors.get("mm_text_select_layer") or -2,
        instruction_feature_select_strategy=_choice(
            authors, "mm_text_select_feature", "cls_patch", INSTRUCTION_STRATEGIES
        ),
        visual_offset=version == "v3",
    )


def config_to_authors(config: EmmaConfig, folder: Path) -> dict[str, Any]:
    """The authors' `config.json` for a model of this package that lies in `folder`."""
    text = config.text_config
    language_models = {ours: theirs for theirs, ours in reversed(LANGUAGE_MODELS.items())}
    if text.model_type not in language_models:
        raise EmmaError(
            f"The authors' code knows the language models {sorted(language_models)}: got {text.model_type!r}."
        )
    values = {name: value for name, value in text.to_dict().items() if name in _text_config_keys(text.model_type)}
    values.update({name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
    rope = values.pop("rope_parameters", None) or {}
    if rope:
        values["rope_theta"] = rope["rope_theta"]
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        values["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    image_processor = read_json(folder / "preprocessor_config.json")
    dtype = str(config.dtype).removeprefix("torch.")
    return {
        **values,
        "vocab_size": text.vocab_size - 1,
        "tie_word_embeddings": bool(getattr(text, "tie_word_embeddings", False)),
        "model_type": language_models[text.model_type],
        "architectures": ["LlavaLlamaForCausalLM"] if text.model_type == "llama" else None,
        "torch_dtype": "float16" if dtype == "None" else dtype,
        "mm_vision_tower": DEFAULT_CLIP,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": _key_of(VISION_STRATEGIES, config.vision_feature_select_strategy),
        "mm_text_select_layer": config.instruction_feature_layer,
        "mm_text_select_feature": _key_of(INSTRUCTION_STRATEGIES, config.instruction_feature_select_strategy),
        "encoder_version": "v3" if config.visual_offset else "v1",
        "num_learnable_tokens": 0,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": "pad" if image_processor.get("do_pad", True) else None,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": read_json(folder / "tokenizer_config.json").get("model_max_length", 2048),
    }


def _text_config(authors: dict[str, Any]) -> PretrainedConfig:
    model_type = authors.get("model_type")
    if model_type not in LANGUAGE_MODELS:
        raise EmmaError(
            f"The authors' config must have a model_type of {sorted(LANGUAGE_MODELS)}: got {model_type!r}. Is SOURCE a "
            "checkpoint of the authors' code?"
        )
    kept = _text_config_keys(LANGUAGE_MODELS[model_type]) | {"rope_theta", "rope_scaling"}
    kept |= {"bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"}
    values = {name: value for name, value in authors.items() if name in kept}
    values["vocab_size"] = authors["vocab_size"] + 1
    values.setdefault("tie_word_embeddings", False)
    return CONFIG_MAPPING[LANGUAGE_MODELS[model_type]](**values)


def _text_config_keys(model_type: str) -> set[str]:
    """Keys of a language model's config that are its own."""
    return set(CONFIG_MAPPING[model_type]().to_dict()) - set(PretrainedConfig().to_dict()) - {"model_type"}


def _choice(authors: dict[str, Any], key: str, released: str, choices: dict[str, str]) -> str:
    value = authors.get(key) or released
    if value not in choices:
        raise EmmaError(f"`{key}` must be one of {sorted(choices)}: got {value!r}.")
    return choices[value]


def _key_of(choices: dict[str, str], value: str) -> str:
    return next(key for key, other in choices.items() if other == value)


def _renamed(
    tensors: dict[str, StoredTensor], table: Mapping[str, str | None], folder: Path
) -> dict[str, StoredTensor]:
    # The specific rules, those that leave a tensor out, come before the general ones.
    rules = sorted(table.items(), key=lambda rule: rule[1] is not None)
    result = {}
    for name, tensor in tensors.items():
        rule = next(((pattern, new) for pattern, new in rules if re.fullmatch(pattern, name)), None)
        if rule is None:
            raise EmmaError(
                f"{folder} holds a weight that no key table knows: {name!r}. Is it a checkpoint of the authors' code?"
            )
        if rule[1] is not None:
            result[re.sub(rule[0], rule[1], name)] = tensor
    return result


def _matching(tensors: dict[str, StoredTensor], table: dict[str, str]) -> dict[str, StoredTensor]:
    return {
        re.sub(pattern, new, name): tensor
        for name, tensor in tensors.items()
        for pattern, new in table.items()
        if re.fullmatch(pattern, name)
    }


def _fusion_tensors(source: Path, config: EmmaConfig) -> dict[str, StoredTensor]:
    path = source / "vision_tower.bin"
    if not path.is_file():
        raise FileNotFoundError(f"{source} lacks vision_tower.bin, which holds the trained fusion weights. Fetch it.")
    fusion = _renamed(read_pickle(path), FUSION_KEYS, path)
    if not config.visual_offset:
        # The authors' v1 loader passes over it, too.
        fusion.pop("model.modality_adaptation.visual_offset", None)
    return fusion


def _nested(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {nested_tower_name(name): tensor for name, tensor in tensors.items()}


def _checked(tensors: dict[str, StoredTensor], config: EmmaConfig, folder: Path) -> dict[str, StoredTensor]:
    """The tensors in the model's order, after each was seen to be there, in its shape, and no other."""
    with torch.device("meta"):
        expected = EmmaForConditionalGeneration(config).state_dict()
    expected = {nested_tower_name(name): value for name, value in expected.items()}
    if config.tie_word_embeddings:
        expected.pop(HEAD)
        tensors.pop(HEAD, None)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise EmmaError(f"{folder} lacks {len(missing)} weights of the model, first {missing[0]!r}.")
    foreign = sorted(set(tensors) - set(expected))
    if foreign:
        raise EmmaError(f"{folder} holds {len(foreign)} weights that the model has not, first {foreign[0]!r}.")
    for name, value in expected.items():
        if tuple(value.shape) != tensors[name].shape:
            raise EmmaError(
                f"The config and the weights disagree: by the config {name!r} has shape {tuple(value.shape)}, in the "
                f"file {tensors[name].shape}. Is this the CLIP, and the config, of this checkpoint?"
            )
    return {name: tensors[name] for name in expected}


def _processor(source: Path, clip: Path, authors: dict[str, Any], config: EmmaConfig) -> EmmaProcessor:
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
        prompt_tokenizer(source, authors, config.text_config.vocab_size - 1),
        _instruction_tokenizer(source, clip),
        image_seq_length=config.image_seq_length,
        instruction_length=config.instruction_length,
    )


def prompt_tokenizer(source: Path, authors: dict[str, Any], rows: int) -> Any:
    """The language model's tokenizer of the authors' folder, where `<image>` is the id after the `rows` of the rest."""
    # From a folder of its own: beside the authors' config.json Transformers would look for their model class.
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tokenizer.model", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, Path(folder) / name)
        path = source / "tokenizer_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{source} lacks tokenizer_config.json. Fetch the tokenizer's files, too.")
        values = read_json(path)
        # Rows of a batch must end together to be continued; the authors pad at the right, for training.
        values["padding_side"] = "left"
        # Where a checkpoint is silent, the Transformers of the authors reads it so.
        values.setdefault("legacy", True)
        values.setdefault("add_bos_token", True)
        values.setdefault("model_max_length", authors.get("tokenizer_model_max_length"))
        write_json(Path(folder) / "tokenizer_config.json", values)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.init_kwargs["legacy"] = values["legacy"]
    # An embedding can have more rows than the tokenizer has tokens; they get names, so that `<image>` is the row after.
    tokenizer.add_tokens([f"<reserved_{index}>" for index in range(len(tokenizer), rows)], special_tokens=True)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    if tokenizer.convert_tokens_to_ids("<image>") != rows:
        raise EmmaError(
            f"`<image>` must be the id after the embedding's {rows} rows: the tokenizer gives it "
            f"{tokenizer.convert_tokens_to_ids('<image>')}. Is this the tokenizer of this checkpoint?"
        )
    return tokenizer


def _instruction_tokenizer(source: Path, clip: Path) -> Any:
    try:
        return load_instruction_tokenizer(source / BPE_NAME)
    except FileNotFoundError:
        return load_instruction_tokenizer(clip)


def _clip_config(clip: Path) -> CLIPConfig:
    values = read_json(clip / "config.json")
    if values.get("model_type") != "clip":
        raise EmmaError(f"CLIP must be a checkpoint of model_type 'clip': {clip} has {values.get('model_type')!r}.")
    return CLIPConfig.from_dict(values)


def _clip_values(config: EmmaConfig) -> dict[str, Any]:
    clip = CLIPConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=config.instruction_config.to_dict(),
        projection_dim=config.vision_config.projection_dim,
    )
    values = clip.to_dict()
    values.pop("transformers_version", None)
    return values


def _clip_preprocessor(source: Path) -> dict[str, Any]:
    values = read_json(source / "preprocessor_config.json")
    for name in ("auto_map", "do_pad", "processor_class"):
        values.pop(name, None)
    return {**values, "image_processor_type": "CLIPImageProcessor"}


def _write_authors_tokenizers(source: Path, folder: Path) -> None:
    shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    values = read_json(source / "tokenizer_config.json")
    kept = ("add_bos_token", "add_eos_token", "bos_token", "eos_token", "unk_token", "pad_token", "model_max_length")
    values = {name: values[name] for name in (*kept, "legacy") if name in values}
    theirs = {"padding_side": "right", "tokenizer_class": "LlamaTokenizer"}
    write_json(folder / "tokenizer_config.json", {**values, **theirs})
    specials = {name: value for name, value in values.items() if name.endswith("_token") and "add" not in name}
    write_json(folder / "special_tokens_map.json", specials)
    write_merges(AutoTokenizer.from_pretrained(source / "instruction_tokenizer"), folder / BPE_NAME)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    value = getattr(torch, dtype, None)
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise EmmaError(f"`dtype` must be float32, float16 or bfloat16: got {dtype!r}.")
    return value
