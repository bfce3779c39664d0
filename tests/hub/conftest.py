"""An exported repository, and a Hub on this machine that the tests talk to."""

import time
from pathlib import Path

import pytest
from support.hub_client import NAME, READER, WRITER, connect, new_sessions
from support.hub_server import HubServer

from emma_hf import EMMA_TINY
from emma_hf.hub import export


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """emma-tiny's complete repository, its weights in three files. Shared: a test that changes it copies it."""
    folder = tmp_path_factory.mktemp("exported") / "emma-tiny"
    return export(EMMA_TINY, folder, repo_id=NAME, max_shard_size="4MB")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running Hub that this process and its children talk to, as a user who may write to `org`."""
    (tmp_path / "storage").mkdir()
    with HubServer(tmp_path / "storage", {WRITER: {"org"}, READER: set()}) as server:
        connect(monkeypatch, server.url, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield server
    new_sessions()


@pytest.fixture
def no_waiting(monkeypatch):
    """The client waits longer and longer between its attempts."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
