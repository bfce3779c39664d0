"""A model as a complete Hub repository: written to a folder, and from there to the Hub."""

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from .. import EMMA_TINY
from ..conversion.converter import generation_config
from ..inference import answer, load_model
from ..model.code_files_emma import AUTO_MAP, copy_code_files
from ..model.configuration_emma import EmmaConfig
from ..model.errors_emma import EmmaError
from ..model.processing_emma import EmmaProcessor
from ..storage.folders import new_folder, read_json, write_json
from ..storage.hub_access import hub_errors, resolve
from ..storage.tensors import parse_size, read_checkpoint, write_shards
from .model_card import CARD_NAME, TEMPLATE, check_card, render_card
from .verification import (
    INDEX_NAME,
    MANIFEST_NAME,
    REQUIRED_FILES,
    WEIGHTS_NAME,
    files_of,
    is_own_file,
    is_remote_file,
    manifest_of,
    read_manifest,
    sha256_of,
    size_of,
)

WEIGHT_SUFFIXES = (".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors")
SOURCE_FILES = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt", "*.md", "*.png", "*.jpg"]
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
) -> Path:
    """Write the complete Hub repository of a model: weights, code, processor, card, endpoint, and a manifest of it all.

    Weight files are copied, or written anew tensor by tensor; no model is loaded but to answer `examples`.

    Args:
        model: folder or Hub id of a model of this package, or `emma-tiny` for the one that ships.
        folder: folder to write; it must not exist. It appears when it is complete, or not at all.
        repo_id: name on the Hub (`org/name`), for the card. Default: the name of `folder`.
        examples: images (paths) with a question each, which the model answers for the card's widget. Default: those
            of the model's own card.
        evaluation: `evaluation.json` of `emma-hf tiny evaluate`, for the card's figures. Default: the one beside the
            weights, if there is one.
        max_shard_size: largest weight file, in bytes or like `"5GB"`. Default: the files are copied as they are.
        link: hard links to weight files in place of copies, where the file system has them; whoever changes one file
            then changes the other.

    Raises:
        EmmaError: not a model of this package, damaged weights, a link to outside the folder, a `folder` that exists.
        FileNotFoundError: a folder, or a file in it, that is not there.
    """
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    folder = Path(folder)
    with new_folder(folder) as target:
        source, cache = _source(model)
        config = _config(source)
        _write_weights(source, target, cache, limit, link)
        copy_code_files(target)
        write_json(target / "config.json", {**read_json(source / "config.json"), "auto_map": AUTO_MAP})
        _processor(source).save_pretrained(target)
        _write_generation_config(source, target, config)
        if (source / "tokenizer.model").is_file():
            _copy(source, "tokenizer.model", target, cache)
        for name in ENDPOINT_FILES:
            shutil.copyfile(TEMPLATE / name, target / name)
        answered = _answered(examples, target)
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


def push(
    model: str | Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    force: bool = False,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a model's complete Hub repository in one commit, which happens as a whole or not at all.

    What the Hub already holds is not sent again. So a push that broke off goes on where it stopped when it is started
    once more: by file, or with Xet by part of a file.

    Args:
        model: a folder of [`export`], or a folder or Hub id of a model, which is exported first.
        repo_id: `org/name`; it is created if it does not exist.
        private: create it as private. One that exists is not changed.
        revision: branch to push to; it must exist. Default: the main branch.
        force: replace another model, with all of its files; its history keeps them.
        message: of the commit.
        token: one that may write. Default: the one of the environment.

    Returns:
        Address of the commit.

    Raises:
        EmmaError: no token, no right, no network, an upload that broke off, a repository that holds another model,
            a folder that is not as it was exported or that holds links.
        FileNotFoundError: no such model or revision.
    """
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise EmmaError(f"A repository is named like org/name: got {repo_id!r}.")
    token = token or get_token()
    if not token:
        raise EmmaError(
            f"Writing to {repo_id} needs a token: found none. Set HF_TOKEN to one with write access, or log in with "
            "`hf auth login`."
        )
    source = Path(model)
    if source.is_dir() and read_manifest(source) is not None:
        return _push(source, repo_id, private, revision, force, message, token)
    # Beside the model, so that its weights need not be copied.
    beside = source.parent if source.is_dir() and os.access(source.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".emma-push-", dir=beside) as place:
        folder = export(model, Path(place) / repo_id.split("/")[1], repo_id, link=True)
        return _push(folder, repo_id, private, revision, force, message, token)


def _source(model: str | Path) -> tuple[Path, Path | None]:
    """Folder of a model, and of the cache that its links may lead to."""
    ships = str(model) == EMMA_TINY.name and not Path(model).is_dir()
    folder = EMMA_TINY if ships else resolve(model, SOURCE_FILES)
    # A snapshot in the cache of the Hub's library is made of links to its blobs.
    blobs = folder.resolve().parents[1] / "blobs" if folder.resolve().parent.name == "snapshots" else None
    return folder, blobs


def _config(source: Path) -> EmmaConfig:
    path = source / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{source} lacks config.json. Name the folder of a model.")
    values = read_json(path)
    if values.get("model_type") != EmmaConfig.model_type:
        raise EmmaError(
            f"Only models of this package (model_type 'emma') are exported: {source} has {values.get('model_type')!r}. "
            "`emma-hf convert` turns the authors' checkpoint into one."
        )
    return EmmaConfig.from_pretrained(source)


def _processor(source: Path) -> EmmaProcessor:
    missing = [name for name in ("tokenizer_config.json", "preprocessor_config.json") if not (source / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{source} lacks {' and '.join(missing)}. Save the processor beside the weights: "
            "`processor.save_pretrained(folder)`."
        )
    return EmmaProcessor.from_pretrained(source)


def _write_weights(source: Path, target: Path, cache: Path | None, limit: int | None, link: bool) -> None:
    # Their headers are read: a shard that is missing or truncated ends the export before anything large is copied.
    if not (source / WEIGHTS_NAME).is_file() and not (source / INDEX_NAME).is_file():
        raise FileNotFoundError(
            f"{source} holds no weights in safetensors: expected {WEIGHTS_NAME} or {INDEX_NAME}. Save the whole model "
            "with `save_pretrained`; an adapter is merged first."
        )
    tensors = read_checkpoint(source)
    if limit is not None:
        write_shards(target, tensors, limit, progress=sys.stderr.isatty())
        return
    names = [WEIGHTS_NAME]
    if (source / INDEX_NAME).is_file():
        index = read_json(source / INDEX_NAME)
        names = [INDEX_NAME, *sorted(set(index["weight_map"].values()))]
    for name in names:
        _copy(source, name, target, cache, link)


def _copy(source: Path, name: str, target: Path, cache: Path | None, link: bool = False) -> None:
    """Copy a file that the folder itself holds, or that lies in the cache of the Hub's library."""
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
            # Another file system, or one that knows no hard links.
            pass
    shutil.copyfile(path, target / name)


def _write_generation_config(source: Path, target: Path, config: EmmaConfig) -> None:
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", target / "generation_config.json")
    else:
        generation_config(config).save_pretrained(target)


def _answered(examples: Sequence[tuple[str | Path, str]], target: Path) -> list[tuple[str, str, str]]:
    """Name of the picture in the repository, question, and the answer of the model in `target`."""
    if not examples:
        return []
    # From the very files that are exported.
    model, processor = load_model(target)
    found = []
    for number, (picture, question) in enumerate(examples, 1):
        path = Path(picture)
        if not path.is_file():
            raise FileNotFoundError(f"The example picture {path} is not there. Check its path.")
        name = f"widget/{number}-{path.name}"
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
        conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = answer(model, processor, [conversation], [[path]], max_new_tokens=256)[0]
        found.append((name, question, text))
    return found


def _push(
    folder: Path, repo_id: str, private: bool, revision: str | None, force: bool, message: str | None, token: str
) -> str:
    hashes = _verified(folder)
    api = HfApi(token=token)
    with hub_errors(repo_id, revision, "write"):
        info = _repository(api, repo_id, private, revision)
        remote = {file.rfilename: file for file in info.siblings or ()}
        foreign = _other_weights(folder, hashes, remote)
        if foreign and not force:
            raise EmmaError(
                f"{repo_id} holds another model: it has {', '.join(foreign[:3])} of other contents than "
                f"{folder}. Push to another name or `--revision`, or replace it with `--force`; its history keeps it."
            )
        changed = [
            name
            for name, sha256 in hashes.items()
            if name not in remote or not is_remote_file(folder / name, remote[name], sha256)
        ]
        stale = _stale(repo_id, info.sha, remote, hashes, token, everything=bool(foreign))
        if not changed and not stale:
            return f"{api.endpoint}/{repo_id}/commit/{info.sha}"
        operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in stale]
        operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in changed]
        try:
            commit = api.create_commit(
                repo_id,
                operations,
                commit_message=message or f"Upload {repo_id.split('/')[1]}",
                revision=revision,
                parent_commit=info.sha,
            )
        # So the Hub's library reports a file that did not arrive.
        except RuntimeError as error:
            raise EmmaError(_broken_off(repo_id, error)) from error
        after = api.model_info(repo_id, revision=commit.oid, files_metadata=True)
        arrived = {file.rfilename: file for file in after.siblings or ()}
        wrong = [
            name
            for name, sha256 in hashes.items()
            if name not in arrived or not is_remote_file(folder / name, arrived[name], sha256)
        ]
    if wrong:
        raise EmmaError(f"{repo_id} does not hold what was sent: {', '.join(wrong[:3])}. Run the command again.")
    return str(commit.commit_url)


def _verified(folder: Path) -> dict[str, str]:
    """Sha256 of every file to upload, after each was seen to be the folder's own and as it was exported."""
    listed = read_manifest(folder) or {}
    hashes = {}
    for name in [*listed, MANIFEST_NAME]:
        path = folder / name
        if not path.exists():
            raise EmmaError(f"{folder} lacks {name}, which its manifest lists. Export the model again.")
        if not is_own_file(path, folder):
            raise EmmaError(
                f"Nothing outside the folder is uploaded: {path} is a link to {path.resolve()}. Export the model again."
            )
        hashes[name] = sha256_of(path)
        if name != MANIFEST_NAME and (size_of(path), hashes[name]) != (listed[name]["size"], listed[name]["sha256"]):
            raise EmmaError(
                f"A folder is uploaded as it was exported: {path} was changed since. Take the change in with "
                f"`emma-hf export {folder} NEW_FOLDER`."
            )
    lacking = sorted(set(REQUIRED_FILES) - set(hashes))
    if lacking:
        raise EmmaError(
            f"{folder} is not a complete repository: its manifest lacks {', '.join(lacking)}. Export again."
        )
    return hashes


def _repository(api: HfApi, repo_id: str, private: bool, revision: str | None) -> Any:
    """What the Hub says of a repository, which is created if there is none."""
    try:
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    except RepositoryNotFoundError:
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code in (401, 403):
                raise EmmaError(
                    f"The token has no right to create or see {repo_id} ({error.response.status_code}). Set HF_TOKEN "
                    "to one that may write there, or check the name."
                ) from error
            raise
        return api.model_info(repo_id, revision=revision, files_metadata=True)
    if private and not info.private:
        raise EmmaError(
            f"`--private` is for a repository that is created now: {repo_id} exists and is public. Make it private on "
            "its settings page first, or leave the option out."
        )
    return info


def _other_weights(folder: Path, hashes: dict[str, str], remote: dict[str, Any]) -> list[str]:
    """Names of weight files on the Hub that are not the folder's."""
    own = set(hashes.values())

    def is_own(name: str) -> bool:
        file = remote[name]
        if file.lfs is not None:
            return file.lfs.sha256 in own
        return name in hashes and is_remote_file(folder / name, file, hashes[name])

    return sorted(name for name in remote if name.endswith(WEIGHT_SUFFIXES) and not is_own(name))


def _stale(
    repo_id: str, commit: str, remote: dict[str, Any], hashes: dict[str, str], token: str, everything: bool
) -> list[str]:
    """Files to delete: those of an earlier export that this one has not, or all that belong to another model."""
    others = {name for name in remote if name not in hashes and name != ".gitattributes"}
    if not everything and MANIFEST_NAME in remote:
        path = hf_hub_download(repo_id, MANIFEST_NAME, revision=commit, token=token)
        try:
            others &= set(read_manifest(Path(path).parent) or ())
        except ValueError:
            others = set()
    elif not everything:
        others = set()
    return sorted(others)


def _broken_off(repo_id: str, error: BaseException) -> str:
    reason = " ".join(f"{error} {error.__cause__ or ''}".split())[:300]
    return (
        f"The upload to {repo_id} broke off ({reason}). Nothing was committed: the repository is as it was. Run the "
        "command again; files that arrived are not sent twice."
    )
