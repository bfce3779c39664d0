"""How image and question act together in the projector: only its activation, a gate, can let one choose of the other.

Before the activation, F is a sum of what depends on the image and what depends on the question. If no gate turns, Z is
such a sum too, and the question can choose nothing.
"""

import math
from typing import Any

import torch

from .questions import TooFewQuestionsError, other_instructions
from .vision_path import BATCH, Sample, VisionPath

# A gate that moves by more than this turns.
TURN = 0.5
# Images and questions that are crossed.
CROSSED = 40
BINS = 50


def gate_index(path: VisionPath, sample: Sample, seed: int = 0) -> dict[str, Any]:
    """How far the projector's gates move from each row's question to another's, about the same image.

    Returns:
        `index`: share of pairs of token and hidden unit whose gate moves by more than 0.5. `mean`: mean movement.
        `histogram`: shares of pairs by movement, in 50 equal bins from 0 to 1. `text_to_image`: the spread of W1 Wt P
        over questions beside that of W1 Wv V over images (root mean squares), which gates need to turn.

    Raises:
        TooFewQuestionsError: fewer than two different questions.
    """
    others = path.instruction_tokens(path.instruction_ids(other_instructions(sample.rows, seed)))
    turned, moved, counts, total = 0, 0.0, torch.zeros(BINS, dtype=torch.float64), 0
    for index, image in enumerate(sample.images.tolist()):
        both = torch.stack([sample.instruction_tokens[index], others[index]])
        own, other = path.gates(path.hidden(path.fuse(sample.vision_features[image], both)))
        movement = (own - other).abs()
        turned += int((movement > TURN).sum())
        moved += float(movement.double().sum())
        # An activation other than a GELU can let more than 1 through.
        counts += torch.histc(movement.clamp(0, 1).cpu(), BINS, 0, 1).double()
        total += movement.numel()
    return {
        "index": turned / total,
        "mean": moved / total,
        "histogram": counts / total,
        "text_to_image": _text_to_image(path, sample),
    }


def _text_to_image(path: VisionPath, sample: Sample) -> float:
    def spread(fused: torch.Tensor) -> float:
        """Root mean square of W1 F, without the bias."""
        zero = path.hidden(torch.zeros_like(fused[0]))
        squares = [(path.hidden(part) - zero).double().square().mean((1, 2)) for part in fused.split(BATCH)]
        return float(torch.cat(squares).mean().sqrt())

    images = sample.vision_features - sample.vision_features.mean(0)
    text = spread(path.text_term(sample.instruction_tokens - sample.mean_tokens))
    image = spread(path.visual_weight @ images)
    return text / image if image else math.nan


def variance_split(
    path: VisionPath, vision_features: torch.Tensor, instruction_tokens: torch.Tensor
) -> dict[str, float]:
    """The variance of Z over all pairs of images and questions, split in two ways as in an analysis of variance.

    Args:
        vision_features: V, (images, N, vision width), of which the first 40 are used.
        instruction_tokens: P, (questions, T, vision width), likewise.

    Returns:
        Shares that sum to 1: `image`, `question` and `interaction`, what neither explains alone: a question that
        chooses of the image shows there and nowhere else. Not a number where nothing varies.

    Raises:
        TooFewQuestionsError: fewer than two images or two questions.
    """
    features, words = vision_features[:CROSSED], instruction_tokens[:CROSSED]
    if min(len(features), len(words)) < 2:
        raise TooFewQuestionsError(
            "The variance is split between images and questions, which takes 2 of each at least: got "
            f"{len(features)} images and {len(words)} questions."
        )
    # Numbers near zero, so that sums of squares lose nothing.
    reference = path.project(path.fuse(features[0], words[0]))
    by_question = torch.zeros(len(words), *reference.shape, dtype=torch.float64, device=reference.device)
    by_image, squares = [], 0.0
    for image in features:
        states = torch.cat([path.project(path.fuse(image, part)) for part in words.split(BATCH)])
        states = (states - reference).double()
        by_question += states / len(features)
        by_image.append(states.mean(0))
        squares += float(states.square().mean(0).sum()) / len(features)
    means = torch.stack(by_image)
    mean = means.mean(0)
    total = squares - float(mean.square().sum())
    image_part = float((means - mean).square().mean(0).sum())
    question_part = float((by_question - mean).square().mean(0).sum())
    shares = {"image": image_part, "question": question_part, "interaction": total - image_part - question_part}
    return {name: value / total if total > 0 else math.nan for name, value in shares.items()}


__all__ = ["gate_index", "variance_split"]
