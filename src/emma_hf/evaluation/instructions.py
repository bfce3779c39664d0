"""The instructions of a benchmark's samples, a column for each rule."""

from collections.abc import Sequence

from ..inference.instruction_rules import RULES, instruction_by_rule, swap_instructions
from ..model.errors_emma import EmmaError
from .tasks.base import Sample

# What the authors' script encodes, beside the rules of any prompt.
AUTHORS = "authors"
# What every run measures: if `own` is no better than the others, the model does not use its instruction.
COLUMNS = ("own", "swapped", "empty")


def instructions_of(samples: Sequence[Sample], rule: str) -> dict[str, str]:
    """The instruction of each sample by a rule, by the sample's id.

    Args:
        samples: all of a task, also where a run answers a part: with which others a sample's text is swapped does not
            depend on the part.
        rule: a key of `RULES`, or `authors`.

    Raises:
        EmmaError: an unknown rule, or `swapped` where all instructions are equal.
    """
    if rule == AUTHORS:
        return {sample.id: sample.authors_instruction for sample in samples}
    if rule != "swapped":
        return {sample.id: instruction_by_rule(rule, sample.prompt, sample.question) for sample in samples}
    own = instructions_of(samples, "own")
    return swap_instructions({sample.id: (sample.kind, own[sample.id]) for sample in samples})


def columns_of(rule: str | None, authors: bool = False) -> tuple[str, ...]:
    """The rules of a run: the given one alone, else `own` (with `authors` their rule in its place), swapped and empty.

    Raises:
        EmmaError: an unknown rule.
    """
    if rule is None:
        return (AUTHORS, *COLUMNS[1:]) if authors else COLUMNS
    if rule not in (*RULES, AUTHORS):
        raise EmmaError(f"`--instruction` must be one of {', '.join((*RULES, AUTHORS))}: got {rule!r}.")
    return (rule,)


__all__ = ["AUTHORS", "COLUMNS", "columns_of", "instructions_of"]
