"""Mutual information and cosine between visual tokens and the answer, as the authors' `eval_redun.py` computes them.

A pair of vectors is one estimate: its channels are the samples, and the estimator is scikit-learn's
`mutual_info_regression` (Kraskov's, three nearest neighbors). Their script takes the answer's first token, which is the
start token, the same for every answer; here the mean over the answer's tokens stands beside it. Neither is evidence
without the controls: a rise from V to F that F shows with another question's instruction too has nothing to do with the
question.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tqdm import tqdm

from ..model.errors_emma import MissingPackageError
from .questions import TooFewQuestionsError, other_instructions
from .vision_path import Sample, VisionPath

# Questions and visual tokens that are sampled: an estimate takes milliseconds.
QUESTIONS, TOKENS = 24, 8
STAGES = ("V", "mixed image", "F, own question", "F, another question", "F, mean text")
ANSWERS = ("start token", "start token, answers shuffled", "mean over tokens", "mean over tokens, answers shuffled")


def estimator() -> Callable[..., Any]:
    """scikit-learn's `mutual_info_regression`; a long run calls this at its beginning.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    try:
        from sklearn.feature_selection import mutual_info_regression
    except ImportError as error:
        raise MissingPackageError(
            'Mutual information needs scikit-learn: install it with `pip install "emma-hf[analysis]"`.'
        ) from error
    return mutual_info_regression


def channel_information(tokens: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Mutual information, in nats, of each of `tokens` (N, channels) with `vector` (channels,), over their channels.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    values = estimator()(tokens.T.cpu().numpy(), vector.cpu().numpy(), random_state=0)
    return torch.from_numpy(values)


def cosine(tokens: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Cosine of each of `tokens` (N, channels) with `vector` (channels,)."""
    return torch.nn.functional.cosine_similarity(tokens.double(), vector.double(), dim=-1).cpu()


def redundancy(path: VisionPath, sample: Sample, seed: int = 0, progress: bool = False) -> dict[str, Any]:
    """Mutual information and cosine of visual tokens with the answer, and cosine with the image's class token.

    Args:
        sample: questions with answers; 24 of them and 8 visual tokens of each, by `seed`, are used.

    Returns:
        `mutual_information` and `cosine`: by the answer's vector (`start token`, as the authors' script has it, and
        `mean over tokens`, each also with the answers shuffled) and by stage (V; `mixed image`, F without any text; F
        with the own question, with another's, and with the mean text), for each question the values of its tokens.
        `class_cosine`: by stage, of all tokens with the image's class token.

    Raises:
        MissingPackageError: scikit-learn is not installed.
        TooFewQuestionsError: no answers, or fewer than two different ones.
    """
    estimator()
    rows = sample.rows
    if not sample.has_answers or len({row.answer for row in rows}) < 2:
        raise TooFewQuestionsError(
            "Mutual information is between visual tokens and answers, which are also shuffled: it needs 2 different "
            f"answers at least, got {len({row.answer for row in rows} - {None})}. Add `answer` to the rows."
        )
    result: dict[str, Any] = {
        "mutual_information": {answer: {stage: [] for stage in STAGES} for answer in ANSWERS},
        "cosine": {answer: {stage: [] for stage in STAGES} for answer in ANSWERS},
        "class_cosine": {stage: [] for stage in STAGES},
    }
    others = other_instructions(rows, seed)
    chosen = sorted(random.Random(seed).sample(range(len(rows)), min(QUESTIONS, len(rows))))
    for index, vectors in zip(
        tqdm(chosen, desc="mutual information", disable=not progress), _answers(path, sample, chosen, seed)
    ):
        image = int(sample.images[index])
        other = path.instruction_ids([others[index]])
        for stage, tokens in _stages(path, sample, image, index, path.instruction_tokens(other)[0]).items():
            result["class_cosine"][stage] += cosine(tokens, sample.class_tokens[image]).tolist()
            few = tokens[chosen_tokens(len(tokens), seed, len(rows))[index]]
            for answer, vector in vectors.items():
                result["mutual_information"][answer][stage].append(channel_information(few, vector).tolist())
                result["cosine"][answer][stage].append(cosine(few, vector).tolist())
    return result


def chosen_tokens(tokens: int, seed: int, rows: int) -> list[list[int]]:
    """The visual tokens of each row for which mutual information is estimated."""
    rng = random.Random(seed)
    return [sorted(rng.sample(range(tokens), min(TOKENS, tokens))) for _ in range(rows)]


def _stages(path: VisionPath, sample: Sample, image: int, index: int, other: torch.Tensor) -> dict[str, torch.Tensor]:
    """The visual tokens (N, vision width) of one image in each stage."""
    features = sample.vision_features[image]
    no_text = torch.zeros_like(other)
    fused = [
        path.fuse(features, words) for words in (no_text, sample.instruction_tokens[index], other, sample.mean_tokens)
    ]
    return dict(zip(STAGES, (features, *fused)))


def _answers(path: VisionPath, sample: Sample, chosen: list[int], seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """The vectors (vision width,) of each chosen row's answer, by [`ANSWERS`]."""
    ids = path.instruction_ids([str(row.answer) for row in sample.rows])
    tokens = path.instruction_tokens(ids[chosen])
    end = path.processor.instruction_tokenizer.eos_token_id
    # From the start token to the end token, as far as the alignment reads them.
    real = ((ids[chosen] == end).cumsum(1) - (ids[chosen] == end).long() == 0)[:, path.first_position :]
    real = real[:, : tokens.shape[1], None].float()
    means = (tokens * real).sum(1) / real.sum(1)
    # Shifted, so that no answer stays in its place.
    order = list(range(len(chosen)))
    random.Random(seed).shuffle(order)
    partner = {row: order[(place + 1) % len(order)] for place, row in enumerate(order)}
    for row in range(len(chosen)):
        vectors = (tokens[row, 0], tokens[partner[row], 0], means[row], means[partner[row]])
        yield dict(zip(ANSWERS, vectors))


__all__ = ["channel_information", "cosine", "redundancy"]
