"""What in a folder would make Transformers run code that is not this package's, under `trust_remote_code=True`."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..model.code_files_emma import AUTO_MAP, HUB_FILES
from .manifest import sha256_of
from .model_card import TEMPLATE

# Keys by which a JSON file makes Transformers load code or another model, with that model's code.
_REDIRECTING_KEYS = ("audio_tokenizer_name_or_path", "base_model_name_or_path", "custom_pipelines")
_KERNEL_KEYS = ("_attn_implementation", "attn_implementation")
# Transformers 4.57 takes this from the file unchecked (CVE-2026-4372).
_INTERNAL_KERNEL_KEY = "_attn_implementation_internal"


def python_files(folder: Path) -> dict[str, str]:
    """Name to SHA-256 of every Python file under a folder; hidden folders, caches and links are no exception."""
    names = [name for name in _all_files(folder) if name.lower().endswith(".py")]
    return {name: sha256_of(folder / name) if (folder / name).is_file() else "" for name in names}


def is_packaged_code(name: str, sha256: str) -> bool:
    """Whether a Python file of a repository is the one that this version of the package writes there."""
    own = Path(__file__).parents[1] / "model" / name if name in HUB_FILES else TEMPLATE / "handler.py"
    return name in (*HUB_FILES, "handler.py") and sha256 == sha256_of(own)


def find_untrusted_code(folder: Path) -> list[str]:
    """Files and settings that run other code than this package's, as noun phrases; empty if there is none.

    These are Python files that the package did not write, `auto_map` entries that name other classes than the
    package's, settings that load another model or an attention kernel of the Hub, JSON files that cannot be read, and
    linked folders, into which nobody has looked.
    """
    phrases = [name for name, sha256 in python_files(folder).items() if not is_packaged_code(name, sha256)]
    for name in _all_files(folder):
        if name.lower().endswith(".json"):
            phrases += [f"{setting} in {name}" for setting in _untrusted_settings(folder / name)]
    return phrases + [f"the linked folder {name}" for name in _linked_folders(folder)]


def kernel_settings(values: Any) -> list[str]:
    """The settings of a config that load an attention kernel from the Hub, in it and in the configs inside it."""
    return [
        f"`{key}` {value!r}"
        for key, value in _items(values)
        if key == _INTERNAL_KERNEL_KEY or (key in _KERNEL_KEYS and "/" in json.dumps(value))
    ]


def _untrusted_settings(path: Path) -> list[str]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ["unreadable settings"]
    settings = kernel_settings(values)
    for key, value in _items(values):
        if key == "auto_map":
            # Older tokenizers have a list here.
            entries = value.items() if isinstance(value, dict) else [("", value)]
            settings += [f"`auto_map` {entry!r}" for auto, entry in entries if AUTO_MAP.get(auto) != entry]
        elif key in _REDIRECTING_KEYS:
            settings.append(f"`{key}` {value!r}")
    return settings


def _items(values: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, of a JSON value and of all that is inside it."""
    pending = [values]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield from value.items()
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _all_files(folder: Path) -> list[str]:
    return sorted(
        (Path(place) / name).relative_to(folder).as_posix() for place, _, names in os.walk(folder) for name in names
    )


def _linked_folders(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for place, names, _ in os.walk(folder)
        for path in (Path(place) / name for name in names)
        if path.is_symlink()
    )
