"""Models that the analysis is tested on: random, and written by hand."""

import pytest
from support.analyzed import small, small_rows
from support.constructed import constructed, constructed_rows

from emma_hf.analysis import VisionPath, analyze, encode


@pytest.fixture(scope="session")
def small_model():
    return small()


@pytest.fixture(scope="session")
def path(small_model):
    return VisionPath(*small_model)


@pytest.fixture(scope="session")
def sample(path):
    return encode(path, small_rows(), batch=4)


@pytest.fixture(scope="session")
def by_hand():
    """The model whose answers need the instruction."""
    return constructed()


@pytest.fixture(scope="session")
def by_hand_rows():
    return constructed_rows(80)


@pytest.fixture(scope="session")
def result(small_model):
    """A whole analysis of the small model."""
    return analyze(*small_model, small_rows(), seed=5, max_new_tokens=4)
