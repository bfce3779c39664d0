"""What a model answers when its instruction encoder reads something other than the question.

The prompt of the language model stays, and so does the image: only the instruction is replaced, or the text term of F.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..evaluation.statistics import paired_difference, share
from ..evaluation.tasks.answers import is_right
from .questions import Row, TooFewQuestionsError, other_instructions
from .vision_path import Sample, VisionPath

CONSTANT = "Describe the picture."
OFF_DOMAIN = "The committee postponed its decision about the annual budget."
OWN, SAME_KIND, OTHER_KIND, ANY_OTHER = (
    "own",
    "another question of the same kind",
    "another question of another kind",
    "another question",
)
MEAN, REMOVED = "mean text term", "text term removed"


def instructions(rows: Sequence[Row], seed: int = 0) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The instruction of each row by condition, and why a condition is left out.

    Where no row has a kind, or neither of the two that tell kinds apart can be had, `another question` stands in their
    place.
    """
    kinds: dict[str, bool | None] = {SAME_KIND: True, OTHER_KIND: False} if any(row.kind for row in rows) else {}
    conditions, left_out = {OWN: [row.instruction for row in rows]}, {}
    for name, same_kind in [*kinds.items(), (ANY_OTHER, None)]:
        if name == ANY_OTHER and len(conditions) > 1:
            continue
        try:
            conditions[name] = other_instructions(rows, seed, same_kind)
        except TooFewQuestionsError as error:
            left_out[name] = str(error)
    conditions["empty"] = [""] * len(rows)
    conditions[f"constant: {CONSTANT}"] = [CONSTANT] * len(rows)
    conditions["off-domain sentence"] = [OFF_DOMAIN] * len(rows)
    return conditions, left_out


@torch.no_grad()
def answers(
    path: VisionPath, sample: Sample, ids: torch.Tensor, max_new_tokens: int = 16, description: str | None = None
) -> list[str]:
    """The model's greedy answer to each row's question, with these instructions.

    Args:
        ids: instruction ids, (rows, instruction_length).
        description: text of the progress bar. Default: none is shown.
    """
    model, texts, start = path.model, [], 0
    for prompt in tqdm(sample.prompts, desc=description, disable=description is None):
        rows = slice(start, start + len(prompt["input_ids"]))
        start = rows.stop
        features = sample.vision_features[sample.images[rows]].to(model.dtype)
        visual = model.get_image_features(vision_features=features, instruction_input_ids=ids[rows]).pooler_output
        tokens = model.generate(**prompt, image_features=visual, max_new_tokens=max_new_tokens, do_sample=False)
        new = tokens[:, prompt["input_ids"].shape[1] :]
        texts += path.processor.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts]


def compare_instructions(
    path: VisionPath, sample: Sample, seed: int = 0, max_new_tokens: int = 16, progress: bool = False
) -> dict[str, Any]:
    """Answers under each condition, beside those with the own instruction.

    Args:
        path: of the model, in any dtype and quantization: it answers as it is.
        sample: questions, with or without answers.
        seed: seed of the other questions.
        max_new_tokens: longest answer in tokens.
        progress: whether to show progress bars.

    Returns:
        `conditions`, by name: `answers`; `changed`, the share of answers that differ from those with the own
        instruction, with its 95% interval; and where the right answers are known `accuracy`, `gain` (the paired
        difference in accuracy, own instruction less this one) and `by_kind`. `left_out`: conditions that these
        questions do not allow, and why.
    """
    texts, left_out = instructions(sample.rows, seed)
    said = {}
    for name, column in texts.items():
        ids = path.instruction_ids(column)
        said[name] = answers(path, sample, ids, max_new_tokens, f"answers ({name})" if progress else None)
    mean = sample.mean_tokens
    for name, tokens in ((MEAN, mean), (REMOVED, torch.zeros_like(mean))):
        with path.replaced_instruction(tokens):
            said[name] = answers(
                path, sample, sample.instruction_ids, max_new_tokens, f"answers ({name})" if progress else None
            )
    conditions = {name: compare(sample.rows, column, said[OWN]) for name, column in said.items()}
    return {"conditions": conditions, "left_out": left_out}


def compare(rows: Sequence[Row], said: Sequence[str], own: Sequence[str]) -> dict[str, Any]:
    """The figures of one condition; see [`compare_instructions`]."""
    figures: dict[str, Any] = {"answers": list(said), "changed": share(a != b for a, b in zip(said, own))}
    if any(row.answer is None for row in rows):
        return figures
    right, own_right = ([is_right(text, row.answer or "") for text, row in zip(column, rows)] for column in (said, own))
    figures["accuracy"] = share(right)
    figures["gain"] = paired_difference(own_right, right)
    kinds = sorted({row.kind for row in rows if row.kind})
    figures["by_kind"] = {kind: share(hit for hit, row in zip(right, rows) if row.kind == kind) for kind in kinds}
    return figures


__all__ = ["answers", "compare", "compare_instructions", "instructions"]
