"""Hub repositories: written to a folder, pushed, checked."""

from .repository import export, push
from .verification import check

__all__ = ["check", "export", "push"]
