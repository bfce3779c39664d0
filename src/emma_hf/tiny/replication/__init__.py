"""Does the instruction help? emma-tiny's arms, trained alike from one function and compared question by question."""

from .arms import ARMS, Arm, Row
from .running import ReplicationBudget, replicate

__all__ = ["ARMS", "Arm", "ReplicationBudget", "Row", "replicate"]
