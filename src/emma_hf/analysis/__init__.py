"""What an instruction does to the visual tokens and to the answers, with the controls that make it evidence."""

from .questions import Row, TooFewQuestionsError, read_rows
from .report import analyze, write_report
from .vision_path import Sample, VisionPath, encode

__all__ = ["Row", "Sample", "TooFewQuestionsError", "VisionPath", "analyze", "encode", "read_rows", "write_report"]
