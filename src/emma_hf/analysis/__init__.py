"""What an instruction does to the visual tokens and to the answers, with the controls that make it evidence."""

from .questions import Row, TooFewQuestionsError, read_rows
from .vision_path import Sample, VisionPath, encode

__all__ = ["Row", "Sample", "TooFewQuestionsError", "VisionPath", "encode", "read_rows"]
