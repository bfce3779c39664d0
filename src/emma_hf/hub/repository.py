"""A model's complete Hub repository, written to a folder."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..inference import answer, load_model
from ..model.code_files_emma import AUTO_MAP, copy_code_files
from ..model.configuration_emma import EmmaConfig
from ..model.errors_emma import EmmaError
from ..model.modeling_emma import default_generation_config
from ..model.processing_emma import EmmaProcessor
from ..storage.folders import new_folder, read_json, write_json
from ..storage.hub_access import resolve
from ..storage.tensors import parse_size, read_checkpoint, write_shards
from .manifest import MANIFEST_NAME, REQUIRED_FILES, files_of, is_own_file, manifest_of
from .model_card import CARD_NAME, TEMPLATE, check_card, render_card

SOURCE_FILES = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt", "*.md", "*.png", "*.jpg"]
ADAPTER_NAME = "adapter_config.json"
# For Inference Endpoints, which bring torch and install the rest of what handler.py and the code files need.
ENDPOINT_FILES = ("handler.py", "requirements.txt")


def export(
    model: str | Path,
    folder: str | Path,
    repo_id: str | None = None,
    examples: Sequence[tuple[str | Path, str]] = (),
    evaluation: str | Path | None = None,
    max_shard_size: int | str | None = None,
    link: bool = False,
    visual_tokens: int | None = None,
) -> Path:
    """Write the complete Hub repository of a model: weights, code, processor, card, endpoint, and a manifest of it all.

    Weight files are copied, or written anew tensor by tensor; the model is loaded only to answer `examples`.

    Args:
        model: folder or Hub id of a model of this package, or `emma-tiny` for the packaged one.
        folder: folder to write; it must not exist. It appears when it is complete, or not at all.
        repo_id: name on the Hub (`org/name`), for the card. Default: the name of `folder`.
        examples: images (paths) with a question each, which the model answers for the card's widget. Default: those
            of the model's own card.
        evaluation: `evaluation.json` of `emma-hf tiny evaluate`, for the card's figures. Default: the one beside the
            weights, if there is one.
        max_shard_size: largest weight file, in bytes or like `"5GB"`. Default: the files are copied as they are.
        link: hard links to weight files in place of copies, where the file system has them; a change of one file
            then changes the other.
        visual_tokens: visual tokens that config and processor keep of each image. Default: as those of `model` say.

    Raises:
        EmmaError: not a model of this package, damaged weights, a link to outside the folder, a `folder` that exists,
            `visual_tokens` that the vision tower does not give.
        FileNotFoundError: a folder, or a file in it, that is not there.
    """
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    tokens = {} if visual_tokens is None else {"visual_tokens": visual_tokens}
    folder = Path(folder)
    with new_folder(folder) as target:
        source, cache = _resolve_model(model)
        config = _load_config(source, **tokens)
        _write_weights(source, target, cache, limit, link)
        copy_code_files(target)
        values = {**tokens, "image_seq_length": config.image_seq_length, "auto_map": AUTO_MAP}
        write_json(target / "config.json", {**read_json(source / "config.json"), **values})
        _load_processor(source, **tokens).save_pretrained(target)
        _write_generation_config(source, target, config)
        if (source / "tokenizer.model").is_file():
            _copy(source, "tokenizer.model", target, cache)
        for name in ENDPOINT_FILES:
            shutil.copyfile(TEMPLATE / name, target / name)
        answered = _answer_examples(examples, target)
        card, linked = render_card(
            source, config, repo_id or folder.name, None if evaluation is None else Path(evaluation), answered
        )
        for name, path in linked.items():
            if path == source / name:
                _copy(source, name, target, cache)
            else:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / name)
        check_card(card)
        card.save(target / CARD_NAME)
        missing = sorted(set(REQUIRED_FILES) - set(files_of(target)))
        if missing:
            raise EmmaError(f"{model} gives no complete repository: {', '.join(missing)} could not be written.")
        write_json(target / MANIFEST_NAME, manifest_of(target))
    return folder


def _resolve_model(model: str | Path) -> tuple[Path, Path | None]:
    """Folder of a model, and the cache folder that its links may lead to."""
    folder = resolve(model, SOURCE_FILES)
    # A snapshot in the cache of the Hub's library consists of links to its blobs.
    blobs = folder.resolve().parents[1] / "blobs" if folder.resolve().parent.name == "snapshots" else None
    return folder, blobs


def _load_config(source: Path, **options: Any) -> EmmaConfig:
    if (source / ADAPTER_NAME).is_file():
        merged = source / "merged"
        remedy = f"Export {merged}" if merged.is_dir() else "Merge it with `merge_and_unload` and save that"
        raise EmmaError(
            f"A complete model is exported: {source} holds an adapter ({ADAPTER_NAME}). {remedy}; `emma-hf train "
            "--stage lora` writes the merged model to `merged` in its output folder."
        )
    path = source / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{source} lacks config.json. Name the folder of a model.")
    values = read_json(path)
    if values.get("model_type") != EmmaConfig.model_type:
        raise EmmaError(
            f"Only models of this package (model_type 'emma') are exported: {source} has {values.get('model_type')!r}. "
            "`emma-hf convert` turns the authors' checkpoint into one."
        )
    return EmmaConfig.from_pretrained(source, **options)


def _load_processor(source: Path, **options: Any) -> EmmaProcessor:
    missing = [name for name in ("tokenizer_config.json", "preprocessor_config.json") if not (source / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{source} lacks {' and '.join(missing)}. Save the processor beside the weights: "
            "`processor.save_pretrained(folder)`."
        )
    return EmmaProcessor.from_pretrained(source, **options)


def _write_weights(source: Path, target: Path, cache: Path | None, limit: int | None, link: bool) -> None:
    # Reading the headers first ends the export at a missing or truncated shard before anything large is copied.
    if not (source / SAFE_WEIGHTS_NAME).is_file() and not (source / SAFE_WEIGHTS_INDEX_NAME).is_file():
        raise FileNotFoundError(
            f"{source} holds no weights in safetensors: expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}. "
            "Save the complete model with `save_pretrained`."
        )
    tensors = read_checkpoint(source)
    if limit is not None:
        write_shards(target, tensors, limit, progress=sys.stderr.isatty())
        return
    names = [SAFE_WEIGHTS_NAME]
    if (source / SAFE_WEIGHTS_INDEX_NAME).is_file():
        index = read_json(source / SAFE_WEIGHTS_INDEX_NAME)
        names = [SAFE_WEIGHTS_INDEX_NAME, *sorted(set(index["weight_map"].values()))]
    for name in names:
        _copy(source, name, target, cache, link)


def _copy(source: Path, name: str, target: Path, cache: Path | None, link: bool = False) -> None:
    """Copy a file that lies in the folder itself or in the cache of the Hub's library."""
    path = (source / name).resolve()
    if not is_own_file(source / name, source) and (cache is None or path.parent != cache.resolve()):
        raise EmmaError(
            f"A model is exported from its own files: {source / name} is a link to {path}. Put the file itself there."
        )
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(path, target / name)
            return
        except OSError:
            # Another file system, or one without hard links.
            pass
    shutil.copyfile(path, target / name)


def _write_generation_config(source: Path, target: Path, config: EmmaConfig) -> None:
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", target / "generation_config.json")
    else:
        default_generation_config(config).save_pretrained(target)


def _answer_examples(examples: Sequence[tuple[str | Path, str]], target: Path) -> list[tuple[str, str, str]]:
    """Name of the image in the repository, question, and the answer of the model in `target`."""
    if not examples:
        return []
    # The exported files themselves answer.
    model, processor = load_model(target)
    rows = []
    for number, (image, question) in enumerate(examples, 1):
        path = Path(image)
        if not path.is_file():
            raise FileNotFoundError(f"The example image {path} is not there. Check its path.")
        name = f"widget/{number}-{path.name}"
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
        conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = answer(model, processor, [conversation], [[path]], max_new_tokens=256)[0]
        rows.append((name, question, text))
    return rows
