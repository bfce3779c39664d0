"""Task files for lmms-eval's `--include_path`: benchmarks that it lacks, or scores by asking another model."""

from pathlib import Path

# What `--include_path` takes.
FOLDER = Path(__file__).parent

__all__ = ["FOLDER"]
