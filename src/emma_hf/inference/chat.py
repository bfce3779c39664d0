"""A conversation about images that keeps its cache from turn to turn."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from ..model.compat_emma import CACHE_NAME
from ..model.errors_emma import EmmaError
from ..model.image_encoding_emma import EmmaImageEncoding
from ..model.instruction_emma import instructions_from_messages
from ..model.modeling_emma import EmmaForConditionalGeneration
from ..model.processing_emma import EmmaProcessor


class Chat:
    """A conversation about images. Each turn computes only what its predecessors did not.

    Args:
        model: as `load_model` returns it.
        processor: its processor.
        images: images that the first question is about; anything that the processor takes.
        instruction: text that guides the visual tokens. Default: the first question.

    Raises:
        EmmaError: one image instead of a list.
    """

    def __init__(
        self,
        model: EmmaForConditionalGeneration,
        processor: EmmaProcessor,
        images: Sequence[Any],
        instruction: str | None = None,
    ) -> None:
        if isinstance(images, (str, bytes)):
            raise EmmaError(f"`images` must be a list of images: got {type(images).__name__}. Put it into a list.")
        self.model, self.processor = model, processor
        self.images, self.instruction = list(images), instruction
        self.image_encoding: EmmaImageEncoding | None = None
        self.start_over()

    def start_over(self) -> None:
        """Forget the conversation, and keep the images."""
        self.cache = None
        self.cached_ids: list[int] = []
        self.cached_instructions: list[str] = []
        self.messages: list[dict[str, Any]] = []

    def encode_images(self) -> None:
        """Encode the images once, for all conversations that follow."""
        pixels = self.processor.image_processor.encode_each(self.images)
        self.image_encoding = self.model.encode_image(pixels.to(self.model.device, self.model.dtype))

    def answer(self, question: str, **generate: Any) -> str:
        """Answer one question, and remember both.

        Args:
            question: the user's next turn.
            **generate: keyword arguments of `generate`, such as `max_new_tokens` and `streamer`.

        Returns:
            The answer, without white space around it.

        Raises:
            EmmaError: a question without text, or a conversation that leaves no position for an answer.
        """
        if not question.strip():
            raise EmmaError(f"A question must have words: got {question!r}.")
        images = [] if self.messages else [{"type": "image"}] * len(self.images)
        user = {"role": "user", "content": [*images, {"type": "text", "text": question}]}
        messages = [*self.messages, user]
        instructions = self._instructions(messages)
        inputs = self._inputs(messages, instructions)
        ids = inputs["input_ids"][0].tolist()
        if len(ids) >= self.model.config.position_count:
            raise EmmaError(
                f"A conversation must leave room for an answer in the model's {self.model.config.position_count} "
                f"positions: got {len(ids)} tokens. Shorten the question, or start over."
            )
        # `generate` lets the cache grow: of an answer that breaks off nothing must be kept.
        cache, self.cache = self.cache, None
        if instructions != self.cached_instructions:
            # Another instruction makes other visual tokens, from the first image on.
            cache = None
        if cache is not None:
            # The template can render an answer otherwise than it was generated: the common beginning is kept.
            common = takewhile(lambda pair: pair[0] == pair[1], zip(self.cached_ids, ids[:-1]))
            surplus = len(self.cached_ids) - len(list(common))
            if surplus:
                cache.crop(-surplus)
        outputs = self.model.generate(
            **inputs, **{"do_sample": False, CACHE_NAME: cache, **generate}, return_dict_in_generate=True
        )
        sequence = outputs.sequences[0].tolist()
        self.cache, self.cached_ids = outputs[CACHE_NAME], sequence[:-1]
        self.cached_instructions = instructions
        text = self.processor.tokenizer.decode(sequence[len(ids) :], skip_special_tokens=True).strip()
        self.messages += [user, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        return text

    def _instructions(self, messages: list[dict[str, Any]]) -> list[str]:
        if self.instruction is not None:
            return [self.instruction] * len(self.images)
        return instructions_from_messages(messages, self.processor.image_token, self.processor.instruction_turn)

    def _inputs(self, messages: list[dict[str, Any]], instructions: list[str]) -> Any:
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = self.processor(images=self.images, text=prompt, instructions=instructions, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        if self.image_encoding is not None:
            del inputs["pixel_values"]
            inputs["image_features"] = self.image_encoding.image_features(inputs.pop("instruction_input_ids"))
        return inputs
