"""What becomes of a long instruction: the 77 tokens that the alignment reads end it, and words before it move it."""

from collections.abc import Sequence
from typing import Any

import torch

from ..evaluation.statistics import share
from ..evaluation.tasks.answers import is_right
from ..model.instruction_emma import encode_instruction
from .counterfactuals import answers
from .vision_path import Sample, VisionPath

# Words that say nothing about any image.
FILLER = "please look at the picture and then tell me "
# Tokens before the question, around the end of CLIP's 77.
WORDINESS = (0, 20, 40, 60, 67, 100)
# No instruction is read further than this to find what is cut.
LONGEST = 4096


def cut_words(path: VisionPath, instruction: str) -> str:
    """The end of an instruction that is cut off, as its tokens say it; empty where it is read to its end."""
    tokenizer, length = path.processor.instruction_tokenizer, path.model.config.instruction_length
    return tokenizer.decode(_ids(path, instruction)[length - 2 :]).strip()


def wordy(path: VisionPath, instruction: str, tokens: int) -> str:
    """The instruction with so many tokens of filler before it."""
    words: list[str] = []
    while tokens > 0:
        word = FILLER.split()[len(words) % len(FILLER.split())]
        tokens -= len(_ids(path, word))
        words.append(word)
    return " ".join([*words, instruction])


def _ids(path: VisionPath, text: str) -> list[int]:
    """Ids of a text without start, end and padding."""
    tokenizer = path.processor.instruction_tokenizer
    ids = encode_instruction(tokenizer, text, LONGEST)
    return ids[1 : len(ids) - 1 - ids[::-1].index(tokenizer.eos_token_id)]


def wordiness(
    path: VisionPath,
    sample: Sample,
    levels: Sequence[int] = WORDINESS,
    max_new_tokens: int = 16,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """The text term and the answers as filler before the question grows; the language model's prompt stays.

    Args:
        levels: tokens of filler.

    Returns:
        For each level: `filler` (tokens); `text` (|Wt P| beside |F|, mean over the questions); `moved` (|Wt P - Wt P
        without filler| beside |F|); `cut` (share of the questions' own tokens that are cut off); and where the answers
        are known `accuracy`.
    """
    lengths = [len(_ids(path, row.instruction)) for row in sample.rows]
    kept = path.model.config.instruction_length - 2
    result = []
    for level in levels:
        texts = [wordy(path, row.instruction, level) for row in sample.rows]
        ids = path.instruction_ids(texts)
        cut = [min(length, max(0, len(_ids(path, text)) - kept)) for text, length in zip(texts, lengths)]
        figures = {"filler": level, "cut": sum(cut) / max(1, sum(lengths)), **_text_terms(path, sample, ids)}
        if sample.has_answers:
            description = f"answers ({level} tokens of filler)" if progress else None
            said = answers(path, sample, ids, max_new_tokens, description)
            figures["accuracy"] = share(is_right(text, row.answer or "") for text, row in zip(said, sample.rows))
        result.append(figures)
    return result


def _text_terms(path: VisionPath, sample: Sample, ids: torch.Tensor) -> dict[str, float]:
    text, moved = [], []
    for index, words in enumerate(path.instruction_tokens(ids)):
        norm = path.fuse(sample.vision_features[int(sample.images[index])], words).norm()
        term = path.text_term(words)
        text.append(term.norm() / norm)
        moved.append((term - path.text_term(sample.instruction_tokens[index])).norm() / norm)
    return {"text": float(torch.stack(text).mean()), "moved": float(torch.stack(moved).mean())}


__all__ = ["cut_words", "wordiness", "wordy"]
