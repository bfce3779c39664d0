"""An analysis from its questions to its report: the numbers, one JSON file, the figures and one HTML page."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..model.modeling_emma import EmmaForConditionalGeneration
from ..model.processing_emma import EmmaProcessor
from ..model.quantization_emma import is_quantized
from ..storage.folders import new_folder, write_json
from ..training.plots import figure_class
from .conclusions import verdict
from .contributions import effective, leave_one_out, moved_by, question_map, term_shares, weights
from .counterfactuals import compare_instructions
from .figures import draw_all
from .gates import gate_index, variance_split
from .html_page import page
from .instruction_length import cut_words, wordiness
from .mutual_information import estimator, redundancy
from .questions import Row, TooFewQuestionsError, other_instructions
from .vision_path import Sample, VisionPath, encode

# Pictures that are shown where the user names none.
EXAMPLES = 2


def analyze(
    model: EmmaForConditionalGeneration,
    processor: EmmaProcessor,
    rows: Sequence[Row],
    examples: Sequence[Row] = (),
    seed: int = 0,
    max_new_tokens: int = 16,
    progress: bool = False,
) -> dict[str, Any]:
    """What the instruction does in this model, on these questions.

    Args:
        model: as `load_model` returns it, in any dtype or quantization.
        processor: its processor.
        rows: questions about images, two different ones at least. Answers and kinds allow more figures.
        examples: questions that are shown one by one. Default: the first of `rows`.
        seed: seed of every choice of another question.
        max_new_tokens: longest answer in tokens.
        progress: whether to show progress bars.

    Returns:
        Numbers and lists alone, as the JSON file holds them: `verdict` (three sentences), `model`, `rows`, `weights`,
        `effective`, `terms`, `gates`, `variance`, `counterfactuals`, `mutual_information`, `instruction_length` and
        `examples`, each as its function describes it; a part that these questions do not allow is None, and
        `left_out` says why.

    Raises:
        TooFewQuestionsError: fewer than two different questions.
        EmmaError: a model without a modality adaptation, or an image that cannot be read; names the row.
        MissingPackageError: scikit-learn is not installed.
    """
    estimator()
    path = VisionPath(model, processor)
    examples = list(examples) or list(rows[:EXAMPLES])
    other_instructions(rows, seed)
    sample = encode(path, rows, progress=progress)
    counterfactuals = compare_instructions(path, sample, seed, max_new_tokens, progress)
    left_out = counterfactuals.pop("left_out")
    sample_tokens = sample.vision_features, sample.instruction_tokens
    result = {
        "model": _describe(path),
        "rows": [_row(row) for row in rows],
        "seed": seed,
        "weights": weights(path),
        "effective": effective(path, sample),
        "terms": _terms(path, sample),
        "gates": gate_index(path, sample, seed),
        "counterfactuals": counterfactuals,
        "variance": _if_allowed(left_out, "variance", variance_split, path, *sample_tokens),
        "mutual_information": _if_allowed(left_out, "mutual_information", redundancy, path, sample, seed, progress),
        "instruction_length": {
            "cut": _cut(path, rows),
            "wordiness": wordiness(path, sample, max_new_tokens=max_new_tokens, progress=progress),
        },
        "examples": _examples(path, examples, sample, seed, progress),
        "left_out": left_out,
    }
    plain = _plain(result)
    return {"verdict": verdict(plain), **plain}


def _examples(path: VisionPath, rows: list[Row], sample: Sample, seed: int, progress: bool) -> list[dict[str, Any]]:
    shown = sample if rows == list(sample.rows) else encode(path, rows)
    numbers = tqdm(range(len(rows)), desc="examples", disable=not progress)
    return [_example(path, shown, number, sample, seed) for number in numbers]


def _cut(path: VisionPath, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The words that are cut off, of each row that is too long."""
    cut = [(number, cut_words(path, row.instruction)) for number, row in enumerate(rows, 1)]
    return [{"row": number, "words": words} for number, words in cut if words]


def _if_allowed(left_out: dict[str, str], name: str, part: Callable[..., Any], *arguments: Any) -> Any:
    """A part of the analysis; where these questions do not allow it None, and in `left_out` the reason."""
    try:
        return part(*arguments)
    except TooFewQuestionsError as error:
        left_out[name] = str(error)
        return None


def _describe(path: VisionPath) -> dict[str, Any]:
    config = path.model.config
    return {
        "visual_tokens": len(path.visual_weight),
        "instruction_tokens": path.text_weight.shape[1],
        "instruction_length": config.instruction_length,
        "first_position": path.first_position,
        "class_token": path.has_class_token,
        "dtype": str(path.model.dtype).removeprefix("torch."),
        "quantized": is_quantized(path.model),
        "language_model": config.text_config.model_type,
    }


def _row(row: Row) -> dict[str, Any]:
    image = row.image if isinstance(row.image, str) else None
    return {"image": image, "question": row.question, "answer": row.answer, "kind": row.kind}


def _terms(path: VisionPath, sample: Sample) -> dict[str, Any]:
    shares = term_shares(path, sample)
    kinds = sorted({row.kind for row in sample.rows if row.kind})
    mean = sample.mean_tokens
    return {
        "shares": {name: {"mean": values.mean(), "sd": values.std(unbiased=False)} for name, values in shares.items()},
        "question_by_kind": {
            kind: shares["question"][[row.kind == kind for row in sample.rows]].mean() for kind in kinds
        },
        "moved_from_mean_text": moved_by(path, sample, mean).mean(),
        "moved_from_no_text": moved_by(path, sample, torch.zeros_like(mean)).mean(),
    }


def _example(path: VisionPath, shown: Sample, index: int, sample: Sample, seed: int) -> dict[str, Any]:
    row = shown.rows[index]
    features = shown.vision_features[shown.images[index]]
    other = other_instructions([row, *sample.rows], seed)[0]
    (other_tokens,) = path.instruction_tokens(path.instruction_ids([other]))
    everything = sample.instruction_tokens
    return {
        "question": row.instruction,
        "other_question": other,
        "map": question_map(path, features, shown.instruction_tokens[index], everything),
        "other_map": question_map(path, features, other_tokens, everything),
        "words": leave_one_out(path, features, row.instruction),
        "cut": cut_words(path, row.instruction),
    }


def _plain(value: Any) -> Any:
    """The same with numbers and lists in place of tensors, and None in place of what is not a number."""
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def write_report(result: dict[str, Any], images: Sequence[Any], output: str | Path) -> Path:
    """Write `analysis.json`, the figures as PNG, and `report.html`, which needs no other file.

    Args:
        result: of [`analyze`].
        images: the image of each of its examples, as PIL images.
        output: folder that does not exist yet.

    Raises:
        EmmaError: `output` exists.
        MissingPackageError: matplotlib is not installed.
    """
    figure_class("analysis")
    with new_folder(output) as folder:
        write_json(folder / "analysis.json", result)
        files = draw_all(result, images, folder)
        (folder / "report.html").write_text(page(result, files), encoding="utf-8")
    return Path(output)


__all__ = ["analyze", "write_report"]
