"""emma-tiny while it is trained: nothing is computed twice, and nothing that no loss depends on."""

import math
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutput

from ..data.conversations import IGNORE_INDEX
from ..model.compat_emma import CACHE_NAME
from ..model.errors_emma import EmmaError
from ..model.modeling_emma import EmmaForConditionalGeneration


class TinyLearner(EmmaForConditionalGeneration):
    """EMMA for batches of [`~emma_hf.tiny.rows.TinyEmmaCollator`].

    What all prompts begin with, up to the image, is computed for one row and stands for all: as it sees nothing of
    what follows, it is the same in each. Logits are computed of the tokens alone that are learned. Loss and gradients
    are those of [`EmmaForConditionalGeneration`] but for the excluded tokens.
    """

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        excluded_tokens: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        **images: Any,
    ) -> CausalLMOutput:
        """Loss and logits of the labels.

        Args:
            input_ids: (rows, tokens), with the same tokens in front of the image in every row.
            attention_mask: (rows, tokens), 1 where a token counts.
            labels: (rows, tokens), -100 where a token carries no loss; shifted here.
            excluded_tokens: (rows, tokens), at each label the token that takes no part in the softmax, or -1.
            num_items_in_batch: divisor of the sum of losses. Default: the number of labels.
            **images: `vision_features` and `instruction_input_ids` of the rows' images, one each.

        Returns:
            `loss`, and `logits` (labels, vocabulary) in the order of the rows and their tokens.

        Raises:
            EmmaError: rows whose beginnings differ.
        """
        start = int((input_ids[0] == self.config.image_token_index).long().argmax())
        if not bool((input_ids[:, : start + 1] == input_ids[0, : start + 1]).all()):
            raise EmmaError("All rows of a batch must have the same tokens in front of their image: got others.")
        beginning = self.model.language_model(input_ids=input_ids[:1, :start], use_cache=True)
        cache = beginning[CACHE_NAME]
        cache.batch_repeat_interleave(len(input_ids))
        hidden_states = self.model(
            input_ids=input_ids[:, start:], attention_mask=attention_mask, **{CACHE_NAME: cache}, **images
        ).last_hidden_state
        targets = labels[:, start + 1 :]
        learned = targets != IGNORE_INDEX
        logits = self.lm_head(hidden_states[:, :-1][learned])
        loss = cross_entropy_excluding(logits, targets[learned], excluded_tokens[:, start + 1 :][learned])
        return CausalLMOutput(
            loss=loss / (learned.sum() if num_items_in_batch is None else num_items_in_batch), logits=logits
        )


def cross_entropy_excluding(logits: torch.Tensor, targets: torch.Tensor, excluded: torch.Tensor) -> torch.Tensor:
    """The sum of cross-entropies, with one token excluded from the softmax where that is asked for.

    Args:
        logits: (tokens, vocabulary).
        targets: the right tokens, int64 (tokens,).
        excluded: the excluded token of each or a negative number, int64 (tokens,).
    """
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    kept = logits.float().masked_fill(excluded[:, None] == vocabulary, -math.inf)
    return torch.nn.functional.cross_entropy(kept, targets, reduction="sum")


__all__ = ["TinyLearner", "cross_entropy_excluding"]
