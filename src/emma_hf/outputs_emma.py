"""What the models return."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput


@dataclass
class EmmaModelOutputWithPast(ModelOutput):
    """Output of [`EmmaModel`].

    Args:
        last_hidden_state: (batch, tokens, text width), after the language model's final norm.
        past_key_values: the language model's cache, where `use_cache` is on.
        hidden_states: one (batch, tokens, text width) per layer and the embeddings, where asked for.
        attentions: one (batch, heads, tokens, tokens) per layer, where asked for.
        image_hidden_states: (images, visual tokens, text width), what replaced the placeholders.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class EmmaCausalLMOutputWithPast(ModelOutput):
    """Output of [`EmmaForConditionalGeneration`].

    Args:
        loss: scalar, where `labels` are given.
        logits: (batch, tokens or `logits_to_keep`, vocabulary).
        past_key_values: the language model's cache, where `use_cache` is on.
        hidden_states: one (batch, tokens, text width) per layer and the embeddings, where asked for.
        attentions: one (batch, heads, tokens, tokens) per layer, where asked for.
        image_hidden_states: (images, visual tokens, text width), what replaced the placeholders.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None


__all__ = ["EmmaCausalLMOutputWithPast", "EmmaModelOutputWithPast"]
