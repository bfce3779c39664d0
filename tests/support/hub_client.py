"""The Hub's client of this process and its children, led to a Hub on this machine."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

NAME = "org/emma-tiny"
WRITER, READER = "hf_writer", "hf_reader"


def connect(monkeypatch, url: str, cache: Path) -> None:
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    # The client's older line keeps a copy of it.
    monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_STORED_TOKENS_PATH": str(cache / "tokens"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    # For child processes.
    for name, value in {"HF_ENDPOINT": url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    new_sessions()


def new_sessions() -> None:
    """Forget open connections, and whether they were offline; the two lines of the client name it differently."""
    http = huggingface_hub.utils._http
    (http.close_session if hasattr(http, "close_session") else http.reset_sessions)()
