"""emma-tiny: a world of drawn shapes, questions about it, and a small EMMA that answers them."""

from .evaluation import evaluate_tiny
from .scenes import Scene, ask, caption, draw
from .training import train_tiny

__all__ = ["Scene", "ask", "caption", "draw", "evaluate_tiny", "train_tiny"]
