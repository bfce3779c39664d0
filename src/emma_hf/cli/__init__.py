"""The `emma-hf` command."""

from .main import main

__all__ = ["main"]
