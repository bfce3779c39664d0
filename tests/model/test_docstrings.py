"""The examples in docstrings run and say what they print."""

import doctest

import pytest

from emma_hf import EmmaForConditionalGeneration, EmmaProcessor


@pytest.mark.parametrize(
    "function", [EmmaForConditionalGeneration.forward, EmmaProcessor.__call__], ids=lambda f: f.__qualname__
)
def test_the_example_runs(function):
    examples = doctest.DocTestParser().get_doctest(function.__doc__, {}, function.__qualname__, None, None)
    result = doctest.DocTestRunner().run(examples)
    assert result.attempted > 4
    assert result.failed == 0
