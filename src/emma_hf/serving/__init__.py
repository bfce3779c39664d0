"""An OpenAI-compatible server for one EMMA (`emma-hf serve`), and the limits for what strangers send."""

from importlib import import_module
from typing import Any

from .errors import RequestError
from .limits import Limits

__all__ = ["Limits", "RequestError", "build_app", "listen", "serve"]


def __getattr__(name: str) -> Any:
    # The server needs Transformers 5 and FastAPI; limits and requests do not.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.server"), name)
