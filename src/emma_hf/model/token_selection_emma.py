"""Which visual tokens of an image the language model gets, where it gets fewer than the vision tower gives.

Each of the N output tokens of the visual alignment has a row of Wa of its own. The rows of S alone are computed,
`F_S = Wa[S, :] [V ; P] + ba[S]`, so that all that follows costs K / N. S depends on V, and not on what is asked.
"""

from typing import Any

import torch

from .errors_emma import EmmaError

TOKEN_SELECTIONS = ("diversity",)

# Features become whole numbers up to this: their products, summed over up to 8,192 features, stay below 2^53, up to
# which float64 is exact.
_SCALE = 2.0**20


def check_visual_tokens(visual_tokens: Any, available: int) -> None:
    """Refuse a number of visual tokens that cannot be chosen from `available` ones.

    Raises:
        EmmaError: not a whole number from 1 to `available`.
    """
    is_whole = isinstance(visual_tokens, int) and not isinstance(visual_tokens, bool)
    if not is_whole or not 1 <= visual_tokens <= available:
        raise EmmaError(
            f"`visual_tokens` must be a whole number from 1 to {available}, which the vision tower gives for one "
            f"image: got {visual_tokens!r}. Leave it out, or set it to None, to keep all."
        )


@torch.no_grad()
def select_diverse(vision_features: torch.Tensor, visual_tokens: int) -> torch.Tensor:
    """The visual tokens that differ most from each other: DivPrune's max-min choice (arXiv 2503.02175), made on V.

    The distance of two tokens is 1 - cos. The first token is the one whose nearest neighbor is farthest; then, again
    and again, the one that is farthest from its nearest chosen token. Of equals the first is taken.

    An image's choice is the same in any batch, on any device and with any number of threads: features are rounded to 20
    bits of the token's largest one, and what is summed of them is exact in any order.

    Args:
        vision_features: V (images, N, vision width), of any floating-point dtype and up to 8,192 features.
        visual_tokens: K, at least 1 and at most N.

    Returns:
        Indices of the tokens, ascending: (images, K), int64.

    Raises:
        EmmaError: K is not from 1 to N.
    """
    images, tokens, _ = vision_features.shape
    check_visual_tokens(visual_tokens, tokens)
    if visual_tokens == tokens:
        return torch.arange(tokens, device=vision_features.device).expand(images, tokens)
    # Apple's GPUs have no float64.
    device = torch.device("cpu") if vision_features.device.type == "mps" else vision_features.device
    distances = _distances(vision_features.to(device, torch.float64))
    itself = torch.eye(tokens, dtype=torch.bool, device=device)
    chosen = [distances.masked_fill(itself, torch.inf).amin(-1).argmax(-1, keepdim=True)]
    # A chosen token is at -1 from the chosen ones, and the others at 0 or more.
    distances = distances.masked_fill(itself, -1)
    nearest = torch.full_like(distances[:, 0], torch.inf)
    for _ in range(visual_tokens - 1):
        row = distances.gather(1, chosen[-1].unsqueeze(-1).expand(-1, -1, tokens)).squeeze(1)
        nearest = torch.minimum(nearest, row)
        chosen.append(nearest.argmax(-1, keepdim=True))
    return torch.cat(chosen, 1).sort(-1).values.to(vision_features.device)


def _distances(features: torch.Tensor) -> torch.Tensor:
    """1 - cos of each two tokens (images, N, N), of float64; exactly 0 where two are equal, 1 from a token of zeros."""
    largest = features.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(features.dtype).tiny)
    values = (features / largest * _SCALE).round()
    products = values @ values.transpose(1, 2)
    squares = products.diagonal(dim1=1, dim2=2)
    # The root of a square is exact, so that equal tokens have a cosine of 1.
    norms = (squares.unsqueeze(2) * squares.unsqueeze(1)).sqrt().clamp(min=1)
    return (1 - products / norms).clamp(min=0)


__all__ = ["TOKEN_SELECTIONS", "check_visual_tokens", "select_diverse"]
