"""CLIP's two towers, each of which stops at the layer that EMMA reads."""

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .compat_emma import clip_causal_mask, clip_layer, register_tower_names, unwrap_clip_model


class EmmaVisionTower(CLIPVisionModel):
    """CLIP's vision tower. The layers behind the selected one run only where all hidden states are asked for.

    Args:
        config: config of the tower.
        feature_layer: index into its hidden states, which are the embeddings and the output of each layer.
    """

    def __init__(self, config: CLIPVisionConfig, feature_layer: int = -2) -> None:
        super().__init__(config)
        self.feature_layer = feature_layer % (config.num_hidden_layers + 1)

    @classmethod
    def is_custom_code(cls) -> bool:
        """CLIP's own weight names and initialization apply, which Transformers 5 keeps from other people's code."""
        return False

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: (images, 3, height, width), floating point.
            output_hidden_states: run every layer, and also return their outputs.
            output_attentions: run every layer, and also return their attentions.

        Returns:
            An output whose `last_hidden_state` is that of the selected layer, (images, 1 + patches, width). What was
            not asked for is None, and so is `pooler_output` unless every layer ran.
        """
        if output_hidden_states or output_attentions:
            outputs = super().forward(
                pixel_values, output_hidden_states=True, output_attentions=output_attentions, return_dict=True
            )
            return _at_layer(outputs, self.feature_layer, output_hidden_states)
        core = unwrap_clip_model(self)
        hidden_states = core.pre_layrnorm(core.embeddings(pixel_values))
        for layer in core.encoder.layers[: self.feature_layer]:
            hidden_states = clip_layer(layer, hidden_states, mask=None, causal=False)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states)


class EmmaInstructionEncoder(CLIPTextModel):
    """CLIP's text encoder, under a causal mask alone: padding is read like any other token, as the authors do.

    Args:
        config: config of the encoder.
        feature_layer: index into its hidden states, which are the embeddings and the output of each layer.
    """

    def __init__(self, config: CLIPTextConfig, feature_layer: int = -2) -> None:
        super().__init__(config)
        self.feature_layer = feature_layer % (config.num_hidden_layers + 1)

    @classmethod
    def is_custom_code(cls) -> bool:
        """CLIP's own weight names and initialization apply, which Transformers 5 keeps from other people's code."""
        return False

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encode instructions.

        Args:
            input_ids: (instructions, tokens), integers.
            output_hidden_states: run every layer, and also return their outputs.
            output_attentions: run every layer, and also return their attentions.

        Returns:
            An output whose `last_hidden_state` is that of the selected layer, (instructions, tokens, width), without
            the final norm. What was not asked for is None, and so is `pooler_output` unless every layer ran.
        """
        if output_hidden_states or output_attentions:
            outputs = super().forward(
                input_ids, output_hidden_states=True, output_attentions=output_attentions, return_dict=True
            )
            return _at_layer(outputs, self.feature_layer, output_hidden_states)
        core = unwrap_clip_model(self)
        hidden_states = core.embeddings(input_ids=input_ids)
        mask = clip_causal_mask(self.config, hidden_states)
        for layer in core.encoder.layers[: self.feature_layer]:
            hidden_states = clip_layer(layer, hidden_states, mask=mask, causal=True)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states)


def _at_layer(
    outputs: BaseModelOutputWithPooling, layer: int, output_hidden_states: bool | None
) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(
        last_hidden_state=outputs.hidden_states[layer],
        pooler_output=outputs.pooler_output,
        hidden_states=outputs.hidden_states if output_hidden_states else None,
        attentions=outputs.attentions,
    )


register_tower_names(EmmaVisionTower="vision_model", EmmaInstructionEncoder="text_model")

__all__ = ["EmmaInstructionEncoder", "EmmaVisionTower"]
