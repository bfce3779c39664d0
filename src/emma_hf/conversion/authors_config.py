"""The authors' `config.json` and CLIP's configuration files, to and from [`EmmaConfig`]."""

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, CLIPConfig, PretrainedConfig

from ..model.compat_emma import ties_word_embeddings
from ..model.configuration_emma import EmmaConfig
from ..model.errors_emma import EmmaError
from ..model.image_processing_emma import EmmaImageProcessor
from ..storage.folders import read_json

DEFAULT_CLIP = "openai/clip-vit-large-patch14-336"

# The authors' values and this package's. On the way back, the first of two equal ones is written.
LANGUAGE_MODELS = {"llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen2": "qwen2", "llava_qwen": "qwen2"}
VISION_STRATEGIES = {"patch": "default", "cls_patch": "full"}
INSTRUCTION_STRATEGIES = {"cls_patch": "full", "patch": "patch", "cls": "cls"}


def config_from_authors(authors: dict[str, Any], clip: CLIPConfig) -> EmmaConfig:
    """The configuration that the authors' `config.json` and its CLIP describe, with a row for `<image>`.

    A key that the config lacks, or that is null, has its value in the released model (v1, `cls_patch`, -2).

    Raises:
        EmmaError: a variant that cannot run here or in the authors' code.
    """
    version = _value(authors, "encoder_version", "v1")
    if version not in ("v1", "v3"):
        raise EmmaError(
            f"`encoder_version` must be v1 or v3: got {version!r}. "
            + ("v2 cannot run in the authors' own code." if version == "v2" else "The authors' code knows no other.")
        )
    if authors.get("mm_projector_type", "mlp2x_gelu") != "mlp2x_gelu":
        raise EmmaError(f"`mm_projector_type` must be 'mlp2x_gelu': got {authors['mm_projector_type']!r}.")
    if authors.get("mm_use_im_start_end"):
        raise EmmaError(
            "`mm_use_im_start_end` must be false: got true. Such a model has learned prompts with tokens around each "
            "image, which this package does not write."
        )
    ratio = authors.get("image_aspect_ratio")
    if ratio not in (None, "pad", "square"):
        raise EmmaError(
            f"`image_aspect_ratio` must be 'pad', 'square' or null: got {ratio!r}. An image in tiles has other visual "
            "tokens than this package makes."
        )
    return EmmaConfig(
        vision_config=clip.vision_config,
        instruction_config=clip.text_config,
        text_config=_text_config(authors),
        vision_feature_layer=_value(authors, "mm_vision_select_layer", -2),
        vision_feature_select_strategy=_choice(authors, "mm_vision_select_feature", "patch", VISION_STRATEGIES),
        instruction_feature_layer=_value(authors, "mm_text_select_layer", -2),
        instruction_feature_select_strategy=_choice(
            authors, "mm_text_select_feature", "cls_patch", INSTRUCTION_STRATEGIES
        ),
        visual_offset=version == "v3",
    )


def config_to_authors(config: EmmaConfig, folder: Path) -> dict[str, Any]:
    """The authors' `config.json` for a model of this package that is saved in `folder`.

    Raises:
        EmmaError: a language model, an activation of the projector or fewer visual tokens, which the authors' code does
            not have.
    """
    text = config.text_config
    if config.visual_tokens is not None:
        raise EmmaError(
            f"The authors' code keeps all visual tokens: got `visual_tokens` {config.visual_tokens}. Remove it and "
            "`image_seq_length` from config.json first."
        )
    if text.model_type not in LANGUAGE_MODELS.values():
        raise EmmaError(
            f"The authors' code knows the language models {sorted(set(LANGUAGE_MODELS.values()))}: got "
            f"{text.model_type!r}."
        )
    if config.projector_hidden_act != "gelu":
        raise EmmaError(
            f"The projector of the authors' code has the activation 'gelu': got `projector_hidden_act` "
            f"{config.projector_hidden_act!r}."
        )
    dtype = str(config.dtype).removeprefix("torch.")
    return {
        **_authors_text_values(text),
        "vocab_size": text.vocab_size - 1,
        "tie_word_embeddings": ties_word_embeddings(text),
        "model_type": _key_of(LANGUAGE_MODELS, text.model_type),
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
        # As in the authors' code, null means that images are not padded.
        "image_aspect_ratio": "pad" if EmmaImageProcessor.from_pretrained(folder).do_pad else None,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": read_json(folder / "tokenizer_config.json").get("model_max_length", 2048),
    }


def read_clip_config(folder: Path) -> CLIPConfig:
    """The configuration of a CLIP checkpoint.

    Raises:
        FileNotFoundError: there is no `config.json`.
        EmmaError: it is not CLIP's.
    """
    values = read_json(folder / "config.json")
    if values.get("model_type") != "clip":
        raise EmmaError(f"CLIP must be a checkpoint of model_type 'clip': {folder} has {values.get('model_type')!r}.")
    return CLIPConfig.from_dict(values)


def clip_config_values(config: EmmaConfig) -> dict[str, Any]:
    """The `config.json` of a CLIP checkpoint that holds the two towers of a model."""
    values = CLIPConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=config.instruction_config.to_dict(),
        projection_dim=config.vision_config.projection_dim,
    ).to_dict()
    values.pop("transformers_version", None)
    return values


def clip_preprocessor_values(folder: Path) -> dict[str, Any]:
    """CLIP's `preprocessor_config.json` for a model of this package that is saved in `folder`."""
    values = read_json(folder / "preprocessor_config.json")
    for name in ("auto_map", "do_pad", "processor_class"):
        values.pop(name, None)
    return {**values, "image_processor_type": "CLIPImageProcessor"}


def _text_config(authors: dict[str, Any]) -> PretrainedConfig:
    model_type = authors.get("model_type")
    if model_type not in LANGUAGE_MODELS:
        raise EmmaError(
            f"The authors' config must have a model_type of {sorted(LANGUAGE_MODELS)}: got {model_type!r}. Is SOURCE a "
            "checkpoint of the authors' code?"
        )
    kept = _text_config_keys(LANGUAGE_MODELS[model_type]) | {"rope_theta", "rope_scaling"}
    kept |= {"bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"}
    # What is null has its default, as a missing key; but Mistral without a window says so by null.
    values = {n: value for n, value in authors.items() if n in kept and (value is not None or n == "sliding_window")}
    values["vocab_size"] = authors["vocab_size"] + 1
    values.setdefault("tie_word_embeddings", False)
    return CONFIG_MAPPING[LANGUAGE_MODELS[model_type]](**values)


def _authors_text_values(text: PretrainedConfig) -> dict[str, Any]:
    """The keys of a language model's config in the authors' file, whose Transformers has the rope values apart."""
    values = {name: value for name, value in text.to_dict().items() if name in _text_config_keys(text.model_type)}
    values.update({name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
    rope = values.pop("rope_parameters", None)
    if rope:
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        values["rope_theta"] = rope["rope_theta"]
        values["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return values


def _text_config_keys(model_type: str) -> set[str]:
    """Keys that a language model's config has and the base class of all configs has not."""
    return set(CONFIG_MAPPING[model_type]().to_dict()) - set(PretrainedConfig().to_dict()) - {"model_type"}


def _value(authors: dict[str, Any], key: str, released: Any) -> Any:
    """A value of the authors' config; `released` if it is missing or null, but not if it is 0."""
    value = authors.get(key)
    return released if value is None else value


def _choice(authors: dict[str, Any], key: str, released: str, choices: dict[str, str]) -> str:
    value = _value(authors, key, released)
    if value not in choices:
        raise EmmaError(f"`{key}` must be one of {sorted(choices)}: got {value!r}.")
    return choices[value]


def _key_of(choices: dict[str, str], value: str) -> str:
    return next(key for key, other in choices.items() if other == value)
