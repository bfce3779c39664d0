"""`README.md` of a Hub repository: from the model's own card, or from the template, with its YAML filled in."""

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..model.configuration_emma import EmmaConfig
from ..model.errors_emma import EmmaError

CARD_NAME, EVALUATION_NAME = "README.md", "evaluation.json"
# Files for every repository, under the names that they have there. Its card serves models without one of their own.
TEMPLATE = Path(__file__).parent / "template"
# Repository name in the examples of a card, and the parts of the template that hold for the released weights alone.
PLACEHOLDER = re.compile(r"\borg/emma-(7b|tiny)\b")
RELEASED_BLOCK = re.compile(r"<!-- released -->\n(.*?)<!-- end -->\n", re.DOTALL)
RELEASED_KEYS = ("base_model", "datasets", "license", "license_link", "license_name", "eval_results", "model_name")
DEFAULTS: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "language": ["en"]}
TAGS = ("emma", "multimodal", "vision-language")


def render_card(
    source: Path,
    config: EmmaConfig,
    name: str,
    evaluation: Path | None = None,
    examples: Sequence[tuple[str, str, str]] = (),
) -> tuple[ModelCard, dict[str, Path]]:
    """The card of a model, and the files that it shows.

    Args:
        source: folder of the model. Its own `README.md` is the card, if there is one.
        config: config of the model; the template says less about a model of another shape than the released one.
        name: name of the model; a Hub id (`org/name`) also replaces the placeholder in the card's examples.
        evaluation: `evaluation.json` of `emma-hf tiny evaluate`, for the `model-index`. Default: the one in `source`,
            if there is one.
        examples: rows of the widget: name of an image in the repository, question, and the model's answer.

    Returns:
        The card, and the files that it links to: name in the repository to file.

    Raises:
        EmmaError: a card whose YAML cannot be read, or an `evaluation` of another form.
    """
    if (source / CARD_NAME).is_file():
        folder, card = source, read_card(source / CARD_NAME)
    else:
        folder, card = TEMPLATE, _template_card(config, name.split("/")[-1])
    if evaluation is None and (source / EVALUATION_NAME).is_file():
        evaluation = source / EVALUATION_NAME
    if name.count("/") == 1:
        card.text = PLACEHOLDER.sub(name, card.text)

    data = card.data
    for key, value in DEFAULTS.items():
        if data.get(key) is None:
            data[key] = value
    data["tags"] = list(dict.fromkeys([*(data.get("tags") or ()), *TAGS]))
    if data.get("model_name") is None and (evaluation is not None or data.get("eval_results")):
        data["model_name"] = name.split("/")[-1]
    if evaluation is not None:
        data["eval_results"] = read_evaluation(evaluation)
    if examples:
        data["widget"] = [
            {"src": image, "text": question, "output": {"text": answer}} for image, question, answer in examples
        ]
    # The images of `examples` lie in the repository already.
    own_images = {image for image, _, _ in examples}
    return card, {link: path for link, path in _linked_files(card, folder).items() if link not in own_images}


def is_released_shape(config: EmmaConfig) -> bool:
    """Whether a model has the released model's towers and language model, so that the released model's card fits."""
    released = EmmaConfig()
    parts = {
        "vision_config": ("hidden_size", "num_hidden_layers", "image_size", "patch_size"),
        "instruction_config": ("hidden_size", "num_hidden_layers", "vocab_size"),
        "text_config": ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"),
    }
    return all(
        getattr(getattr(config, part), key) == getattr(getattr(released, part), key)
        for part, keys in parts.items()
        for key in keys
    )


def read_evaluation(path: Path) -> list[EvalResult]:
    """The figures that `emma-hf tiny evaluate` measured, in the form of the Hub's `model-index`.

    Raises:
        FileNotFoundError: no such file.
        EmmaError: a file of another form than that command writes.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        shares = [("accuracy", group, count["share"]) for group, count in result["accuracy"].items()]
        shares.append(("f1", "yes/no", result["yes_no"]["f1"]))
        shares += [("rate", group, count["share"]) for group, count in result.get("captions", {}).items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EmmaError(
            f"An evaluation must be the evaluation.json that `emma-hf tiny evaluate --output` writes: {path} is not "
            f"({error!r}). Name another file, or rename this one where it lies beside the weights."
        ) from error
    return [
        EvalResult(
            task_type="image-text-to-text",
            task_name="Captions of drawn scenes" if kind == "rate" else "Questions about drawn scenes",
            dataset_type="emma-hf-scenes",
            dataset_name="Fresh scenes of emma_hf.tiny.scenes",
            dataset_config=group,
            metric_type=kind,
            metric_name=f"{kind}, {group}",
            metric_value=round(value, 4),
        )
        for kind, group, value in shares
    ]


def check_card(card: ModelCard) -> None:
    """Check a card as far as the Hub's library can without the Hub.

    Raises:
        EmmaError: the YAML does not survive being written and read.
        ValueError: of the Hub's library: incomplete results.
    """
    if _parse_card(str(card), Path(CARD_NAME)).data.to_dict() != card.data.to_dict():
        raise EmmaError("The YAML of README.md does not survive being written and read again.")
    if card.data.get("eval_results"):
        eval_results_to_model_index(card.data["model_name"], card.data["eval_results"])


def _template_card(config: EmmaConfig, title: str) -> ModelCard:
    path = TEMPLATE / "MODEL_CARD.md"
    released = is_released_shape(config)
    card = _parse_card(RELEASED_BLOCK.sub(r"\1" if released else "", path.read_text(encoding="utf-8")), path)
    if not released:
        for key in RELEASED_KEYS:
            card.data[key] = None
        card.text = re.sub(r"^# .*$", f"# {title}", card.text, count=1, flags=re.MULTILINE)
    return card


def read_card(path: Path) -> ModelCard:
    """Read a card.

    Raises:
        EmmaError: it is not UTF-8, or its YAML cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EmmaError(f"{path} must be text in UTF-8: {error}.") from error
    return _parse_card(text, path)


def _parse_card(text: str, path: Path) -> ModelCard:
    try:
        return ModelCard(text)
    # The YAML parser raises errors of its own, the card plain ones.
    except Exception as error:
        raise EmmaError(
            f"The head of {path} must be YAML that the Hub reads: {' '.join(str(error).split())}."
        ) from error


def _linked_files(card: ModelCard, folder: Path) -> dict[str, Path]:
    """Name to path of the files in a card's folder that its links and its widget name."""
    links = re.findall(r"\]\(\s*<?([^)>\s#]+)", card.text) + re.findall(r'src="([^"]+)"', card.text)
    links += [str(example.get("src", "")) for example in card.data.get("widget") or () if isinstance(example, dict)]
    files = {}
    for link in links:
        parts = PurePosixPath(link).parts
        path = folder / link
        if ":" in link or link in ("", CARD_NAME) or link.startswith("/") or ".." in parts or not path.is_file():
            continue
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg", ".md", ".txt"):
            files[PurePosixPath(link).as_posix()] = path
    return files
