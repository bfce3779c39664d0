"""TRL's GRPO and RLOO on rows with images.

Both give the model a fixed list of what a processor returns, in which `instruction_input_ids` are missing (TRL 1.16).
The model can do without them: a prompt's ids hold the words that its instructions are made of.
"""

from copy import copy
from typing import Any

import torch
from torch import nn

from ..model.instruction_emma import encode_instruction, escape_placeholders, instructions_from_prompt
from ..model.modeling_emma import EmmaModel
from ..model.processing_emma import EmmaProcessor


def read_instructions_from_prompts(trainer: Any) -> None:
    """Let the model of a `GRPOTrainer` or `RLOOTrainer`, and its reference model, find each image's instruction itself.

    Call it before `trainer.train()`. Where images come without instructions, these are read from the prompt's ids by
    the rule of the processor for a rendered prompt. The trainer's processor no longer returns `instruction_input_ids`.

    Args:
        trainer: its `processing_class` must be an [`EmmaProcessor`].
    """
    processor = trainer.processing_class
    for model in (trainer.model, trainer.ref_model):
        for module in () if model is None else model.modules():
            if isinstance(module, EmmaModel):
                _add_instructions(module, processor)
    trainer.processing_class = copy(processor)
    trainer.processing_class.__class__ = _PromptProcessor


class _PromptProcessor(EmmaProcessor):
    """The processor without the output that the trainers do not know."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = super().__call__(*args, **kwargs)
        batch.pop("instruction_input_ids", None)
        return batch


# It is saved as what it stands for.
_PromptProcessor.__name__ = EmmaProcessor.__name__


def _add_instructions(model: nn.Module, processor: EmmaProcessor) -> None:
    def add(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("pixel_values") is None or kwargs.get("instruction_input_ids") is not None:
            return args, kwargs
        ids = instruction_ids_of_prompts(processor, kwargs["input_ids"], kwargs.get("attention_mask"))
        return args, {**kwargs, "instruction_input_ids": ids}

    model.register_forward_pre_hook(add, with_kwargs=True)


def instruction_ids_of_prompts(
    processor: EmmaProcessor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Instruction ids (images, instruction_length) of the images in prompts, from ids and mask (batch, tokens)."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    token, end = processor.image_token, processor.tokenizer.eos_token
    rows = []
    for ids in (row[kept].tolist() for row, kept in zip(input_ids, mask.bool())):
        prompt, start = "", 0
        while processor.image_token_id in ids[start:]:
            image = ids.index(processor.image_token_id, start)
            prompt += _words(processor, ids[start:image]) + token
            start = image + processor.image_seq_length
        prompt += _words(processor, ids[start:])
        prompt = prompt.removeprefix(processor.tokenizer.bos_token or "")
        rows += [
            encode_instruction(processor.instruction_tokenizer, text, processor.instruction_length)
            for text in instructions_from_prompt(prompt, token, processor.instruction_turn, end)
        ]
    return torch.tensor(rows, device=input_ids.device)


def _words(processor: EmmaProcessor, ids: list[int]) -> str:
    text = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    # The placeholder spelled out, which was tokenized as words.
    return escape_placeholders(text, processor.image_token)
