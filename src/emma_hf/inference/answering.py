"""Answers to a batch of conversations."""

from collections.abc import Sequence
from typing import Any

from ..model.instruction_emma import instructions_from_messages
from ..model.modeling_emma import EmmaForConditionalGeneration
from ..model.processing_emma import EmmaProcessor


def answer(
    model: EmmaForConditionalGeneration,
    processor: EmmaProcessor,
    conversations: Sequence[list[dict[str, Any]]],
    images: Sequence[Sequence[Any]],
    **generate: Any,
) -> list[str]:
    """Answer conversations together, greedily unless `generate` says otherwise.

    Args:
        model: as `load_model` returns it.
        processor: its processor.
        conversations: a list of messages each, ending with the user's.
        images: the images of each conversation (anything that the processor takes), one for each `{"type": "image"}`
            of its messages.
        **generate: keyword arguments of `generate`, such as `max_new_tokens`.

    Returns:
        The text of each answer, without white space around it.

    Raises:
        EmmaError: messages, or images beside them, that the processor refuses.
    """
    token, turn = processor.image_token, processor.instruction_turn
    inputs = processor(
        images=[list(row) for row in images] if any(images) else None,
        text=processor.apply_chat_template(conversations, add_generation_prompt=True),
        instructions=[instructions_from_messages(messages, token, turn) for messages in conversations],
        padding=True,
        # So that each answer follows its prompt.
        padding_side="left",
        return_tensors="pt",
    ).to(model.device, model.dtype)
    if "stop_strings" in generate:
        generate.setdefault("tokenizer", processor.tokenizer)
    tokens = model.generate(**inputs, **{"do_sample": False, **generate})
    texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]
