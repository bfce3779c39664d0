"""Load a model, ask it questions in batches, and hold a conversation with it."""

from .answering import answer
from .chat import Chat
from .loading import load_model

__all__ = ["Chat", "answer", "load_model"]
