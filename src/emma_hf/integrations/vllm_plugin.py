"""vLLM's plug-in: EMMA in `vllm serve` and `vllm.LLM`, with each picture's instruction read from its prompt.

vLLM shows a processor the pictures without their prompt, and keeps what comes out under a key made of the picture and
`mm_processor_kwargs`. The visual tokens of EMMA depend on the question, so the instruction has to be one of these.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from ..model.errors_emma import EmmaError, MissingPackageError
from ..model.instruction_emma import instructions_from_prompt


def register() -> None:
    """Tell vLLM of the model. Runs in each of its processes, by the entry point `vllm.general_plugins`.

    Raises:
        MissingPackageError: vLLM cannot be imported.
    """
    try:
        from vllm import ModelRegistry
    except ImportError as error:
        raise MissingPackageError(
            f"`emma_hf.integrations.vllm_plugin` is for vLLM, which cannot be imported here: {error}. Install vLLM as "
            "its documentation says for your device."
        ) from error
    # By name: the class may only be imported where the engine has chosen its device.
    ModelRegistry.register_model("EmmaForConditionalGeneration", "emma_hf.integrations.vllm_model:EmmaForVllm")


def with_instructions(kwargs: Mapping[str, Any], prompt: Sequence[int], images: int, processor: Any) -> dict[str, Any]:
    """`mm_processor_kwargs` of one prompt with the instruction of each picture in it.

    Args:
        kwargs: what the user gave. Instructions among them win.
        prompt: ids of the rendered prompt, each picture one placeholder or already expanded.
        images: number of pictures.
        processor: an [`EmmaProcessor`].

    Returns:
        `kwargs` with `instructions`, one text for each picture; unchanged where there is none.

    Raises:
        EmmaError: as many instructions as there are not pictures.
    """
    if not images:
        return dict(kwargs)
    given = kwargs.get("instructions")
    if isinstance(given, str):
        return {**kwargs, "instructions": [given] * images}
    if given is None:
        given = instructions_from_prompt(
            _text(prompt, images, processor),
            processor.image_token,
            processor.instruction_turn,
            processor.tokenizer.eos_token,
        )
    if len(given) != images or not all(isinstance(text, str) for text in given):
        raise EmmaError(
            f"`instructions` must be a text, or a list with one for each of {images} pictures: got {given!r}."
        )
    return {**kwargs, "instructions": list(given)}


def only_missing(kwargs: Mapping[str, Any], is_cached: Sequence[bool]) -> dict[str, Any]:
    """`kwargs` for the pictures that no cache holds, of those that `is_cached` tells of in their order."""
    instructions = [text for text, cached in zip(kwargs["instructions"], is_cached) if not cached]
    return {**kwargs, "instructions": instructions}


def _text(prompt: Sequence[int], images: int, processor: Any) -> str:
    """The prompt in words, with one placeholder for each picture and without what begins the sequence."""
    token, length, tokenizer = processor.image_token_id, processor.image_seq_length, processor.tokenizer
    # An expanded picture keeps the first of its placeholders.
    step = length if images and list(prompt).count(token) == images * length else 1
    seen = accumulate(int(word == token) for word in prompt)
    words = [word for word, count in zip(prompt, seen) if word != token or (count - 1) % step == 0]
    if words and words[0] == tokenizer.bos_token_id:
        del words[0]
    return tokenizer.decode(words, skip_special_tokens=False, clean_up_tokenization_spaces=False)
