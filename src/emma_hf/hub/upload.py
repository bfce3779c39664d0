"""A model's complete Hub repository, uploaded in one commit."""

import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from ..model.errors_emma import EmmaError, HubError
from ..storage.folders import temporary_folder
from ..storage.hub_access import hub_errors
from .manifest import MANIFEST_NAME, REQUIRED_FILES, is_own_file, is_remote_file, read_manifest
from .repository import export

WEIGHT_SUFFIXES = (".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors")


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

    Contents that the Hub already holds are not sent again. An interrupted push therefore continues where it stopped
    when it is started once more: by file, or with Xet by part of a file.

    Args:
        model: a folder of [`export`], or a folder or Hub id of a model, which is exported first.
        repo_id: `org/name`; it is created if it does not exist.
        private: create it as private. One that exists is not changed.
        revision: branch to push to; it must exist. Default: the main branch.
        force: replace another model, with all of its files; its history keeps them.
        message: commit message.
        token: token with write access. Default: the one of the environment.

    Returns:
        Address of the commit.

    Raises:
        HubError: no token, no right, no network, or an interrupted upload.
        EmmaError: a repository that holds another model, or a folder that is not as it was exported or holds links.
        FileNotFoundError: no such model or revision.
    """
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise EmmaError(f"A repository is named like org/name: got {repo_id!r}.")
    token = token or get_token()
    if not token:
        raise HubError(
            f"Writing to {repo_id} needs a token: found none. Set HF_TOKEN to one with write access, or log in with "
            "`hf auth login`."
        )
    source = Path(model)
    if source.is_dir() and read_manifest(source) is not None:
        return _upload(source, repo_id, private, revision, force, message, token)
    # Beside the model, so that its weights are linked and not copied.
    parent = source.parent if source.is_dir() and os.access(source.parent, os.W_OK) else Path(tempfile.gettempdir())
    with temporary_folder(parent, "emma-push") as place:
        folder = export(model, place / repo_id.split("/")[1], repo_id, link=True)
        return _upload(folder, repo_id, private, revision, force, message, token)


def _upload(
    folder: Path, repo_id: str, private: bool, revision: str | None, force: bool, message: str | None, token: str
) -> str:
    additions = _verified_additions(folder)
    hashes = {name: addition.upload_info.sha256.hex() for name, addition in additions.items()}
    api = HfApi(token=token)
    with hub_errors(repo_id, revision, "write"):
        info = _get_or_create(api, repo_id, private, revision)
        remote = {file.rfilename: file for file in info.siblings or ()}
        other_weights = _other_weights(folder, hashes, remote)
        if other_weights and not force:
            raise EmmaError(
                f"{repo_id} holds another model: it has {', '.join(other_weights[:3])} of other contents than "
                f"{folder}. Push to another name or `--revision`, or replace it with `--force`; its history keeps it."
            )
        to_delete = _files_to_delete(repo_id, info.sha, remote, hashes, token, everything=bool(other_weights))
        try:
            # The Hub's library leaves out what has not changed.
            commit = api.create_commit(
                repo_id,
                [*(CommitOperationDelete(path_in_repo=name) for name in to_delete), *additions.values()],
                commit_message=message or f"Upload {repo_id.split('/')[1]}",
                revision=revision,
                parent_commit=info.sha,
            )
        # The Hub's library reports a file that did not arrive as a RuntimeError.
        except RuntimeError as error:
            raise HubError(_interrupted_message(repo_id, error)) from error
        after = api.model_info(repo_id, revision=commit.oid, files_metadata=True)
    arrived = {file.rfilename: file for file in after.siblings or ()}
    wrong = [name for name, sha256 in hashes.items() if not is_remote_file(folder / name, arrived.get(name), sha256)]
    if wrong:
        raise HubError(f"{repo_id} does not hold what was sent: {', '.join(wrong[:3])}. Run the command again.")
    return str(commit.commit_url)


def _verified_additions(folder: Path) -> dict[str, CommitOperationAdd]:
    """Name to upload of every file, after each was seen to be the folder's own and as it was exported."""
    listed = read_manifest(folder) or {}
    missing = sorted(set(REQUIRED_FILES) - set(listed))
    if missing:
        raise EmmaError(
            f"{folder} is not a complete repository: its manifest lacks {', '.join(missing)}. Export again."
        )
    additions = {}
    for name in [*listed, MANIFEST_NAME]:
        path = folder / name
        if not path.exists():
            raise EmmaError(f"{folder} lacks {name}, which its manifest lists. Export the model again.")
        if not is_own_file(path, folder):
            raise EmmaError(
                f"Nothing outside the folder is uploaded: {path} is a link to {path.resolve()}. Export the model again."
            )
        addition = additions[name] = CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
        entry = {"size": addition.upload_info.size, "sha256": addition.upload_info.sha256.hex()}
        if name != MANIFEST_NAME and entry != listed[name]:
            raise EmmaError(
                f"A folder is uploaded as it was exported: {path} was changed since. Take the change in with "
                f"`emma-hf export {folder} NEW_FOLDER`."
            )
    return additions


def _get_or_create(api: HfApi, repo_id: str, private: bool, revision: str | None) -> Any:
    """What the Hub reports of a repository, which is created if it does not exist."""
    try:
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    except RepositoryNotFoundError:
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code in (401, 403):
                raise HubError(
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
        if remote[name].lfs is not None:
            return remote[name].lfs.sha256 in own
        return name in hashes and is_remote_file(folder / name, remote[name], hashes[name])

    return sorted(name for name in remote if name.endswith(WEIGHT_SUFFIXES) and not is_own(name))


def _files_to_delete(
    repo_id: str, commit: str, remote: dict[str, Any], hashes: dict[str, str], token: str, everything: bool
) -> list[str]:
    """Files of an earlier export that this one lacks, or all files of another model."""
    others = {name for name in remote if name not in hashes and name != ".gitattributes"}
    if everything:
        return sorted(others)
    if MANIFEST_NAME not in remote:
        return []
    path = hf_hub_download(repo_id, MANIFEST_NAME, revision=commit, token=token)
    try:
        return sorted(others & set(read_manifest(Path(path).parent) or ()))
    except EmmaError:
        return []


def _interrupted_message(repo_id: str, error: BaseException) -> str:
    reason = " ".join(f"{error} {error.__cause__ or ''}".split())[:300]
    return (
        f"The upload to {repo_id} broke off ({reason}). Nothing was committed: the repository is as it was. Run the "
        "command again; files that arrived are not sent twice."
    )
