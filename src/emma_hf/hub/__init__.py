"""Hub repositories: written to a folder, pushed, checked."""

from .repository import export
from .upload import push
from .verification import check

__all__ = ["check", "export", "push"]
