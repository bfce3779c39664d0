"""Processor of EMMA: images, the prompt, and for each image the instruction that goes with it."""

import json
import os
import re
import sys
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .batches_emma import as_batch, padded
from .chat_template_emma import CHAT_TEMPLATE, refuse_unread
from .code_files_emma import AUTO_MAP, copy_code_files
from .compat_emma import (
    TRANSFORMERS_5,
    chat_template_kwargs,
    make_tokenizer_config_portable,
    only_primary_attributes,
    pass_keywords_in_pipelines,
    push_saved,
    silence_padding_advice,
    warn_of_too_long_prompt,
)
from .errors_emma import EmmaError
from .image_processing_emma import EmmaImageProcessor, is_nested, rows_of_images
from .instruction_emma import (
    PLACEHOLDER_ESCAPE,
    check_instruction_tokenizer,
    check_text,
    encode_instruction,
    instructions_from_messages,
    instructions_from_prompt,
    instructions_per_image,
    normalize_message,
    unmark_control_tokens,
)
from .token_selection_emma import check_visual_tokens


class EmmaProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Keywords of a call: those of the tokenizer, for the prompt, and those of the image processor."""


PROMPT_KWARGS = ("return_mm_token_type_ids", "return_text_replacement_offsets")


class EmmaProcessor(ProcessorMixin):
    """Prepares images, prompts and instructions for [`EmmaForConditionalGeneration`].

    Args:
        image_processor: an [`EmmaImageProcessor`].
        tokenizer: the language model's tokenizer, which knows `image_token` as one token.
        instruction_tokenizer: CLIP's tokenizer, for the text encoder that reads the instruction.
        chat_template: Jinja template of a conversation. Default: `vicuna_v1`.
        image_token: placeholder of an image in a prompt.
        image_seq_length: visual tokens per image, so placeholder ids per `image_token`.
        instruction_length: ids per instruction, padding included.
        instruction_turn: whose words are an image's instruction: `"image"`, the user turn that holds it (a chat then
            keeps its cache), or `"last"`, the latest user turn.
        vision_seq_length: visual tokens that the vision tower gives for an image. Default: as many as are kept.

    Raises:
        EmmaError: a tokenizer that does not fit its place, or an unknown `instruction_turn`.
    """

    if not TRANSFORMERS_5:
        # 5 reads the parts from `__init__`. Goes with 4.57.
        attributes = ["image_processor", "tokenizer", "instruction_tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"
        instruction_tokenizer_class = "AutoTokenizer"

    # pragma: no mutate start, because Transformers reads the code object of this function
    def __init__(
        self,
        image_processor: EmmaImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        instruction_tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<image>",
        image_seq_length: int = 576,
        instruction_length: int = 77,
        instruction_turn: str = "image",
        vision_seq_length: int | None = None,
    ) -> None:
        self.image_token = image_token
        self.image_seq_length = image_seq_length
        self.vision_seq_length = image_seq_length if vision_seq_length is None else vision_seq_length
        self.instruction_length = instruction_length
        self.instruction_turn = instruction_turn
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        super().__init__(
            image_processor,
            tokenizer,
            instruction_tokenizer,
            chat_template=CHAT_TEMPLATE if chat_template is None else chat_template,
        )
        if instruction_turn not in ("image", "last"):
            raise EmmaError(f"`instruction_turn` must be 'image' or 'last': got {instruction_turn!r}.")
        if tokenizer is not None:
            self._check_tokenizer()
        if instruction_tokenizer is not None:
            check_instruction_tokenizer(instruction_tokenizer)

    # pragma: no mutate end
    def _check_tokenizer(self) -> None:
        image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        if image_id is None or image_id == self.tokenizer.unk_token_id:
            raise EmmaError(
                f"`tokenizer` must know the placeholder {self.image_token!r} as one token: got "
                f"{type(self.tokenizer).__name__} without it. Add it with "
                f"`tokenizer.add_tokens([{self.image_token!r}], special_tokens=True)` and a row in the model."
            )
        self.image_token_id = image_id
        # A text that Llama's tokenizer reads on its own begins with one more space than is written. Some versions
        # leave that space out where the text begins with one of its own: those get it from us.
        ids = [self.tokenizer(text)["input_ids"] for text in ("a", " a")]
        self._drops_leading_space = ids[0] == ids[1]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        instructions: str | list[str] | list[list[str]] | None = None,
        **kwargs: Unpack[EmmaProcessorKwargs],
    ) -> BatchFeature:
        """Prepare a batch.

        Args:
            images: images as PIL images, arrays, tensors, paths, URLs, data URLs or bytes: one, a list in the order
                of the placeholders, or a list per prompt.
            text: prompts that hold one `image_token` for each image, or one prompt.
            instructions: what is asked about each image. Default: the words around it in its prompt. One string for
                all, a list with one per prompt (with a single prompt one per image), or a list per prompt.
            **kwargs: of the tokenizer (`padding`, `padding_side`, `max_length`, `truncation`, `add_special_tokens`,
                `return_tensors`, …; for the prompt, never for the instruction) and of the image processor.

        Returns:
            `input_ids` and `attention_mask` (batch, tokens), `pixel_values` (images, 3, height, width) and
            `instruction_input_ids` (images, instruction_length), each where its input is given.

        Raises:
            EmmaError: placeholders, images and instructions that differ in number, truncation that would cut an
                image, an image that cannot be read, a text that is not valid Unicode, videos or audio.
            FileNotFoundError: a path that does not exist.

        Example:
        >>> from PIL import Image
        >>> from emma_hf import EMMA_TINY, EmmaProcessor
        >>> processor = EmmaProcessor.from_pretrained(EMMA_TINY)
        >>> prompt = "USER: <image>\\nWhat color is the star? ASSISTANT:"
        >>> inputs = processor(images=Image.new("RGB", (64, 64), "red"), text=prompt, return_tensors="pt")
        >>> sorted(inputs)
        ['attention_mask', 'input_ids', 'instruction_input_ids', 'pixel_values']
        """
        if text is None and images is None:
            raise EmmaError("Pass `text`, `images` or both: got neither.")
        text_kwargs, images_kwargs, return_tensors = self._split_kwargs(dict(kwargs))
        data: dict[str, Any] = {}
        prompts = None if text is None else self._check_prompts(text)
        if prompts is not None:
            counts = [prompt.count(self.image_token) for prompt in prompts]
            images = self._check_image_counts(images, counts)
            replacements = text_kwargs.pop("return_text_replacement_offsets", False)
            data.update(self._tokenize(prompts, replacements, **text_kwargs))
        elif images is not None:
            images = [image for row in rows_of_images(images) for image in row]
            counts = [len(images)]
        rows = self._resolve_instructions(instructions, prompts, counts)
        if images:
            data["pixel_values"] = self.image_processor.encode_each(images, **images_kwargs)
        if rows:
            ids = [encode_instruction(self.instruction_tokenizer, row, self.instruction_length) for row in rows]
            data["instruction_input_ids"] = torch.tensor(ids)
        batch = as_batch(data, return_tensors)
        if prompts is not None and replacements:
            batch["text_replacement_offsets"] = [self._replacement_offsets(prompt) for prompt in prompts]
        return batch

    def _replacement_offsets(self, prompt: str) -> list[dict[str, Any]]:
        """Where each placeholder of `prompt` stands, and its expansion in the expanded prompt."""
        replacement, offsets = self.replace_image_token(), []
        for number, match in enumerate(re.finditer(re.escape(self.image_token), prompt)):
            start = match.start() + number * (len(replacement) - len(self.image_token))
            span = {"span": match.span(), "new_span": (start, start + len(replacement))}
            offsets.append({"type": "image", **span, "text": self.image_token, "replacement": replacement})
        return offsets

    def _split_kwargs(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str | None]:
        """Keywords of the tokenizer, keywords of the image processor, and `return_tensors`."""
        for name in ("videos", "audio"):
            if kwargs.pop(name, None):
                raise EmmaError(f"EMMA reads text and images: got `{name}`. Pass frames of a video as `images`.")
        # The marks of `sanitize_control_tokens` are understood wherever they stand.
        kwargs.pop("sanitize_control_tokens", None)
        merged = self._merge_kwargs(ProcessingKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        # Keywords of the prompt that Transformers 5.24 moves out of `text_kwargs`, and copies into it until 5.29.
        text_kwargs.update({name: merged[name] for name in PROMPT_KWARGS if name in merged})
        given = {**(kwargs.get("text_kwargs") or {}), **kwargs}
        if given.get("max_length") is not None and text_kwargs.get("truncation") is None:
            # A length alone truncates, as in Transformers' tokenizers; not one that the tokenizer was saved with.
            text_kwargs["truncation"] = not text_kwargs.get("padding")
        images_kwargs.pop("return_tensors", None)
        return text_kwargs, images_kwargs, text_kwargs.pop("return_tensors", None)

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """Render messages, and with `tokenize=True` prepare them; see `ProcessorMixin.apply_chat_template`.

        The instruction of each image comes from the messages themselves (an explicit `instructions=` wins). The
        placeholder written as words in a text part, or by anybody but the user, stays words.
        """
        is_list = isinstance(conversation, (list, tuple))
        batched = is_list and bool(conversation) and isinstance(conversation[0], (list, tuple))
        for messages in conversation if batched else [conversation]:
            if not isinstance(messages, (list, tuple)) or not messages:
                raise EmmaError(
                    "A conversation must be a list of at least one message, `{'role': …, 'content': …}`: got "
                    f"{str(messages)[:200]!a}."
                )
        conversations = [
            [normalize_message(message, self.image_token) for message in messages]
            for messages in (conversation if batched else [conversation])
        ]
        template = chat_template or self.chat_template
        if isinstance(self.chat_template, dict):
            template = self.chat_template.get(chat_template or "default", chat_template)
        refuse_unread(template, chain.from_iterable(conversations), kwargs)
        if kwargs.get("tokenize"):
            instructions = kwargs.pop("instructions", None)
            if instructions is None:
                instructions = (kwargs.get("processor_kwargs") or {}).get("instructions")
            if instructions is None:
                instructions = [
                    instructions_from_messages(messages, self.image_token, self.instruction_turn)
                    for messages in (conversation if batched else [conversation])
                ]
                if not any(instructions):
                    # A template may place images that no message holds; their instructions are in its prompt.
                    instructions = None
            kwargs = chat_template_kwargs(kwargs, instructions=instructions)
        try:
            return super().apply_chat_template(
                conversations if batched else conversations[0], chat_template=chat_template, **kwargs
            )
        except Exception as error:
            # A template's own words, or what it misses; Transformers alone needs the package.
            if type(error).__module__ != "jinja2.exceptions":
                raise
            raise EmmaError(f"The chat template refuses these messages: {error}.") from error

    @property
    def model_input_names(self) -> list[str]:
        # Those of a tokenizer can name `token_type_ids`, which a prompt does not get.
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names, "instruction_input_ids"]

    @property
    def image_token_ids(self) -> list[int]:
        """Ids in `input_ids` that stand for an image. Transformers 5 reads the placeholder's id by this name."""
        return [self.image_token_id]

    def replace_image_token(self, image_inputs: dict | None = None, image_idx: int = 0, **kwargs: Any) -> str:
        """What one `image_token` of a prompt expands to."""
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        # Serving engines plan their memory with it.
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)

    def _check_prompts(self, text: Any) -> list[str]:
        prompts = [text] if isinstance(text, str) else text
        if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
            kind = type(text).__name__ if not isinstance(text, (list, tuple)) else [type(p).__name__ for p in text]
            raise EmmaError(
                f"`text` must be a string or a list of at least one string: got {kind}. The order is (images, text); "
                "pass both by name."
            )
        for row, prompt in enumerate(prompts):
            check_text("`text`" if isinstance(text, str) else f"`text` of prompt {row}", prompt)
        return [unmark_control_tokens(prompt) for prompt in prompts]

    def _check_image_counts(self, images: Any, counts: list[int]) -> list[Any]:
        """The images in one list, after each prompt was seen to have its own."""
        rows: list[list[Any]]
        if images is None:
            rows = [[] for _ in counts]
        else:
            rows = rows_of_images(images)
            if len(rows) == 1 and not is_nested(images):
                flat = rows[0]
                ends = list(accumulate(counts))
                if len(flat) != ends[-1]:
                    raise EmmaError(
                        f"Each `{self.image_token}` in the prompts stands for one image: got {ends[-1]} placeholders "
                        f"(per prompt: {counts}) and {len(flat)} images. {self._count_rule()}"
                    )
                return flat
        if len(rows) != len(counts):
            raise EmmaError(
                f"A list of images per prompt must have as many lists as there are prompts: got {len(rows)} lists and "
                f"{len(counts)} prompts."
            )
        for row, (found, given) in enumerate(zip(counts, rows)):
            if found != len(given):
                raise EmmaError(
                    f"Each `{self.image_token}` in the prompts stands for one image: prompt {row} holds {found} "
                    f"placeholders and comes with {len(given)} images. {self._count_rule()}"
                )
        return [image for row in rows for image in row]

    def _count_rule(self) -> str:
        # Tools look for the words of Transformers 5.
        return (
            f"The {self.image_token} tokens in the prompts should be the same as the number of images: write one "
            f"`{self.image_token}` per image."
        )

    def _resolve_instructions(self, instructions: Any, prompts: list[str] | None, counts: list[int]) -> list[str]:
        """One instruction per image, in the images' order."""
        if instructions is None:
            if prompts is None:
                return []
            return [
                instruction
                for prompt in prompts
                for instruction in instructions_from_prompt(
                    prompt[self._bos_length(prompt) :],
                    self.image_token,
                    self.instruction_turn,
                    self.tokenizer.eos_token,
                )
            ]
        return instructions_per_image(instructions, counts)

    def _tokenize(
        self,
        prompts: list[str],
        expand_spans: bool,
        add_special_tokens: bool = True,
        padding: Any = False,
        truncation: Any = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_offsets_mapping: bool = False,
        return_mm_token_type_ids: bool = False,
        verbose: bool = True,
        **ignored: Any,
    ) -> dict[str, Any]:
        encoded = [self.encode_prompt(prompt, add_special_tokens) for prompt in prompts]
        if not truncation:
            for ids, _ in encoded:
                warn_of_too_long_prompt(self.tokenizer, ids, max_length, verbose)
        if expand_spans:
            encoded = [(ids, self._expand_spans(ids, spans)) for ids, spans in encoded]
        if truncation and truncation != "do_not_truncate":
            limit = self.tokenizer.model_max_length if max_length is None else max_length
            encoded = [self._truncate(ids, offsets, limit, row) for row, (ids, offsets) in enumerate(encoded)]
        side = padding_side or self.tokenizer.padding_side
        silence_padding_advice(self.tokenizer)
        if padding and self.tokenizer.pad_token_id is None:
            raise EmmaError(
                "Padding needs a padding token, which the tokenizer lacks: set `processor.tokenizer.pad_token`."
            )
        batch = self.tokenizer.pad(
            {"input_ids": [ids for ids, _ in encoded]},
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=side,
            return_attention_mask=True if return_attention_mask is None else return_attention_mask,
        )
        data = {name: batch[name] for name in batch}
        if return_mm_token_type_ids:
            data["mm_token_type_ids"] = [[int(i in self.image_token_ids) for i in ids] for ids in data["input_ids"]]
        if return_offsets_mapping:
            # In the prompt as it was given, all ids of an image have the span of its placeholder.
            data["offset_mapping"] = [
                padded(offsets, len(ids), (0, 0), side) for (_, offsets), ids in zip(encoded, data["input_ids"])
            ]
        return data

    def _expand_spans(self, ids: list[int], spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Spans in the expanded prompt, where each id of an image has a span of its own."""
        expanded, images = [], 0
        for token, (start, end) in zip(ids, spans):
            # The placeholders so far, beyond the one that the prompt holds for each image.
            added = (images - images // self.image_seq_length) * len(self.image_token)
            expanded.append((start + added, end + added))
            images += token == self.image_token_id
        return expanded

    def encode_prompt(self, prompt: str, add_special_tokens: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of one prompt, each `image_token` expanded, and the span of characters that each id stands for.

        The text pieces between images are tokenized separately, as the authors' `tokenizer_image_token` does: what
        follows an image begins as a text begins.

        Returns:
            Ids, and for each id the start and end of its characters in `prompt`: all ids of an image have the span of
            its placeholder, and special tokens that are not in `prompt` an empty span.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        position = start = self._bos_length(prompt)
        for index, piece in enumerate(prompt[start:].split(self.image_token)):
            if index:
                end = position + len(self.image_token)
                ids += [self.image_token_id] * self.image_seq_length
                spans += [(position, end)] * self.image_seq_length
                position = end
            piece_ids, piece_spans = self._encode_piece(piece)
            ids += piece_ids
            spans += [(start + position, end + position) for start, end in piece_spans]
            position += len(piece)
        before, after = self._special_ids() if add_special_tokens else ([], [])
        if start:
            before = [self.tokenizer.bos_token_id]
        ids = before + ids + after
        spans = [(0, start)] * len(before) + spans + [(position, position)] * len(after)
        return ids, spans

    def _bos_length(self, prompt: str) -> int:
        """Length of the begin-of-sequence token that a rendered chat begins with; the text starts behind it."""
        bos = self.tokenizer.bos_token
        return len(bos) if bos and prompt.startswith(bos) else 0

    def _encode_piece(self, piece: str) -> tuple[list[int], list[tuple[int, int]]]:
        if not piece:
            return [], []
        if not self.tokenizer.is_fast:
            if PLACEHOLDER_ESCAPE in piece:
                raise EmmaError(
                    f"A text that holds {self.image_token!r} as words needs a fast tokenizer: got "
                    f"{type(self.tokenizer).__name__}. Load it through AutoTokenizer."
                )
            ids = self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            return ids, [(0, len(piece))] * len(ids)
        extra = int(self._drops_leading_space and piece.startswith(" "))
        # Without the warning of a text too long, which is for the whole prompt.
        encoded = self.tokenizer(
            " " * extra + piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        spans = [(max(start - extra, 0), max(end - extra, 0)) for start, end in encoded["offset_mapping"]]
        kept = [
            (token, span)
            for token, span in zip(encoded["input_ids"], spans)
            if PLACEHOLDER_ESCAPE not in piece or piece[slice(*span)].strip(PLACEHOLDER_ESCAPE) or span[0] == span[1]
        ]
        return [token for token, _ in kept], [span for _, span in kept]

    def _special_ids(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before and after a text."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return whole[:start], whole[start + len(plain) :]

    def _truncate(self, ids: list[int], offsets: list, limit: int, row: int) -> tuple[list[int], list]:
        excess = max(len(ids) - limit, 0)
        if self.tokenizer.truncation_side == "left":
            cut, kept = ids[:excess], slice(excess, None)
        else:
            cut, kept = ids[limit:], slice(limit)
        if self.image_token_id in cut:
            raise EmmaError(
                f"Truncation must not cut an image: prompt {row} has {len(ids)} tokens and would lose "
                f"{cut.count(self.image_token_id)} of its {ids.count(self.image_token_id)} image tokens at "
                f"max_length={limit}. Raise `max_length` or shorten the prompt."
            )
        return ids[kept], offsets[kept]

    def to_dict(self, legacy_serialization: bool = True) -> dict[str, Any]:
        """Like the base class. The parts have files of their own, whatever 4.57's `legacy_serialization` says."""
        return super().to_dict()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """`ProcessorMixin.from_pretrained`, which also takes the `visual_tokens` of the model's config; None: all.

        Raises:
            EmmaError: `visual_tokens` that the vision tower does not give.
        """
        changes = "visual_tokens" in kwargs
        visual_tokens = kwargs.pop("visual_tokens", None)
        processor = super().from_pretrained(*args, **kwargs)
        if changes:
            if visual_tokens is not None:
                check_visual_tokens(visual_tokens, processor.vision_seq_length)
            processor.image_seq_length = visual_tokens or processor.vision_seq_length
        return processor

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path: Any, processor_dict=None, **kwargs: Any):
        # The second tokenizer has a folder of its own; nothing falls back to the first one.
        subfolder = kwargs.pop("subfolder", None) or ""
        second = "/".join(part for part in (subfolder, "instruction_tokenizer") if part)
        path = pretrained_model_name_or_path
        return [
            EmmaImageProcessor.from_pretrained(path, subfolder=subfolder, **kwargs),
            AutoTokenizer.from_pretrained(path, subfolder=subfolder, **kwargs),
            AutoTokenizer.from_pretrained(path, subfolder=second, **kwargs),
        ]

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Write a folder that every supported Transformers version loads: both tokenizers, the image processor, the
        chat template and the code files; and push it with `push_to_hub`.
        """
        folder = Path(save_directory)
        copy_code_files(folder)
        with only_primary_attributes(self):
            files = super().save_pretrained(folder, **kwargs)
        self.image_processor.save_pretrained(folder)
        second = folder / "instruction_tokenizer"
        self.instruction_tokenizer.save_pretrained(second)
        # `AutoTokenizer` looks for a model type beside the files of a tokenizer in a folder of its own.
        (second / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}) + "\n", encoding="utf-8")
        make_tokenizer_config_portable(folder, self.tokenizer)
        make_tokenizer_config_portable(second, self.instruction_tokenizer)
        return push_saved(self, folder, kwargs) if push_to_hub else files


__all__ = ["EmmaProcessor"]

pass_keywords_in_pipelines(EmmaProcessor)

# dill, with which `datasets` starts processes, writes a class by value where its module is no attribute of its package,
# as Transformers leaves the modules that it loads from a folder.
_package, _, _module = __name__.rpartition(".")
if _package in sys.modules:
    vars(sys.modules[_package])[_module] = sys.modules[__name__]
