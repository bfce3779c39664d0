"""The files of a Hub repository: which there must be, their sizes and hashes, and the manifest that lists them."""

import os
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub.utils.sha import git_hash, sha_fileobj

from .. import __version__
from ..model.code_files_emma import HUB_FILES
from ..model.errors_emma import EmmaError
from ..storage.folders import read_json

MANIFEST_NAME = "manifest.json"
# What a repository must hold besides the weights; Transformers 4.57 saves more of the tokenizers than 5 does.
REQUIRED_FILES = (
    *HUB_FILES,
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "handler.py",
    "instruction_tokenizer/config.json",
    "instruction_tokenizer/tokenizer.json",
    "instruction_tokenizer/tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "requirements.txt",
    "tokenizer.json",
    "tokenizer_config.json",
)


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a folder: version of the package, and size and SHA-256 of every file but itself."""
    names = [name for name in files_of(folder) if name != MANIFEST_NAME]
    files = {name: {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}
    return {"format": 1, "emma_hf": __version__, "files": files}


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Name to size and SHA-256 of the files that a folder's manifest lists; None where there is no manifest.

    Raises:
        EmmaError: a manifest that is damaged or names a file outside the folder.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        files = read_json(path)["files"]
        entries = {str(name): {"size": int(one["size"]), "sha256": str(one["sha256"])} for name, one in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EmmaError(f"{path} is not a manifest of this package ({error!r}). Export the model again.") from error
    for name in entries:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\\" in name:
            raise EmmaError(f"A manifest must name files of its own folder: {path} names {name!r}.")
    return entries


def files_of(folder: Path) -> list[str]:
    """Names of all files in a folder, with `/`, sorted, without hidden files, caches and linked folders."""
    names: list[str] = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        relative = Path(place).relative_to(folder)
        names += [(relative / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, by which the Hub's large file storage knows it."""
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def is_own_file(path: Path, folder: Path) -> bool:
    """Whether `path` is a file, and neither it nor a folder on its way from `folder` is a link."""
    # Not the other way round: a link to itself cannot be resolved.
    return path.is_file() and path.resolve() == folder.resolve() / path.relative_to(folder)


def is_remote_file(path: Path, remote: Any, sha256: str) -> bool:
    """Whether a local file has the contents of a file on the Hub, by the hash that the Hub itself reports.

    Args:
        path: the local file.
        remote: an entry of `model_info(files_metadata=True).siblings`, or None for a file that is not there.
        sha256: hash of the local file.
    """
    if remote is None:
        return False
    if remote.lfs is not None:
        return sha256 == remote.lfs.sha256
    return git_hash(path.read_bytes()) == remote.blob_id
