"""What a source is, and what each error of the Hub's library becomes. tests/hub asks a Hub on this machine."""

from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from emma_hf import EMMA_TINY, EmmaError, HubError
from emma_hf.storage.hub_access import hub_errors, parse_repo_id, resolve


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
    assert resolve("emma-tiny") == EMMA_TINY
    with pytest.raises(EmmaError, match=f"A folder has no revisions: got 'main' with {tmp_path}. Leave `revision` out"):
        resolve(tmp_path, revision="main")


def test_a_repository_is_downloaded(tmp_path, monkeypatch):
    calls = []

    def download(repo_id, **options):
        calls.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr("emma_hf.storage.hub_access.snapshot_download", download)
    assert resolve("org/name", ["*.json"], revision="v1", token="hf_token") == tmp_path
    assert calls == [("org/name", {"allow_patterns": ["*.json"], "revision": "v1", "token": "hf_token"})]


@pytest.mark.parametrize("source", ["name", "a/b/c", "./name", "/name", "~/name"])
def test_what_is_neither_a_folder_nor_a_hub_id(source):
    with pytest.raises(FileNotFoundError, match="is neither a folder nor a Hub id"):
        resolve(source)


def test_a_file_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("")
    with pytest.raises(FileNotFoundError, match="org/name is neither a folder nor a Hub id"):
        parse_repo_id("org/name")


def refused(kind: type[Exception], status: int = 0) -> Exception:
    """An error of the Hub's library, whose constructors differ between its lines."""
    error = kind.__new__(kind)
    error.args = ("why\nit failed",)
    error.response = SimpleNamespace(status_code=status)
    error.__dict__["request"] = None
    return error


class ConnectTimeout(Exception):  # noqa: N818 - the name of httpx's own
    __module__ = "httpx._exceptions"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            refused(errors.RevisionNotFoundError, 404),
            FileNotFoundError,
            r"org/name has no revision 'v1'.*create_branch",
        ),
        (refused(errors.GatedRepoError, 403), HubError, "org/name is gated: ask for access on its page"),
        (refused(errors.RepositoryNotFoundError, 401), FileNotFoundError, "The Hub shows no repository org/name"),
        (errors.HFValidationError("two words"), EmmaError, r"named like org/name: got 'org/name' \(two words\)"),
        (
            refused(errors.LocalEntryNotFoundError),
            HubError,
            "cannot be reached to read org/name .*Check the network.*If you meant a folder: there is none",
        ),
        (refused(errors.EntryNotFoundError, 404), FileNotFoundError, r"org/name lacks a file that was asked for"),
        (errors.OfflineModeIsEnabled("offline"), HubError, "while HF_HUB_OFFLINE is set. Unset it"),
        (refused(errors.HfHubHTTPError, 401), HubError, r"does not accept the token \(401\).* may read org/name"),
        (refused(errors.HfHubHTTPError, 403), HubError, r"no right to read org/name \(403\)"),
        (refused(errors.HfHubHTTPError, 412), HubError, r"Somebody else changed org/name in the meantime \(412\)"),
        (
            refused(errors.HfHubHTTPError, 500),
            HubError,
            r"The Hub refused to read org/name \(500: .*Try again later\.$",
        ),
        (ConnectTimeout(""), HubError, r"cannot be reached to read org/name \(ConnectTimeout\)"),
    ],
)
def test_each_error_says_what_it_means(error, kind, message):
    with pytest.raises(kind, match=message) as raised, hub_errors("org/name", "v1"):
        raise error
    assert raised.value.__cause__ is error
    assert isinstance(raised.value, (HubError, EmmaError))


@pytest.mark.parametrize("error", [ConnectTimeout("slow"), refused(errors.HfHubHTTPError, 500)])
def test_a_failed_write_says_that_nothing_was_committed(error):
    message = r"to write org/name .* Nothing was committed; run the command again"
    with pytest.raises(HubError, match=message), hub_errors("org/name", action="write"):
        raise error


@pytest.mark.parametrize("error", [KeyError("name"), EmmaError("a rule"), OSError("disk full")])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as raised, hub_errors("org/name"):
        raise error
    assert raised.value is error
