"""What each token adds to the fused features F: by weights alone, by weights and values, and by leaving it out.

Letters as in `vision_path.py`. A norm is the Euclidean norm of a token's vector, and of several tokens that of all
their numbers.
"""

from typing import Any

import torch

from .questions import TooFewQuestionsError
from .vision_path import BATCH, Sample, VisionPath


def weights(path: VisionPath) -> dict[str, Any]:
    """Norms of Wa. They ignore how large the tokens are that it multiplies, and how little these may vary.

    Returns:
        `visual_l1`, `visual_l2` (N,) and `text_l1`, `text_l2` (T,): norms of the column of each input token.
        `row_visual_l1`, `row_text_l1`, `row_visual_l2`, `row_text_l2` (N,): of the row of each output token.
        `text_share_l1`, `text_share_l2`: share of the text columns in the sum of absolute and of squared weights.
        `identity_distance`: Frobenius norm of Wv less the identity; `visual_norm`: that of Wv.
    """
    visual, text = path.visual_weight, path.text_weight
    identity = torch.eye(len(visual), device=visual.device)
    return {
        "visual_l1": visual.abs().sum(0),
        "visual_l2": visual.norm(dim=0),
        "text_l1": text.abs().sum(0),
        "text_l2": text.norm(dim=0),
        "row_visual_l1": visual.abs().sum(1),
        "row_text_l1": text.abs().sum(1),
        "row_visual_l2": visual.norm(dim=1),
        "row_text_l2": text.norm(dim=1),
        "text_share_l1": float(text.abs().sum() / (text.abs().sum() + visual.abs().sum())),
        "text_share_l2": float(text.square().sum() / (text.square().sum() + visual.square().sum())),
        "identity_distance": float((visual - identity).norm()),
        "visual_norm": float(visual.norm()),
    }


def effective(path: VisionPath, sample: Sample) -> dict[str, torch.Tensor]:
    """What each input token adds to F, mean over the questions: the norm of its column times that of its vector.

    The second of each pair has its mean taken off: a token that is the same for every question, as the start token and
    nearly all padding are, adds a constant however large its weight is.

    Returns:
        `text`, `text_varying` (T,), of the questions; `visual`, `visual_varying` (N,), of the images.

    Raises:
        TooFewQuestionsError: one question alone.
    """
    _check_two(sample)
    result = {}
    for name, tokens, mean, weight in (
        ("text", sample.instruction_tokens, sample.mean_tokens, path.text_weight),
        ("visual", sample.vision_features, sample.vision_features.mean(0), path.visual_weight),
    ):
        column = weight.norm(dim=0)
        result[name] = column * tokens.norm(dim=-1).mean(0)
        result[f"{name}_varying"] = column * (tokens - mean).norm(dim=-1).mean(0)
    return result


def terms(
    path: VisionPath, vision_features: torch.Tensor, instruction_tokens: torch.Tensor, mean_tokens: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The terms of F, whose sum it is.

    Args:
        vision_features: V of one image, (N, vision width).
        instruction_tokens: P of one question, (T, vision width).
        mean_tokens: the mean of P over questions.

    Returns:
        (N, vision width) each: `image` Wv V; `mean text` Wt mean(P), a constant; `question` Wt (P - mean(P)), the only
        term that depends on the question; `bias`; and `offset` where the model has one.
    """
    parts = {
        "image": path.visual_weight @ vision_features,
        "mean text": path.text_term(mean_tokens),
        "question": path.text_term(instruction_tokens - mean_tokens),
        "bias": path.bias[:, None].expand_as(vision_features),
    }
    return parts if path.offset is None else {**parts, "offset": path.offset}


def term_shares(path: VisionPath, sample: Sample) -> dict[str, torch.Tensor]:
    """Norm of each term of F beside that of F, of each row.

    Returns:
        (rows,) each: the terms of [`terms`], besides `text` (the whole of it), and `image_varying`, the image's term
        less its mean over images. Shares of norms do not sum to 1.

    Raises:
        TooFewQuestionsError: one question alone.
    """
    _check_two(sample)
    mean_image = path.visual_weight @ sample.vision_features.mean(0)
    mean = sample.mean_tokens
    shares: dict[str, list[torch.Tensor]] = {}
    for image, words in zip(sample.images.tolist(), sample.instruction_tokens):
        parts = terms(path, sample.vision_features[image], words, mean)
        parts["text"] = parts["mean text"] + parts["question"]
        parts["image_varying"] = parts["image"] - mean_image
        fused = path.fuse(sample.vision_features[image], words).norm()
        for name, part in parts.items():
            shares.setdefault(name, []).append(part.norm() / fused)
    return {name: torch.stack(values) for name, values in shares.items()}


def question_map(
    path: VisionPath, vision_features: torch.Tensor, instruction_tokens: torch.Tensor, others: torch.Tensor
) -> torch.Tensor:
    """Where the question moved the visual tokens of an image: |Z_n(q) - mean_q Z_n| of each token n, (N,).

    Args:
        vision_features: V of one image, (N, vision width).
        instruction_tokens: P of the question, (T, vision width).
        others: P of the questions to take the mean over, (questions, T, vision width).
    """
    total = torch.stack([path.project(path.fuse(vision_features, part)).sum(0) for part in others.split(BATCH)]).sum(0)
    own = path.project(path.fuse(vision_features, instruction_tokens))
    return (own - total / len(others)).norm(dim=-1)


def leave_one_out(path: VisionPath, vision_features: torch.Tensor, instruction: str) -> list[tuple[str, float]]:
    """How far each token of an instruction moves the visual tokens: |Z - Z without it| beside |Z|.

    Without a token those behind it move up by one position, as in a text that lacks it.

    Args:
        vision_features: V of one image, (N, vision width).

    Returns:
        Each token between start and end, as text, and its share. Tokens that were cut off are not among them.
    """
    (ids,) = path.instruction_ids([instruction]).tolist()
    end = ids.index(path.processor.instruction_tokenizer.eos_token_id)
    without = [[*ids[:index], *ids[index + 1 :], 0] for index in range(1, end)]
    tokens = path.instruction_tokens(torch.tensor([ids, *without], device=path.model.device))
    states = torch.cat([path.project(path.fuse(vision_features, part)) for part in tokens.split(BATCH)])
    shares = (states[1:] - states[0]).flatten(1).norm(dim=1) / states[0].norm()
    tokenizer = path.processor.instruction_tokenizer
    return [(tokenizer.decode([token]).strip(), share) for token, share in zip(ids[1:end], shares.tolist())]


def moved_by(path: VisionPath, sample: Sample, others: torch.Tensor) -> torch.Tensor:
    """|Z - Z with other instructions| beside |Z|, of each row, (rows,).

    Args:
        others: P in place of each row's own, (rows, T, vision width), or of all, (T, vision width).
    """
    shares = []
    pairs = torch.stack([sample.instruction_tokens, others.expand_as(sample.instruction_tokens)], 1)
    for image, both in zip(sample.images.tolist(), pairs):
        own, other = path.project(path.fuse(sample.vision_features[image], both))
        shares.append((own - other).norm() / own.norm())
    return torch.stack(shares)


def _check_two(sample: Sample) -> None:
    if len({row.instruction for row in sample.rows}) < 2:
        raise TooFewQuestionsError(
            f"What depends on the question shows in 2 different questions at least: got {len(sample.rows)}, all of "
            "one instruction. Add questions."
        )


__all__ = ["effective", "leave_one_out", "moved_by", "question_map", "term_shares", "terms", "weights"]
