"""emma-tiny: a world of drawn shapes, questions about it, and a small EMMA that answers them."""

from .drawing import draw
from .evaluation import evaluate_tiny
from .questions import ask, caption
from .scenes import Scene
from .training import train_tiny

__all__ = ["Scene", "ask", "caption", "draw", "evaluate_tiny", "train_tiny"]
