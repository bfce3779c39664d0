"""The authors' checkpoint."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def authors(reference, tmp_path) -> Path:
    """A copy of the authors' checkpoint that a test may damage."""
    return shutil.copytree(reference / "original", tmp_path / "authors")
