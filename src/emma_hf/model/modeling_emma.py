"""EMMA: LLaVA-1.5 whose visual tokens already know what is asked (arXiv 2410.02080).

LLaVA and three things: a CLIP text encoder that reads the instruction, the module that mixes it into the visual tokens,
and one row of instruction ids for each image. Letters of the paper, and sizes in the released 7B model:

    N   visual tokens per image, 576                   T   instruction tokens per image, 77
    K   visual tokens that are kept of them: all, or `visual_tokens` of the config
    V   (images, N, vision width 1024)                 what CLIP's vision tower sees
    H   (images, T, instruction width 768)             what CLIP's text encoder reads
    Wp, bp   (1024, 768), (1024,)                      instruction projection
    P   (images, T, vision width)                      GELU(H Wp^T + bp)
    Wa, ba   (N, N + T), (N,)                          visual alignment, on the token axis
    F   (images, N, vision width)                      Wa [V ; P] + ba
    W1, b1, W2, b2                                     the projector of LLaVA-1.5
    Z   (images, K, text width 4096)                   W2 GELU(W1 F + b1) + b2, in place of the placeholders
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.activations import ACT2FN
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .clip_towers_emma import EmmaInstructionEncoder, EmmaVisionTower
from .compat_emma import (
    CACHE_NAME,
    HEAD_TP_PLAN,
    keep_nested_names_on_save,
    nested_tower_name,
    tied_weights_keys,
    tower_key_mapping,
    unwrap_clip_model,
)
from .configuration_emma import EmmaConfig
from .errors_emma import EmmaError
from .fused_alignment import visual_alignment_of_rows, visual_alignment_reference
from .fusion_emma import check_fusion_implementation, fused_adaptation, should_use_kernels
from .image_encoding_emma import EmmaImageEncoding
from .loading_emma import loading_errors
from .quantization_emma import add_modules_to_skip, check_quantizable, check_quantized, keep_exact
from .token_selection_emma import select_diverse

# Per-image inputs: one row per image, needed only in the prefill step.
IMAGE_INPUTS = ("pixel_values", "instruction_input_ids", "vision_features", "image_features")

# What the running version calls the language model's outputs (the cache has two names).
_LANGUAGE_MODEL_FIELDS = tuple(field.name for field in fields(BaseModelOutputWithPast))


class _ImageHiddenStates:
    """`image_hidden_states`, under which LLaVA's outputs hold the visual tokens."""

    image_outputs: BaseModelOutputWithPooling | None

    @property
    def image_hidden_states(self) -> torch.FloatTensor | None:
        """Z (images, K, text width), which replaced the placeholders; None where the batch has no image."""
        return None if self.image_outputs is None else self.image_outputs.pooler_output


@dataclass
class EmmaModelOutputWithPast(_ImageHiddenStates, BaseModelOutputWithPast):
    """Output of [`EmmaModel`].

    Args:
        last_hidden_state: (batch, tokens, text width), after the language model's final norm.
        image_outputs: output of [`EmmaModel.get_image_features`]; its `pooler_output`, Z (images, K, text width),
            replaced the placeholders. None where the batch has no image.
        **others: cache (`cache`, before Transformers 5.24 `past_key_values`), `hidden_states` and `attentions` of the
            language model, where they are asked for.
    """

    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class EmmaCausalLMOutputWithPast(_ImageHiddenStates, CausalLMOutputWithPast):
    """Output of [`EmmaForConditionalGeneration`].

    Args:
        loss: scalar, where `labels` are given.
        logits: (batch, tokens or `logits_to_keep`, vocabulary).
        image_outputs: see [`EmmaModelOutputWithPast`].
        **others: see [`EmmaModelOutputWithPast`].
    """

    image_outputs: BaseModelOutputWithPooling | None = None


class EmmaVisualAlignment(nn.Module):
    """Linear map over the token axis: `Wa [V ; P] + ba`, visual tokens first (paper section 3).

    Not an `nn.Linear`: quantizers replace those and assume that the last axis is multiplied.
    """

    def __init__(self, visual_tokens: int, instruction_tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(visual_tokens, visual_tokens + instruction_tokens))
        self.bias = nn.Parameter(torch.empty(visual_tokens))

    def forward(
        self, vision_features: torch.Tensor, projected: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """V (images, N, vision width) and P (images, T, vision width) to F (images, N, vision width).

        Where there are `rows` (images, K), F has these alone, each image its own: (images, K, vision width).
        """
        if rows is None:
            return visual_alignment_reference(vision_features, projected, self.weight, self.bias)
        return visual_alignment_of_rows(vision_features, projected, self.weight, self.bias, rows)


class EmmaModalityAdaptation(nn.Module):
    """Mix the instruction into the visual tokens: `P = GELU(H Wp^T + bp)`, `F = Wa [V ; P] + ba`.

    The authors' `encoder_version` v3 adds a learned offset to F.
    """

    # The modules whose weights the kernels read, and the only classes for which that is right.
    kernel_modules = {"instruction_projection": nn.Linear, "visual_alignment": EmmaVisualAlignment}

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__()
        self.config = config
        tokens, width = config.vision_seq_length, config.vision_config.hidden_size
        self.instruction_projection = nn.Linear(config.instruction_config.hidden_size, width)
        self.visual_alignment = EmmaVisualAlignment(tokens, config.instruction_seq_length)
        # CODEPATH: the authors' v3 checkpoints have the offset, the released one (v1) has none.
        self.visual_offset = nn.Parameter(torch.empty(tokens, width)) if config.visual_offset else None

    def forward(self, vision_features: torch.Tensor, instruction_features: torch.Tensor) -> torch.Tensor:
        """V (images, N, vision width) and H (images, T, instruction width) to F (images, K, vision width)."""
        rows = self.select_rows(vision_features)
        # CODEPATH: any checkpoint, by its `fusion_implementation`; the released one says eager.
        if should_use_kernels(self.config.fusion_implementation, self, vision_features, instruction_features):
            fused = fused_adaptation(self, vision_features, instruction_features, rows)
        else:
            dtype = self.visual_alignment.weight.dtype
            projected = nn.functional.gelu(self.instruction_projection(instruction_features.to(dtype)))
            chosen = () if rows is None else (rows,)
            fused = self.visual_alignment(vision_features.to(dtype), projected, *chosen)
        if self.visual_offset is None:
            return fused
        return fused + (self.visual_offset if rows is None else self.visual_offset[rows])

    def select_rows(self, vision_features: torch.Tensor) -> torch.Tensor | None:
        """The visual tokens that the config keeps of each image, which are the rows of Wa, ba and the offset.

        Args:
            vision_features: V (images, N, vision width).

        Returns:
            Indices (images, K), ascending; None where all are kept.
        """
        config = self.config
        # CODEPATH: any checkpoint, by the `visual_tokens` that it is loaded with; the released one keeps all.
        if config.image_seq_length == config.vision_seq_length:
            return None
        return select_diverse(vision_features, config.image_seq_length)


class EmmaMultiModalProjector(nn.Module):
    """The LLaVA-1.5 projector: two linear layers with an activation between."""

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width)

    def forward(self, fused_features: torch.Tensor) -> torch.Tensor:
        """(images, K, vision width) to (images, K, text width)."""
        return self.linear_2(self.act(self.linear_1(fused_features.to(self.linear_1.bias.dtype))))


class EmmaPreTrainedModel(PreTrainedModel):
    """Weights, loading and saving shared by [`EmmaModel`] and [`EmmaForConditionalGeneration`]."""

    config_class = EmmaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["EmmaModalityAdaptation"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """Weights that a checkpoint lacks begin as those of a model made from the config.

        Transformers 5 otherwise skips CLIP's own initialization, taking it for that of other people's code.
        """
        return False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, EmmaVisualAlignment):
            # [identity | 0] and 0: an untrained EMMA is exactly LLaVA.
            # Serving engines make weights without memory under a default device that is another.
            with torch.device(module.weight.device):
                nn.init.eye_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, EmmaModalityAdaptation):
            if module.visual_offset is not None:
                nn.init.zeros_(module.visual_offset)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "EmmaPreTrainedModel":
        """`PreTrainedModel.from_pretrained`, which here reads both spellings of the towers' weight names.

        A `quantization_config` of any method quantizes the language model's layers and nothing else. The placeholder is
        never generated, whatever the checkpoint's `generation_config.json` says of `suppress_tokens`.

        Raises:
            EmmaError: a weight file that is truncated or damaged, weights of another shape or form than the config
                says, or layers of a size that 4 bits cannot pack.
            MissingPackageError: a quantization whose package is missing or too old.
        """
        mapping = tower_key_mapping()
        if mapping is not None:
            kwargs["key_mapping"] = {**mapping, **(kwargs.get("key_mapping") or {})}
        kwargs = add_modules_to_skip(kwargs)
        source = args[0] if args else "the checkpoint"
        with loading_errors(source):
            loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        check_quantized(model, source)
        keep_exact(model)
        if model.can_generate():
            suppress_image_token(model.generation_config, model.config)
        return loaded

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **kwargs: Any
    ) -> nn.Module:
        """`PreTrainedModel.resize_token_embeddings`, which here keeps the row of the placeholder.

        Raises:
            EmmaError: a size that would cut it off.
        """
        rows = -(-(new_num_tokens or 0) // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
        image = self.config.image_token_index
        if new_num_tokens is not None and rows <= image:
            raise EmmaError(
                f"The vocabulary must keep the placeholder of an image, id {image}: got new_num_tokens="
                f"{new_num_tokens}. Pass at least {image + 1}."
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """`PreTrainedModel.save_pretrained`, in a form that every supported Transformers version loads."""
        keep_nested_names_on_save(self)
        super().save_pretrained(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """`nn.Module.load_state_dict`, which here reads both spellings of the towers' weight names.

        `Trainer` resumes by it, and loads the best checkpoint, from the names that `save_pretrained` has written.
        """
        names = {nested_tower_name(name): name for name in self.state_dict()}
        renamed = {names.get(nested_tower_name(name), name): value for name, value in state_dict.items()}
        # As it came where nothing is renamed: it may carry versions of modules.
        return super().load_state_dict(state_dict if renamed.keys() == state_dict.keys() else renamed, *args, **kwargs)


class EmmaModel(EmmaPreTrainedModel):
    """EMMA without the language modelling head."""

    # `AutoModel` on a complete checkpoint: the head is not lost, it is not asked for.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__(config)
        check_fusion_implementation(config.fusion_implementation)
        self.vision_tower = EmmaVisionTower._from_config(
            config.vision_config, feature_layer=config.vision_feature_layer
        )
        self.instruction_encoder = EmmaInstructionEncoder._from_config(
            config.instruction_config, feature_layer=config.instruction_feature_layer
        )
        self.modality_adaptation = EmmaModalityAdaptation(config)
        self.multi_modal_projector = EmmaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        check_quantizable(self.language_model, vars(config).get("quantization_config", {}))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def set_decoder(self, decoder: nn.Module) -> None:
        self.language_model = decoder

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Visual tokens V, independent of the instruction.

        Args:
            pixel_values: (images, 3, height, width), floating point, as the image processor makes them.

        Returns:
            (images, N, vision width).

        Raises:
            EmmaError: wrong number of dimensions or channels, wrong size, or a dtype that is not floating point.
        """
        return self._select_vision_tokens(self._run_vision_tower(pixel_values).last_hidden_state)

    def get_instruction_features(self, instruction_input_ids: torch.Tensor) -> torch.Tensor:
        """The instruction as CLIP's text encoder reads it: H, causal mask only, no padding mask, no final norm.

        Args:
            instruction_input_ids: (images, instruction_length), integers.

        Returns:
            (images, T, instruction width).

        Raises:
            EmmaError: wrong shape or dtype, or an id outside the instruction encoder's vocabulary.
        """
        check_instruction_ids(self.config, instruction_input_ids)
        encoder = self.instruction_encoder
        weight = unwrap_clip_model(encoder).embeddings.token_embedding.weight
        instruction_input_ids = instruction_input_ids.to(execution_device(weight, instruction_input_ids))
        # One question about several images is read once.
        instruction_input_ids, rows = unique_rows(instruction_input_ids)
        with torch.set_grad_enabled(needs_grad(encoder)):
            hidden_states = encoder(instruction_input_ids).last_hidden_state
        kept = {"full": slice(None), "patch": slice(1, None), "cls": slice(0, 1)}
        hidden_states = hidden_states[:, kept[self.config.instruction_feature_select_strategy]]
        return hidden_states if rows is None else hidden_states[rows]

    def encode_image(self, pixel_values: torch.Tensor) -> EmmaImageEncoding:
        """Encode images once, for any number of questions about them.

        Args:
            pixel_values: (images, 3, height, width), floating point, as the image processor makes them.

        Returns:
            An [`EmmaImageEncoding`]: `.image_features(instruction_input_ids)` is what `forward` and `generate` take as
            `image_features`.

        Raises:
            EmmaError: see `get_vision_features`.
        """
        return EmmaImageEncoding(self, self.get_vision_features(pixel_values))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        instruction_input_ids: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Visual tokens that have read the instruction, in the language model's width: Z.

        Args:
            pixel_values: (images, 3, height, width), floating point.
            instruction_input_ids: (images, instruction_length), one row per image.
            vision_features: (images, N, vision width) from `get_vision_features`, in place of `pixel_values`.
            output_hidden_states: also return the vision tower's hidden states; it is then computed to its end. Default:
                as the config says.
            output_attentions: also return the vision tower's attentions; likewise.

        Returns:
            An output whose `pooler_output` is Z (images, K, text width) and whose `last_hidden_state` is V (images, N,
            vision width).

        Raises:
            EmmaError: both or neither of `pixel_values` and `vision_features`; images and instructions that differ
                in number; tensors of a wrong shape or dtype.
        """
        check_image_inputs(self.config, pixel_values, instruction_input_ids, vision_features)
        tower = BaseModelOutputWithPooling()
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if vision_features is None and (output_hidden_states or output_attentions):
            tower = self._run_vision_tower(pixel_values, output_hidden_states, output_attentions)
            vision_features = self._select_vision_tokens(tower.last_hidden_state)
        elif vision_features is None:
            vision_features = self.get_vision_features(pixel_values)
        else:
            tokens, width = self.config.vision_seq_length, self.config.vision_config.hidden_size
            check_features("vision_features", vision_features, tokens, width)
        check_one_instruction_per_image(vision_features, instruction_input_ids)
        instruction_features = self.get_instruction_features(instruction_input_ids)
        fused_features = self.modality_adaptation(vision_features.to(instruction_features.device), instruction_features)
        return BaseModelOutputWithPooling(
            last_hidden_state=vision_features,
            pooler_output=self.multi_modal_projector(fused_features),
            hidden_states=tower.hidden_states,
            attentions=tower.attentions,
        )

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor | None
    ) -> torch.Tensor:
        """Where the visual tokens go.

        Args:
            input_ids: (batch, tokens), or None where only embeddings are known.
            inputs_embeds: (batch, tokens, text width).
            image_features: (images, K, text width), or None where the batch has no image.

        Returns:
            (batch, tokens) boolean, as many true as there are visual tokens.

        Raises:
            EmmaError: the placeholders are not exactly the visual tokens.
        """
        if input_ids is not None:
            mask = input_ids == self.config.image_token_index
        else:
            index = torch.tensor(self.config.image_token_index, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(index)).all(-1)
        images = 0 if image_features is None else image_features.shape[0]
        length = self.config.image_seq_length
        expected = images * length
        if torch.compiler.is_compiling():
            torch._assert_async(mask.sum() == expected, "Image features and image tokens do not match")
            return mask
        per_row = mask.sum(-1).tolist()
        if sum(per_row) != expected or any(tokens % length for tokens in per_row):
            each = f"{sum(per_row) / images:g} for each image; " if images else ""
            raise EmmaError(
                f"Image features and image tokens do not match: {sum(per_row)} tokens ({each}by row: {per_row}), but "
                f"{expected} features ({images} images). An image stands for as many tokens as the model keeps visual "
                f"tokens of it, {length}. Pass one image for each `<image>` in the prompts, in their order; load the "
                f"processor with the model's `visual_tokens`: `EmmaProcessor.from_pretrained(..., visual_tokens="
                f"{length})`; do not cut a prompt inside an image: raise `max_length`, and leave out "
                "`prefill_chunk_size`."
            )
        return mask

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        instruction_input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        vision_features: torch.FloatTensor | None = None,
        image_features: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EmmaModelOutputWithPast:
        """Run the language model on a prompt whose placeholders become visual tokens.

        Args:
            input_ids: (batch, tokens); `image_seq_length` placeholders stand for each image.
            pixel_values: (images, 3, height, width), all images of the batch in the order of their placeholders.
            instruction_input_ids: (images, instruction_length), one row per image.
            attention_mask: (batch, cached + new tokens), 1 where a token counts.
            position_ids: (batch, tokens).
            inputs_embeds: (batch, tokens, text width), in place of `input_ids`.
            vision_features: (images, N, vision width) from `get_vision_features`, in place of `pixel_values`.
            image_features: (images, K, text width), the `pooler_output` of `get_image_features`, in place of
                `pixel_values`, `vision_features` and `instruction_input_ids`.
            **kwargs: keywords of the language model: the cache of an earlier call (`cache`, before Transformers 5.24
                `past_key_values`), `use_cache` and others. `output_hidden_states` and `output_attentions` also apply to
                the vision tower.

        Raises:
            EmmaError: both or neither of `input_ids` and `inputs_embeds`, or of the image inputs; numbers of images,
                instructions and placeholders that differ; tensors of a wrong shape or dtype.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise EmmaError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_outputs = self._resolve_image_features(
            pixel_values, instruction_input_ids, vision_features, image_features, **kwargs
        )
        inputs_embeds = self._insert_image_features(input_ids, inputs_embeds, image_outputs)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_dict=True,
            **kwargs,
        )
        return EmmaModelOutputWithPast(**language_model_fields(outputs), image_outputs=image_outputs)

    def _resolve_image_features(
        self,
        pixel_values: torch.Tensor | None,
        instruction_input_ids: torch.Tensor | None,
        vision_features: torch.Tensor | None,
        image_features: torch.Tensor | None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | None:
        """Z in an output's `pooler_output`, from whichever inputs are there; None where the batch has no image.

        Inputs of no rows, as collators make them for text alone, count as no image.
        """
        inputs = (pixel_values, instruction_input_ids, vision_features)
        has_images = any(value is not None and value.shape[0] > 0 for value in inputs)
        if image_features is None:
            if not has_images:
                return None
            return self.get_image_features(
                *inputs,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                return_dict=True,
            )
        if has_images:
            raise EmmaError(
                "`image_features` stand in place of `pixel_values`, `vision_features` and "
                "`instruction_input_ids`: pass them alone."
            )
        check_features(
            "image_features", image_features, self.config.image_seq_length, self.config.text_config.hidden_size
        )
        return BaseModelOutputWithPooling(pooler_output=image_features)

    def _insert_image_features(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        image_outputs: BaseModelOutputWithPooling | None,
    ) -> torch.Tensor:
        """Embeddings (batch, tokens, text width) whose placeholders are Z, which takes their device and dtype."""
        if image_outputs is not None:
            image_features = image_outputs.pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
            image_outputs.pooler_output = image_features
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            return inputs_embeds.masked_scatter(mask.unsqueeze(-1).to(inputs_embeds.device), image_features)
        if inputs_embeds.shape[1] == 1:
            # A decoding step is one token, never a placeholder: checking it would only stall the device.
            return inputs_embeds
        if input_ids is not None:
            self.get_placeholder_mask(input_ids, inputs_embeds, None)
        # Where only the vision path is trained, the loss of a batch without images would have no graph.
        no_graph = self.training and not any(p.requires_grad for p in self.language_model.parameters())
        if no_graph or requires_synced_forward(self):
            inputs_embeds = inputs_embeds + self._dummy_image_features(inputs_embeds).sum().to(inputs_embeds)
        return inputs_embeds

    def _dummy_image_features(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """No visual tokens, (0, K, text width), computed from a black image.

        Every weight takes part and none has an influence: other processes wait for this one wherever a weight is
        gathered or a gradient is averaged.
        """
        size = self.config.vision_config.image_size
        # Device and dtype are those of the embeddings: reading a weight's would gather it under ZeRO-3, where the other
        # processes do not.
        image = inputs_embeds.new_zeros(1, 3, size, size)
        instruction = torch.zeros(1, self.config.instruction_length, dtype=torch.long, device=inputs_embeds.device)
        return self.get_image_features(image, instruction, return_dict=True).pooler_output[:0]

    def _run_vision_tower(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        check_pixel_values(self.config, pixel_values)
        tower = self.vision_tower
        weight = unwrap_clip_model(tower).embeddings.patch_embedding.weight
        pixel_values = pixel_values.to(device=execution_device(weight, pixel_values), dtype=weight.dtype)
        with torch.set_grad_enabled(needs_grad(tower, pixel_values)):
            return tower(pixel_values, output_hidden_states=output_hidden_states, output_attentions=output_attentions)

    def _select_vision_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        keep_class = self.config.vision_feature_select_strategy == "full"
        return hidden_states if keep_class else hidden_states[:, 1:]


class EmmaForConditionalGeneration(EmmaPreTrainedModel, GenerationMixin):
    """EMMA with its language modelling head: answers questions about images."""

    _tp_plan = HEAD_TP_PLAN
    # Loss from hidden states, head and labels, without logits; `emma_hf.integrations.liger` sets it.
    linear_loss: Callable[..., torch.Tensor] | None = None

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__(config)
        self.model = EmmaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.generation_config = default_generation_config(config)
        # Language models name their embedding differently: `embed_tokens`, `wte`, `decoder.embed_tokens`.
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = tied_weights_keys(f"{name}.weight")
        self.post_init()

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Visual tokens V (images, N, vision width); see [`EmmaModel.get_vision_features`]."""
        return self.model.get_vision_features(pixel_values)

    def get_instruction_features(self, instruction_input_ids: torch.Tensor) -> torch.Tensor:
        """Instruction H (images, T, instruction width); see [`EmmaModel.get_instruction_features`]."""
        return self.model.get_instruction_features(instruction_input_ids)

    def encode_image(self, pixel_values: torch.Tensor) -> EmmaImageEncoding:
        """Images encoded once, for any number of questions; see [`EmmaModel.encode_image`]."""
        return self.model.encode_image(pixel_values)

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        instruction_input_ids: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Visual tokens Z (images, K, text width) in `.pooler_output`; see [`EmmaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, instruction_input_ids, vision_features, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        instruction_input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        vision_features: torch.FloatTensor | None = None,
        image_features: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EmmaCausalLMOutputWithPast:
        """As [`EmmaModel.forward`], with logits, and a loss where there are labels.

        Args:
            labels: (batch, tokens), -100 where a token carries no loss; shifted here.
            logits_to_keep: compute the logits of this many last tokens only (0: of all), or of these positions.
            skip_logits: where Liger's fused loss was applied, the loss alone. Default: in training.

        Example:

        >>> from PIL import Image
        >>> from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor
        >>> processor = EmmaProcessor.from_pretrained(EMMA_TINY)
        >>> model = EmmaForConditionalGeneration.from_pretrained(EMMA_TINY)
        >>> prompt = "USER: <image>\\nDescribe the picture. ASSISTANT:"
        >>> inputs = processor(images=Image.new("RGB", (64, 64), "red"), text=prompt, return_tensors="pt")
        >>> outputs = model(**inputs)
        >>> outputs.logits.shape[1:] == (inputs["input_ids"].shape[1], model.config.text_config.vocab_size)
        True
        >>> outputs.image_hidden_states.shape[:2] == (1, model.config.image_seq_length)
        True
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            instruction_input_ids=instruction_input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            vision_features=vision_features,
            image_features=image_features,
            return_dict=True,
            **kwargs,
        )
        logits = loss = None
        if self.linear_loss and labels is not None and (self.training if skip_logits is None else skip_logits):
            loss = self.linear_loss(outputs.last_hidden_state, self.lm_head, labels, **kwargs)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if loss is None and labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        others = language_model_fields(outputs)
        del others["last_hidden_state"]
        return EmmaCausalLMOutputWithPast(loss=loss, logits=logits, **others, image_outputs=outputs.image_outputs)

    # `generate` reads from its signature which inputs it may pass; those of the running version are all right.
    @wraps(GenerationMixin.prepare_inputs_for_generation, assigned=())
    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Inputs of one generation step. An image goes in exactly where the step's tokens hold its placeholders."""
        if kwargs.get("labels") is not None:
            raise EmmaError(
                "`generate` continues a prompt, and one with `labels` holds its answer already: pass the prompt alone. "
                "To generate in an evaluation, use `emma_hf.training.EmmaTrainer`, as docs/training.md says."
            )
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
        images = {name: value for name, value in images.items() if value is not None}
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if images:
            step_ids = model_inputs.get("input_ids")
            cache = model_inputs.get(CACHE_NAME)
            # Before anything is cached all images belong to this step; `forward` refuses those without placeholders.
            # One token of several never comes first; asking the cache then would stall the device at every step.
            is_decoding = step_ids is not None and (
                step_ids.shape[1] == 1 < input_ids.shape[1] or (cache is not None and cache.get_seq_length() > 0)
            )
            model_inputs.update(self._images_of_step(images, input_ids, step_ids, cache) if is_decoding else images)
        return model_inputs

    def _images_of_step(
        self, images: dict[str, torch.Tensor], input_ids: torch.Tensor, step_ids: torch.Tensor, cache: Any
    ) -> dict[str, torch.Tensor]:
        """The images whose placeholders this step holds; those before it are in the cache already."""
        length = self.config.image_seq_length
        if step_ids.shape[1] == 1 and length > 1:
            return {}
        in_step = ((step_ids == self.config.image_token_index).sum(-1) // length).tolist()
        in_all = ((input_ids == self.config.image_token_index).sum(-1) // length).tolist()
        if not any(in_step) and cache is not None and cache.get_seq_length() >= input_ids.shape[1]:
            # The prompt was embeddings: its images are in the cache, and its placeholders are not in `input_ids`.
            return {}
        given = next(iter(images.values())).shape[0]
        if in_step == in_all or given != sum(in_all):
            # Also where a caller who keeps the cache passes the new turn's images alone. More images than placeholders
            # are refused by `forward`.
            return images if sum(in_step) or given > sum(in_all) else {}
        chosen: list[int] = []
        end = 0
        for new, every in zip(in_step, in_all):
            end += every
            chosen.extend(range(end - new, end))
        return {name: value[chosen] for name, value in images.items()} if chosen else {}

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor | None, dict[str, Any]]:
        """Repeat each row for its beams or samples. Images are encoded first, once, and repeated row by row."""
        images = {name: model_kwargs.pop(name) for name in IMAGE_INPUTS if model_kwargs.get(name) is not None}
        if expand_size > 1 and any(value.shape[0] for value in images.values()):
            if "image_features" not in images:
                images = {"image_features": self.get_image_features(**images, return_dict=True).pooler_output}
            groups = self._images_per_row(input_ids, model_kwargs.get("inputs_embeds"), images["image_features"])
            rows = torch.split(images["image_features"], groups)
            images["image_features"] = torch.cat([row for row in rows for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **images}

    def _images_per_row(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, image_features: torch.Tensor
    ) -> list[int]:
        if inputs_embeds is not None:
            input_ids = None
        else:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        mask = self.model.get_placeholder_mask(input_ids, inputs_embeds, image_features)
        return (mask.sum(-1) // self.config.image_seq_length).tolist()


def language_model_fields(outputs: ModelOutput) -> dict[str, Any]:
    """The last hidden state, cache, hidden states and attentions in `outputs`, as the running version calls them."""
    return {name: outputs[name] for name in _LANGUAGE_MODEL_FIELDS if name in outputs}


def default_generation_config(config: EmmaConfig) -> GenerationConfig:
    """Generation config of a model whose checkpoint brings none: the special tokens, and no generated placeholder."""
    generation_config = GenerationConfig.from_model_config(config)
    if generation_config.pad_token_id is None:
        end = generation_config.eos_token_id
        generation_config.pad_token_id = end[0] if isinstance(end, list) else end
    suppress_image_token(generation_config, config)
    return generation_config


def suppress_image_token(generation_config: GenerationConfig, config: EmmaConfig) -> None:
    """Add the placeholder to `suppress_tokens`: prompt lookup, or an undecided model, would otherwise generate it."""
    generation_config.suppress_tokens = sorted({*(generation_config.suppress_tokens or []), config.image_token_index})


def execution_device(weight: torch.Tensor, inputs: torch.Tensor) -> torch.device:
    """Device on which the module of `weight` runs."""
    # An offloaded weight lies on the meta device until its module runs; accelerate then moves the inputs itself.
    return inputs.device if weight.is_meta else weight.device


def needs_grad(tower: nn.Module, inputs: torch.Tensor | None = None) -> bool:
    """Whether an autograd graph is recorded in `tower`: not for frozen towers, which then keep no activations."""
    if not torch.is_grad_enabled():
        return False
    return any(p.requires_grad for p in tower.parameters()) or (inputs is not None and inputs.requires_grad)


def requires_synced_forward(model: nn.Module) -> bool:
    """Whether other processes wait in this forward pass for each weight of `model`.

    In training they average gradients (DDP). Where the weights themselves are sharded (FSDP, ZeRO-3) they gather each
    of them, outside training too.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return False
    return model.training or any(map(is_sharded, model.parameters()))


def is_sharded(weight: torch.Tensor) -> bool:
    """Whether a process holds only its part of a weight."""
    # The shards of FSDP2 are DTensors, recognized without importing their module; those of ZeRO-3 have an id.
    return hasattr(weight, "device_mesh") or hasattr(weight, "ds_id")


def unique_rows(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The unique rows of `ids` (rows, tokens), and for each row the index of its unique row, (rows,).

    Where no row repeats, or the values cannot be read (compiled, on the meta device), `ids` and None.
    """
    if torch.compiler.is_compiling() or ids.is_meta or ids.shape[0] < 2:
        return ids, None
    unique, indices = torch.unique(ids, dim=0, return_inverse=True)
    return (unique, indices) if len(unique) < len(ids) else (ids, None)


# Checks of what the models are given.


def check_image_inputs(
    config: EmmaConfig,
    pixel_values: torch.Tensor | None,
    instruction_input_ids: torch.Tensor | None,
    vision_features: torch.Tensor | None,
) -> None:
    """Raise `EmmaError` where inputs are missing, or exclude each other."""
    if (pixel_values is None) == (vision_features is None):
        raise EmmaError(
            "Pass exactly one of `pixel_values` and `vision_features`: got "
            f"{'neither' if pixel_values is None else 'both'}."
        )
    if instruction_input_ids is None:
        raise EmmaError(
            "EMMA reads the instruction into the visual tokens: pass `instruction_input_ids` (images, "
            f"{config.instruction_length}) with the images, as the processor returns them."
        )


def check_one_instruction_per_image(vision_features: torch.Tensor, instruction_input_ids: torch.Tensor) -> None:
    """Raise `EmmaError` where V (images, N, vision width) and the instruction ids (images, length) differ in rows."""
    if vision_features.shape[0] != instruction_input_ids.shape[0]:
        raise EmmaError(
            f"Each image has one row of instruction tokens: got {vision_features.shape[0]} images and "
            f"{instruction_input_ids.shape[0]} rows of `instruction_input_ids`."
        )


def check_pixel_values(config: EmmaConfig, pixel_values: torch.Tensor) -> None:
    """Raise `EmmaError` where `pixel_values` are not floating point (images, 3, height, width) of the tower's size."""
    size = config.vision_config.image_size
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
        raise EmmaError(
            f"`pixel_values` must be (images, 3, {size}, {size}): got {tuple(pixel_values.shape)}. "
            "Prepare the images with the processor."
        )
    if not pixel_values.is_floating_point():
        raise EmmaError(
            f"`pixel_values` must be floating point, normalised by the processor: got {pixel_values.dtype}."
        )


def check_features(name: str, features: torch.Tensor, tokens: int, width: int) -> None:
    """Raise `EmmaError` where `features` are not floating point (images, tokens, width)."""
    if features.ndim != 3 or tuple(features.shape[1:]) != (tokens, width) or not features.is_floating_point():
        raise EmmaError(
            f"`{name}` must be floating point (images, {tokens}, {width}): got {features.dtype} "
            f"{tuple(features.shape)}."
        )


def check_instruction_ids(config: EmmaConfig, ids: torch.Tensor) -> None:
    """Raise `EmmaError` where `ids` are not (images, instruction_length) ids of the instruction encoder."""
    length, vocab_size = config.instruction_length, config.instruction_config.vocab_size
    if ids.ndim != 2 or ids.shape[1] != length or ids.is_floating_point() or ids.dtype == torch.bool:
        raise EmmaError(
            f"`instruction_input_ids` must be integers (images, {length}): got {ids.dtype} {tuple(ids.shape)}. "
            "The processor pads and cuts every instruction to that length."
        )
    if not torch.compiler.is_compiling() and ids.numel() and not ids.is_meta:
        low, high = (int(value) for value in ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise EmmaError(
                f"`instruction_input_ids` must lie in the instruction encoder's vocabulary, 0 to {vocab_size - 1}: "
                f"got ids from {low} to {high}. Use the instruction tokenizer that belongs to this model."
            )


# With label smoothing `Trainer` computes the loss itself, of the next token only for classes in this table.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(EmmaConfig.model_type, EmmaForConditionalGeneration.__name__)

__all__ = ["EmmaForConditionalGeneration", "EmmaModel", "EmmaPreTrainedModel"]
