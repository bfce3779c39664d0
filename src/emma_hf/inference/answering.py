"""Answers to a batch of conversations."""

from collections.abc import Sequence
from typing import Any

import torch

from ..model.instruction_emma import encode_instruction, instructions_from_messages
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
    instructions = [instructions_from_messages(messages, token, turn) for messages in conversations]
    inputs = _inputs(model, processor, conversations, images, instructions)
    return _generate(model, processor, inputs, generate)


@torch.no_grad()
def answer_by_instruction(
    model: EmmaForConditionalGeneration,
    processor: EmmaProcessor,
    conversations: Sequence[list[dict[str, Any]]],
    images: Sequence[Sequence[Any]],
    columns: Sequence[Sequence[str]],
    **generate: Any,
) -> list[list[str]]:
    """Answer the same conversations once for each column of instructions; the prompts stay.

    Visual tokens V do not depend on the instruction: they are computed once for all columns, and once for an image
    that stands in several conversations.

    Args:
        model: as `load_model` returns it.
        processor: its processor.
        conversations: as in [`answer`].
        images: as in [`answer`]; the same object is the same image.
        columns: of each column one instruction per conversation, for all of its images.
        **generate: keyword arguments of `generate`.

    Returns:
        For each column the text of each answer, without white space around it.

    Raises:
        EmmaError: see [`answer`].
    """
    per_column = [[[text] * len(row) for text, row in zip(column, images)] for column in columns]
    inputs = _inputs(model, processor, conversations, images, per_column[0])
    if "pixel_values" in inputs:
        first: dict[int, int] = {}
        sources = [first.setdefault(id(image), index) for index, image in enumerate(i for row in images for i in row)]
        unique = sorted(set(sources))
        features = model.get_vision_features(inputs.pop("pixel_values")[unique])
        inputs["vision_features"] = features[[unique.index(source) for source in sources]]
    answers = []
    for texts in per_column:
        if "vision_features" in inputs:
            ids = [
                encode_instruction(processor.instruction_tokenizer, text, processor.instruction_length)
                for row in texts
                for text in row
            ]
            inputs["instruction_input_ids"] = torch.tensor(ids, device=model.device)
        answers.append(_generate(model, processor, inputs, generate))
    return answers


def user_messages(prompt: str, images: int, image_token: str) -> list[dict[str, Any]]:
    """The conversation of one prompt: its images stand where it holds their placeholders, or else before it."""
    if images and prompt.count(image_token) == images:
        # Content that is one string is a bare prompt.
        return [{"role": "user", "content": prompt}]
    return [
        {"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]}
    ]


def _inputs(
    model: EmmaForConditionalGeneration,
    processor: EmmaProcessor,
    conversations: Sequence[list[dict[str, Any]]],
    images: Sequence[Sequence[Any]],
    instructions: list[list[str]],
) -> Any:
    return processor(
        images=[list(row) for row in images] if any(images) else None,
        text=processor.apply_chat_template(conversations, add_generation_prompt=True),
        instructions=instructions,
        padding=True,
        # So that each answer follows its prompt.
        padding_side="left",
        return_tensors="pt",
    ).to(model.device, model.dtype)


def _generate(
    model: EmmaForConditionalGeneration, processor: EmmaProcessor, inputs: Any, generate: dict[str, Any]
) -> list[str]:
    if "stop_strings" in generate:
        generate = {"tokenizer": processor.tokenizer, **generate}
    tokens = model.generate(**inputs, **{"do_sample": False, **generate})
    texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]
