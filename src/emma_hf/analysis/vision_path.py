"""A model's path from image and instruction to visual tokens, in parts that can be looked at.

Letters as in `model/modeling_emma.py`: V, H, P, F, Z; N visual and T instruction tokens. F is linear in V and P:

    F = Wv V + Wt P + ba (+ offset),   Wa = [Wv | Wt]
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..model.errors_emma import EmmaError
from ..model.instruction_emma import encode_instruction
from ..model.modeling_emma import EmmaForConditionalGeneration, EmmaModalityAdaptation
from ..model.processing_emma import EmmaProcessor
from .questions import Row

# Images that are encoded together.
BATCH = 32


class VisionPath:
    """The vision path of a model. What follows the two CLIP towers is computed in float32, whatever the model's dtype.

    Args:
        model: as `load_model` returns it.
        processor: its processor.

    Attributes:
        visual_weight: Wv, (N, N).
        text_weight: Wt, (N, T).
        bias: ba, (N,).
        offset: (N, vision width), or None.

    Raises:
        EmmaError: a model without a modality adaptation, or one that keeps fewer visual tokens than there are.
    """

    def __init__(self, model: EmmaForConditionalGeneration, processor: EmmaProcessor) -> None:
        adaptation = getattr(getattr(model, "model", model), "modality_adaptation", None)
        if not isinstance(adaptation, EmmaModalityAdaptation):
            raise EmmaError(
                "What an instruction does is analyzed at EMMA's modality adaptation, between vision tower and "
                f"projector: {type(model).__name__} has none. Pass an EmmaForConditionalGeneration."
            )
        config = model.config
        if config.image_seq_length != config.vision_seq_length:
            raise EmmaError(
                f"What an instruction does is analyzed at all {config.vision_seq_length} visual tokens: got "
                f"visual_tokens={config.visual_tokens}. Load the model and its processor with "
                f"visual_tokens={config.vision_seq_length}."
            )
        self.model, self.processor = model, processor
        self._adaptation = copy.deepcopy(adaptation).float()
        self._projector = copy.deepcopy(model.model.multi_modal_projector).float()
        alignment = self._adaptation.visual_alignment
        tokens = len(alignment.weight)
        weight = alignment.weight.detach()
        self.visual_weight, self.text_weight = weight[:, :tokens], weight[:, tokens:]
        self.bias = alignment.bias.detach()
        offset = self._adaptation.visual_offset
        self.offset = None if offset is None else offset.detach()

    @property
    def has_class_token(self) -> bool:
        """Whether the first visual token is CLIP's class token, which has no place in the image."""
        return self.model.config.vision_feature_select_strategy == "full"

    @property
    def first_position(self) -> int:
        """Position in the instruction of the first token that the alignment reads."""
        return int(self.model.config.instruction_feature_select_strategy == "patch")

    def instruction_ids(self, texts: Sequence[str]) -> torch.Tensor:
        """Ids (texts, instruction_length) as the processor makes them."""
        tokenizer, length = self.processor.instruction_tokenizer, self.model.config.instruction_length
        ids = [encode_instruction(tokenizer, text, length) for text in texts]
        return torch.tensor(ids, device=self.model.device)

    @torch.no_grad()
    def instruction_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """P (texts, T, vision width) of ids (texts, instruction_length)."""
        features = torch.cat([self.model.get_instruction_features(each) for each in ids.split(BATCH)])
        return nn.functional.gelu(self._adaptation.instruction_projection(features.float()))

    @torch.no_grad()
    def fuse(self, vision_features: torch.Tensor, instruction_tokens: torch.Tensor) -> torch.Tensor:
        """F of V (…, N, vision width) and P (…, T, vision width), whose leading axes are the same or broadcast."""
        leading = torch.broadcast_shapes(vision_features.shape[:-2], instruction_tokens.shape[:-2])
        features, words = (
            tokens.expand(*leading, *tokens.shape[-2:]).reshape(-1, *tokens.shape[-2:])
            for tokens in (vision_features, instruction_tokens)
        )
        fused = self._adaptation.visual_alignment(features, words)
        fused = fused if self.offset is None else fused + self.offset
        return fused.reshape(*leading, *fused.shape[-2:])

    @torch.no_grad()
    def text_term(self, instruction_tokens: torch.Tensor) -> torch.Tensor:
        """Wt P, (…, N, vision width): what the text adds to F, the same for every image."""
        return self.text_weight @ instruction_tokens

    @torch.no_grad()
    def hidden(self, fused: torch.Tensor) -> torch.Tensor:
        """W1 F + b1, (…, N, text width), of F: what the projector's activation reads."""
        return self._projector.linear_1(fused)

    @torch.no_grad()
    def gates(self, hidden: torch.Tensor) -> torch.Tensor:
        """How far the projector's activation lets each hidden unit through, act(h) / h: for a GELU from 0 to 1."""
        # The limit at 0, where the quotient is not defined.
        hidden = torch.where(hidden.abs() < 1e-6, torch.full_like(hidden, 1e-6), hidden)
        return self._projector.act(hidden) / hidden

    @torch.no_grad()
    def project(self, fused: torch.Tensor) -> torch.Tensor:
        """Z (…, N, text width) of F."""
        return self._projector(fused)

    @contextmanager
    def replaced_instruction(self, instruction_tokens: torch.Tensor) -> Iterator[None]:
        """The model reads this P (T, vision width), the same for every image, in place of any instruction's.

        Its mean over questions replaces the text term by its mean, and zeros remove the text term, since that is linear
        in P.
        """

        def replace(module: nn.Module, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            features, words = inputs
            return features, instruction_tokens.to(words).expand_as(words)

        # The kernels read the weights without calling the module, and are left where it has a hook, unless demanded.
        adaptation = self.model.model.modality_adaptation
        implementation = adaptation.config.fusion_implementation
        adaptation.config.fusion_implementation = "eager"
        handle = adaptation.visual_alignment.register_forward_pre_hook(replace)
        try:
            yield
        finally:
            handle.remove()
            adaptation.config.fusion_implementation = implementation


@dataclass
class Sample:
    """Questions and what the model's towers make of them.

    Args:
        rows: the questions.
        images: index into `vision_features` of each row's image, (rows,).
        vision_features: V of each different image, (images, N, vision width), float32.
        class_tokens: CLIP's class token of each different image at the same layer, (images, vision width), float32.
        instruction_ids: (rows, instruction_length).
        instruction_tokens: P of each row, (rows, T, vision width), float32.
        prompts: inputs of the language model, a batch of rows each: `input_ids` and `attention_mask`.
    """

    rows: Sequence[Row]
    images: torch.Tensor
    vision_features: torch.Tensor
    class_tokens: torch.Tensor
    instruction_ids: torch.Tensor
    instruction_tokens: torch.Tensor
    prompts: list[dict[str, torch.Tensor]]

    @property
    def has_answers(self) -> bool:
        """Whether the right answers are known."""
        return all(row.answer is not None for row in self.rows)

    @property
    def mean_tokens(self) -> torch.Tensor:
        """The mean of P over the questions, (T, vision width)."""
        # In float64: what does not vary equals its mean exactly.
        return self.instruction_tokens.double().mean(0).float()


@torch.no_grad()
def encode(path: VisionPath, rows: Sequence[Row], batch: int = BATCH, progress: bool = False) -> Sample:
    """Encode images, once each, and instructions, and tokenize the prompts.

    Raises:
        EmmaError: no rows, an image that cannot be read, or a question that the processor refuses; names the row.
        FileNotFoundError: no image where a row says.
    """
    if not rows:
        raise EmmaError("There is nothing to analyze: got no questions.")
    model, processor = path.model, path.processor
    numbers: dict[Any, int] = {}
    images, features, prompts = [], [], []
    for start in tqdm(range(0, len(rows), batch), desc="encoding images", disable=not progress):
        part = rows[start : start + batch]
        inputs = processor(
            images=[[_open(processor, row, start + index)] for index, row in enumerate(part, 1)],
            text=processor.apply_chat_template([messages(row.question) for row in part], add_generation_prompt=True),
            instructions=[row.instruction for row in part],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        prompts.append({name: inputs[name] for name in ("input_ids", "attention_mask")})
        new = []
        for index, row in enumerate(part):
            key = row.image if isinstance(row.image, str) else id(row.image)
            if key not in numbers:
                numbers[key] = len(numbers)
                new.append(index)
            images.append(numbers[key])
        if new:
            features.append(_vision_tokens(path, inputs["pixel_values"][new]))
    vision_features, class_tokens = map(torch.cat, zip(*features))
    ids = path.instruction_ids([row.instruction for row in rows])
    return Sample(rows, torch.tensor(images), vision_features, class_tokens, ids, path.instruction_tokens(ids), prompts)


def messages(question: str) -> list[dict[str, Any]]:
    """A user's turn about one image."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def _open(processor: EmmaProcessor, row: Row, number: int) -> Any:
    try:
        return processor.image_processor.fetch_images(row.image)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"Row {number}: {error}") from error
    except ValueError as error:
        raise EmmaError(f"Row {number}: {error}") from error


def _vision_tokens(path: VisionPath, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """V and class tokens, float32, in one run of the tower."""
    tower = path.model.model.vision_tower
    states = tower(pixels.to(tower.dtype)).last_hidden_state.float()
    return states if path.has_class_token else states[:, 1:], states[:, 0]


__all__ = ["Sample", "VisionPath", "encode"]
