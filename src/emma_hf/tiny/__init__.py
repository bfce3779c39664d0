"""emma-tiny: a world of drawn shapes, questions about it, and a small EMMA that answers them."""

from typing import TYPE_CHECKING, Any

from .drawing import draw
from .questions import ask, caption
from .scenes import Scene

__all__ = ["Scene", "ask", "caption", "draw", "evaluate_tiny", "train_tiny"]

if TYPE_CHECKING:
    from .evaluation import evaluate_tiny
    from .training import train_tiny
else:
    # Who draws a scene does not import the trainer, which takes more than a second.
    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import evaluation, training

        return {"evaluate_tiny": evaluation.evaluate_tiny, "train_tiny": training.train_tiny}[name]
