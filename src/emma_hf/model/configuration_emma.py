"""Configuration of EMMA: the two CLIP towers, the language model and the module between them."""

import difflib
import logging
import os
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, CLIPTextConfig, CLIPVisionConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PretrainedConfig

from .code_files_emma import AUTO_MAP, copy_code_files
from .compat_emma import push_saved, text_config_from_dict, ties_word_embeddings
from .errors_emma import EmmaError
from .language_models_emma import check_language_model
from .token_selection_emma import TOKEN_SELECTIONS, check_visual_tokens

logger = logging.getLogger(__name__)

# The released model: CLIP ViT-L/14-336 with its text encoder, and Vicuna-7B v1.5 with one more row for `<image>`.
CLIP_VISION_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
CLIP_TEXT_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "projection_dim": 768,
}
VICUNA_DEFAULTS = {
    "model_type": "llama",
    "vocab_size": 32001,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

# Number of instruction tokens that each strategy keeps out of `length`
# (the authors' `mm_text_select_feature`: cls_patch, patch, cls).
INSTRUCTION_TOKENS_KEPT = {
    "full": lambda length: length,
    "patch": lambda length: length - 1,
    "cls": lambda length: 1,
}


class EmmaInstructionConfig(CLIPTextConfig):
    """`CLIPTextConfig` that `from_pretrained` reads from the `instruction_config` of a saved [`EmmaConfig`].

    `CLIPTextConfig` itself reads the key `text_config`, which here is the language model's.
    """

    base_config_key = "instruction_config"


# Transformers' `@strict` is for dataclasses, which configs of 4.57 are not; `_validate` checks instead.
# trf-ignore: TRF010
class EmmaConfig(PretrainedConfig):
    """Configuration of [`EmmaModel`] and [`EmmaForConditionalGeneration`].

    `EmmaConfig()` describes the converted released 7B model.

    Args:
        vision_config: CLIP vision tower, a `CLIPVisionConfig` or its dictionary. Default: ViT-L/14 at 336 pixels.
        instruction_config: CLIP text encoder that reads the instruction, a `CLIPTextConfig` or its dictionary.
        text_config: language model, a causal language model's config or its dictionary. Default: Vicuna-7B v1.5.
        image_token_index: id of the `<image>` placeholder, inside the vocabulary. Default: its last id.
            Also readable as `image_token_id`.
        image_seq_length: visual tokens that an image has in a prompt. Default, and the only value that fits: as many as
            `visual_tokens`, or else `vision_seq_length`, which the vision tower gives.
        vision_feature_layer: index into the vision tower's hidden states (`mm_vision_select_layer`).
        vision_feature_select_strategy: `"default"` drops the class token, `"full"` keeps it.
        instruction_feature_layer: index into the instruction encoder's hidden states (`mm_text_select_layer`).
        instruction_feature_select_strategy: `"full"` (all tokens, the released setting), `"patch"` (without the
            first) or `"cls"` (the first only); the authors' `mm_text_select_feature`.
        instruction_length: instruction tokens per image, padding included.
        visual_offset: whether a learned (visual tokens, vision width) offset is added to the fused tokens (the
            authors' `encoder_version` v3).
        projector_hidden_act: activation of the projector.
        fusion_implementation: how the modality adaptation is computed: `"eager"` (plain PyTorch; the default, because
            the kernels have not been measured on a GPU), `"triton"` (fused kernels; an error where they cannot run) or
            `"auto"` (the kernels on CUDA where they can run, else eager).
        visual_tokens: visual tokens that are kept of each image, which makes prompts shorter. Default: all. Weights do
            not depend on it: `from_pretrained` takes it for any checkpoint, as the processor's does.
        token_selection: how they are chosen: `"diversity"`, those that differ most from each other.

    Raises:
        EmmaError: a value outside its choices, or token counts that disagree with the towers, or a language model that
            is more than a decoder and a matrix.
    """

    model_type = "emma"
    attribute_map = {"image_token_id": "image_token_index"}
    sub_configs = {
        "vision_config": CLIPVisionConfig,
        "instruction_config": EmmaInstructionConfig,
        "text_config": AutoConfig,
    }
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_outputs"]

    def __init__(
        self,
        vision_config: CLIPVisionConfig | dict[str, Any] | None = None,
        instruction_config: CLIPTextConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        image_token_index: int | None = None,
        image_seq_length: int | None = None,
        vision_feature_layer: int = -2,
        vision_feature_select_strategy: str = "default",
        instruction_feature_layer: int = -2,
        instruction_feature_select_strategy: str = "full",
        instruction_length: int = 77,
        visual_offset: bool = False,
        projector_hidden_act: str = "gelu",
        fusion_implementation: str = "eager",
        visual_tokens: int | None = None,
        token_selection: str = "diversity",
        **kwargs: Any,
    ) -> None:
        self.vision_config = _sub_config(vision_config, CLIPVisionConfig, CLIP_VISION_DEFAULTS)
        self.instruction_config = _sub_config(instruction_config, EmmaInstructionConfig, CLIP_TEXT_DEFAULTS)
        self.text_config: PretrainedConfig = _text_config(text_config)
        check_language_model(self.text_config)

        if "image_token_id" in kwargs:
            image_token_index = kwargs.pop("image_token_id")
        self.image_token_index = self.text_config.vocab_size - 1 if image_token_index is None else image_token_index
        self.vision_feature_layer = vision_feature_layer
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.instruction_feature_layer = instruction_feature_layer
        self.instruction_feature_select_strategy = instruction_feature_select_strategy
        self.instruction_length = instruction_length
        self.visual_offset = visual_offset
        self.projector_hidden_act = projector_hidden_act
        self.fusion_implementation = fusion_implementation
        self.visual_tokens = visual_tokens
        self.token_selection = token_selection
        self._validate()
        if image_seq_length is not None:
            self.image_seq_length = image_seq_length
        self._warn_of_misspelt(kwargs)

        # The head is tied, or not, as the language model's own checkpoint has it.
        kwargs.pop("tie_word_embeddings", None)
        super().__init__(tie_word_embeddings=ties_word_embeddings(self.text_config), **kwargs)

    @property
    def image_seq_length(self) -> int:
        """Visual tokens that an image has in a prompt: `visual_tokens`, or else all."""
        return self.vision_seq_length if self.visual_tokens is None else self.visual_tokens

    @image_seq_length.setter
    def image_seq_length(self, value: int) -> None:
        if value not in (self.image_seq_length, self.vision_seq_length):
            vision = self.vision_config
            raise EmmaError(
                "`image_seq_length` must be `visual_tokens`, or else the number of tokens that the vision tower gives "
                f"for one image: got {value}, but a picture of {vision.image_size} pixels in patches of "
                f"{vision.patch_size} with vision_feature_select_strategy={self.vision_feature_select_strategy!r} and "
                f"visual_tokens={self.visual_tokens} gives {self.image_seq_length}. Leave `image_seq_length` out, or "
                "correct `vision_config` or `visual_tokens`."
            )

    @property
    def vision_seq_length(self) -> int:
        """Visual tokens that the vision tower gives for one image: N, whatever `visual_tokens` keeps of them."""
        vision = self.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return patches + (self.vision_feature_select_strategy == "full")

    @property
    def instruction_seq_length(self) -> int:
        """Instruction tokens that enter the visual alignment."""
        return INSTRUCTION_TOKENS_KEPT[self.instruction_feature_select_strategy](self.instruction_length)

    @property
    def position_count(self) -> int:
        """Tokens, prompt and answer together, that the language model has positions for.

        Raises:
            EmmaError: its config does not say.
        """
        text = self.text_config
        positions = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
        if positions is None:
            raise EmmaError(
                f"The config of a language model must say how many positions it has: that of {text.model_type!r} has "
                "no `max_position_embeddings`. Add it to `text_config` in config.json."
            )
        return positions

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "EmmaConfig":
        """Like the base class, for the values of a file, which must not ask for code: see `_without_kernels`.

        Raises:
            EmmaError: an attention or experts implementation that is the name of a kernel on the Hub, or a value that
                the class refuses.
        """
        loaded = super().from_dict(_without_kernels(config_dict), **kwargs)
        # The base class sets the keywords, which replace those of the file, as attributes.
        (loaded[0] if isinstance(loaded, tuple) else loaded)._validate()
        return loaded

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> "EmmaConfig":
        """Like the base class, with the rule of `from_dict`."""
        return cls.from_dict(super()._dict_from_json_file(json_file))

    def to_dict(self) -> dict[str, Any]:
        """Like the base class, with `image_seq_length`, which other programs read from the file, and with the complete
        `auto_map`, whatever the model was loaded through.
        """
        return {**super().to_dict(), "image_seq_length": self.image_seq_length, "auto_map": dict(AUTO_MAP)}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Like the base class, with the code files that `trust_remote_code` runs beside it."""
        copy_code_files(save_directory)
        saved = super().save_pretrained(save_directory, **kwargs)
        # The base class pushes what it wrote itself, and thus no code files.
        return push_saved(self, save_directory, kwargs) if push_to_hub else saved

    def _validate(self) -> None:
        _one_of("vision_feature_select_strategy", self.vision_feature_select_strategy, ("default", "full"))
        _one_of(
            "instruction_feature_select_strategy",
            self.instruction_feature_select_strategy,
            tuple(INSTRUCTION_TOKENS_KEPT),
        )
        _one_of("fusion_implementation", self.fusion_implementation, ("auto", "eager", "triton"))
        _one_of("token_selection", self.token_selection, TOKEN_SELECTIONS)
        if self.visual_tokens is not None:
            check_visual_tokens(self.visual_tokens, self.vision_seq_length)
        activations = tuple(ACT2FN)
        _one_of("projector_hidden_act", self.projector_hidden_act, activations)
        _one_of("vision_config.hidden_act", self.vision_config.hidden_act, activations)
        _one_of("instruction_config.hidden_act", self.instruction_config.hidden_act, activations)
        _hidden_state_index("vision_feature_layer", self.vision_feature_layer, self.vision_config)
        _hidden_state_index("instruction_feature_layer", self.instruction_feature_layer, self.instruction_config)
        positions = self.instruction_config.max_position_embeddings
        if not 2 <= self.instruction_length <= positions:
            raise EmmaError(
                "`instruction_length` must be at least 2 and at most the positions of the instruction encoder: got "
                f"{self.instruction_length} with max_position_embeddings={positions} in `instruction_config`. "
                f"Set `instruction_length` to {positions} or less."
            )
        if not 0 <= self.image_token_index < self.text_config.vocab_size:
            raise EmmaError(
                f"`image_token_index` must lie inside the language model's vocabulary: got {self.image_token_index} "
                f"with vocab_size={self.text_config.vocab_size} in `text_config`. Add a row for `<image>` "
                "(`emma-hf convert` does) or name an id that exists."
            )

    def _warn_of_misspelt(self, extra: dict[str, Any]) -> None:
        # Base configs legitimately carry keys that are no argument of ours, so only a near miss is worth a warning.
        ours = [name for name in vars(self) if not name.startswith("_")]
        ours += ["image_token_id", "image_seq_length"]
        known = set(vars(PretrainedConfig())) | set(dir(PretrainedConfig))
        for key in extra:
            nearest = difflib.get_close_matches(key, ours, n=1, cutoff=0.85)
            if key not in known and nearest:
                logger.warning("EmmaConfig has no key `%s`; did you mean `%s`? It has no effect.", key, nearest[0])


def _text_config(value: PretrainedConfig | dict[str, Any] | None) -> PretrainedConfig:
    if isinstance(value, PretrainedConfig):
        return value
    values = text_config_from_dict(VICUNA_DEFAULTS if value is None else value)
    model_type = values.pop("model_type", "llama")
    if model_type not in CONFIG_MAPPING:
        raise EmmaError(
            f"`text_config` must be a language model that Transformers knows: got model_type {model_type!r}. Check its "
            "spelling, or update Transformers."
        )
    return CONFIG_MAPPING[model_type](**values)


def _sub_config(value, config_class, defaults):
    if isinstance(value, PretrainedConfig):
        return value
    return config_class(**(defaults if value is None else value))


def _without_kernels(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config file, with those of its parts, without the keys that are internal to Transformers.

    With the package kernels installed, `attn_implementation="owner/name"` downloads code and runs it, without
    `trust_remote_code` (CVE-2026-4372): a user may choose that, a file may not.
    """
    kept = {}
    for key, value in values.items():
        # Labels have numbers for keys.
        name = str(key)
        if name.endswith("_implementation_internal"):
            continue
        if name.lstrip("_") in ("attn_implementation", "experts_implementation") and "/" in str(value):
            raise EmmaError(
                f"A config file must not name a kernel of the Hub, whose code would run: got {name}={value!r}. Remove "
                f"it from the file; if you trust this kernel, pass {name.lstrip('_')}= to `from_pretrained` yourself."
            )
        kept[key] = _without_kernels(value) if isinstance(value, dict) else value
    return kept


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise EmmaError(f"`{name}` must be one of {', '.join(map(repr, choices))}: got {value!r}.")


def _hidden_state_index(name: str, index: Any, config: PretrainedConfig) -> None:
    states = config.num_hidden_layers + 1
    if not isinstance(index, int) or not -states <= index < states:
        raise EmmaError(
            f"`{name}` must index one of the {states} hidden states of its encoder (the embeddings and "
            f"{states - 1} layers), from {-states} to {states - 1}: got {index!r}. The released model uses -2."
        )


__all__ = ["EmmaConfig"]
