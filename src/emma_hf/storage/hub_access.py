"""The Hub as a source of folders, and what its errors mean to a user."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .. import EMMA_TINY
from ..model.errors_emma import EmmaError, HubError, HubNotFoundError

_UNREACHABLE = (
    "The Hub cannot be reached to {action} {repo_id} ({reason}). Check the network, and HF_ENDPOINT if you set it."
    "{folder}{remedy}"
)
# Error of the Hub's library, error of this package, message. The first rule that fits holds, so a subclass stands
# above its base class.
_RULES: tuple[tuple[type[Exception], type[Exception], str], ...] = (
    (
        RevisionNotFoundError,
        HubNotFoundError,
        "{repo_id} has no revision {revision!r}. Check its spelling, leave it out for the main branch, or create the "
        'branch first: `HfApi().create_branch("{repo_id}", branch="{revision}")`.',
    ),
    (GatedRepoError, HubError, "{repo_id} is gated: ask for access on its page, and set HF_TOKEN to your token."),
    (
        RepositoryNotFoundError,
        HubNotFoundError,
        "The Hub shows no repository {repo_id}: it does not exist, or it is private and your token (HF_TOKEN) may not "
        "see it. Check the name and the token.",
    ),
    (HFValidationError, EmmaError, "A repository is named like org/name: got {repo_id!r} ({reason})."),
    (LocalEntryNotFoundError, HubError, _UNREACHABLE),
    (EntryNotFoundError, HubNotFoundError, "{repo_id} lacks a file that was asked for ({reason})."),
    (OfflineModeIsEnabled, HubError, "The Hub cannot be asked while HF_HUB_OFFLINE is set. Unset it."),
)
_REFUSED = "The Hub refused to {action} {repo_id} ({status}: {reason}). Try again later.{remedy}"
# Statuses of a refused request that have a remedy of their own.
_STATUSES = {
    401: "The Hub does not accept the token (401): it is wrong or expired. Set HF_TOKEN to one that may {action} "
    "{repo_id}.",
    403: "The token has no right to {action} {repo_id} (403). Set HF_TOKEN to one with that right, or ask the owner of "
    "the organization.",
    412: "Somebody else changed {repo_id} in the meantime (412). Look at it, and run the command again.",
}
# The clients of the Hub's library, requests in its older line and httpx in its newer, have no common error.
_CLIENTS = {"httpcore", "httpx", "httpx2", "requests", "urllib3"}


def resolve(
    source: str | os.PathLike[str],
    patterns: Sequence[str] | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """The folder that `source` names; a Hub repository is first downloaded into the cache.

    Args:
        source: a folder, a Hub id (`org/name`), or `emma-tiny` for the one that ships.
        patterns: glob patterns of the files to download. Default: all.
        revision: branch, tag or commit of a Hub id. Default: its main branch.
        token: for a Hub id. Default: the one of the environment.

    Raises:
        FileNotFoundError: neither a folder nor a Hub id.
        HubNotFoundError: no such repository or revision.
        HubError: no network, or no right to read.
        EmmaError: a folder with a `revision`.
    """
    if str(source) == EMMA_TINY.name and not Path(source).is_dir():
        return EMMA_TINY
    if Path(source).is_dir():
        if revision is not None:
            raise EmmaError(f"A folder has no revisions: got {revision!r} with {source}. Leave `revision` out.")
        return Path(source)
    repo_id = parse_repo_id(source)
    with hub_errors(repo_id, revision):
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))


def parse_repo_id(source: str | os.PathLike[str]) -> str:
    """`source` as a Hub id.

    Raises:
        FileNotFoundError: it does not have the form of one, or is a file.
    """
    text = str(source)
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or Path(text).exists():
        raise FileNotFoundError(f"{text} is neither a folder nor a Hub id (org/name). Check its spelling.")
    return text


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None, action: str = "read") -> Iterator[None]:
    """Say what a failed call to the Hub means and what to do about it.

    Args:
        repo_id: the requested repository.
        revision: the requested revision.
        action: `read` or `write`, for the message.

    Raises:
        HubNotFoundError: no such repository, revision or file.
        HubError: no network, no right, or the Hub refused or broke off.
        EmmaError: a `repo_id` that cannot be one.
    """
    try:
        yield
    except Exception as error:
        rule = _rule_for(error)
        if rule is None:
            raise
        kind, message = rule
        remedy = " Nothing was committed; run the command again, files that arrived are not sent twice."
        raise kind(
            message.format(
                action=action,
                repo_id=repo_id,
                revision=revision,
                status=_status_of(error),
                reason=" ".join(str(error).split())[:200] or type(error).__name__,
                folder="" if action == "write" else " If you meant a folder: there is none of that name.",
                remedy=remedy if action == "write" else "",
            )
        ) from error


def _rule_for(error: Exception) -> tuple[type[Exception], str] | None:
    """Kind and message of the error to raise in place of `error`; None if `error` has nothing to do with the Hub."""
    for library_error, kind, message in _RULES:
        if isinstance(error, library_error):
            return kind, message
    if isinstance(error, HfHubHTTPError):
        return HubError, _STATUSES.get(_status_of(error), _REFUSED)
    if type(error).__module__.split(".")[0] in _CLIENTS:
        return HubError, _UNREACHABLE
    return None


def _status_of(error: Exception) -> int:
    response = error.response if isinstance(error, HfHubHTTPError) else None
    return 0 if response is None else response.status_code
