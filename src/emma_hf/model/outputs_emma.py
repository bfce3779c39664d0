"""What the models return: the fields of Transformers' own outputs, under the names of its running version, and one."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
)

_LANGUAGE_MODEL_FIELDS = tuple(field.name for field in fields(BaseModelOutputWithPast))


def language_model_fields(outputs: ModelOutput) -> dict[str, Any]:
    """The last hidden state, cache, hidden states and attentions in `outputs`, as the running version calls them."""
    return {name: outputs[name] for name in _LANGUAGE_MODEL_FIELDS if name in outputs}


@dataclass
class EmmaModelOutputWithPast(BaseModelOutputWithPast):
    """Output of [`EmmaModel`].

    Args:
        last_hidden_state: (batch, tokens, text width), after the language model's final norm.
        image_outputs: output of [`EmmaModel.get_image_features`]; its `pooler_output`, (images, visual tokens, text
            width), replaced the placeholders. None where the batch has no image.
        **others: cache (`cache`, before Transformers 5.24 `past_key_values`), `hidden_states` and `attentions` of the
            language model, where they are asked for.
    """

    image_outputs: BaseModelOutputWithPooling | None = None

    @property
    def image_hidden_states(self) -> torch.FloatTensor | None:
        """(images, visual tokens, text width), what replaced the placeholders."""
        return None if self.image_outputs is None else self.image_outputs.pooler_output


@dataclass
class EmmaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of [`EmmaForConditionalGeneration`].

    Args:
        loss: scalar, where `labels` are given.
        logits: (batch, tokens or `logits_to_keep`, vocabulary).
        image_outputs: see [`EmmaModelOutputWithPast`].
        **others: see [`EmmaModelOutputWithPast`].
    """

    image_outputs: BaseModelOutputWithPooling | None = None

    @property
    def image_hidden_states(self) -> torch.FloatTensor | None:
        """(images, visual tokens, text width), what replaced the placeholders."""
        return None if self.image_outputs is None else self.image_outputs.pooler_output


__all__ = ["EmmaCausalLMOutputWithPast", "EmmaModelOutputWithPast", "language_model_fields"]
