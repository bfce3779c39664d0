"""The columns of a run, and the instructions of a task's samples."""

import pytest
from support.benchmark_stubs import samples

from emma_hf.evaluation.instructions import columns_of, instructions_of
from emma_hf.model.errors_emma import EmmaError


def test_the_columns():
    assert columns_of(None) == ("own", "swapped", "empty")
    assert columns_of(None, authors=True) == ("authors", "swapped", "empty")
    assert columns_of("whole", authors=True) == ("whole",)
    with pytest.raises(EmmaError, match="`--instruction` must be one of own, .*, authors: got 'none'"):
        columns_of("none")


def test_the_instructions_of_samples():
    asked = samples(6)
    assert instructions_of(asked, "authors")["q1"] == "thing 1"
    assert instructions_of(asked, "own") == {f"q{index}": f"Is thing {index} there?" for index in range(6)}
    swapped = instructions_of(asked, "swapped")
    for index in range(6):
        assert swapped[f"q{index}"] in {
            f"Is thing {other} there?" for other in range(index % 2, 6, 2) if other != index
        }
    assert instructions_of(asked[::-1], "swapped") == swapped
