"""Images as far as they can be encoded before anything is asked about them."""

from typing import Any

import torch
from torch import nn

from .errors_emma import EmmaError
from .fusion_emma import is_unmodified_linear


class EmmaImageEncoding:
    """Encoded images that any number of questions can be asked about; made by `model.encode_image`.

    Visual tokens V do not depend on the question, and what follows is linear up to the projector's activation:

        W1 F + b1  =  [W1 (Wa_v V + ba + offset) + b1]  +  Wa_p (P W1^T),   Wa = [Wa_v | Wa_p]

    The bracket is computed once, for the visual tokens that the config keeps. A question then costs the text encoder,
    the second term and the projector's second layer. Rounding differs from that of `get_image_features`, by no more
    than that differs from exact arithmetic. Where the projector's first layer is quantized, adapted or offloaded, only
    V is kept.

    Inference alone: no gradient reaches what is kept.

    Attributes:
        vision_features: V, (images, N, vision width).
    """

    @torch.no_grad()
    def __init__(self, model: Any, vision_features: torch.Tensor) -> None:
        self.model, self.vision_features = model, vision_features
        rows = model.modality_adaptation.select_rows(vision_features)
        # Where all are kept, one matrix serves all images.
        self._rows: Any = slice(None) if rows is None else rows
        self._projected = self._project() if is_unmodified_linear(model.multi_modal_projector.linear_1) else None

    def __len__(self) -> int:
        return len(self.vision_features)

    @torch.no_grad()
    def image_features(self, instruction_input_ids: torch.Tensor) -> torch.Tensor:
        """Z for one question per image, for one question about all images, or for many about one image.

        Args:
            instruction_input_ids: (images or 1, instruction_length), or (questions, instruction_length) of one image.

        Returns:
            (images or questions, K, text width): `image_features` of `forward` and `generate`.

        Raises:
            EmmaError: rows that are neither one, nor as many as the images, nor about one image; or see
                `get_instruction_features`.
        """
        images, questions = len(self), instruction_input_ids.shape[0]
        if images != questions and 1 not in (images, questions):
            raise EmmaError(
                "Pass one row of `instruction_input_ids` for each picture, one row for all, or any number about "
                f"one picture: got {questions} rows and {images} pictures."
            )
        if self._projected is None:
            rows = max(images, questions)
            features = self.vision_features.expand(rows, -1, -1)
            ids = instruction_input_ids.expand(rows, -1)
            return self.model.get_image_features(vision_features=features, instruction_input_ids=ids).pooler_output
        projector, adaptation = self.model.multi_modal_projector, self.model.modality_adaptation
        words = self.model.get_instruction_features(instruction_input_ids)
        weight = adaptation.visual_alignment.weight[:, self.vision_features.shape[1] :][self._rows]
        words = nn.functional.gelu(adaptation.instruction_projection(words.to(weight)))
        # The words first meet the projector: they are fewer than the visual tokens that they are spread over.
        words = nn.functional.linear(words.to(self._projected), projector.linear_1.weight)
        return projector.linear_2(projector.act(self._projected + weight.to(words) @ words))

    def _project(self) -> torch.Tensor:
        """The part of the projector's first layer that comes from the images, (images, K, text width)."""
        adaptation = self.model.modality_adaptation
        alignment, tokens = adaptation.visual_alignment, self.vision_features.shape[1]
        features = self.vision_features.to(alignment.weight.device, alignment.weight.dtype)
        fused = alignment.weight[:, :tokens][self._rows] @ features + alignment.bias[self._rows].unsqueeze(-1)
        if adaptation.visual_offset is not None:
            fused = fused + adaptation.visual_offset[self._rows]
        linear: nn.Linear = self.model.multi_modal_projector.linear_1
        return linear(fused.to(linear.weight.device, linear.weight.dtype))


__all__ = ["EmmaImageEncoding"]
