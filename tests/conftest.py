"""Fixtures shared by all tests: the recorded outputs of the authors' implementation."""

from pathlib import Path

import pytest

REFERENCE = Path(__file__).parent / "fixtures" / "reference"


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of the recorded outputs; its README says what each file holds."""
    return REFERENCE
