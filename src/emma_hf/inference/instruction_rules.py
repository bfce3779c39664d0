"""Which text the instruction encoder gets, as a variable: the rules by which a measurement chooses it."""

import hashlib
from collections.abc import Mapping

from ..model.errors_emma import EmmaError
from ..model.instruction_emma import instruction_from_turn

# What each rule gives to the instruction encoder, for `--help` and the documentation. The prompt is never changed.
RULES = {
    "own": "what the package itself takes: the prompt without image placeholders, up to its first line break",
    "first-line": "the prompt up to its first line break as it is written, placeholders included",
    "question": "the question alone, without hint, options and answer format",
    "whole": "the whole prompt",
    "swapped": "what `own` gives for another question of the same kind",
    "empty": "no word",
    "constant": "one sentence for all questions",
}
CONSTANT = "Describe the picture."


def instruction_by_rule(rule: str, prompt: str, question: str, image_token: str = "<image>") -> str:
    """The instruction of one prompt by any rule but `swapped`, which needs the others: see [`swap_instructions`].

    Args:
        rule: a key of `RULES`.
        prompt: the user's turn, in which `image_token` may stand for images.
        question: the question in it.
        image_token: the placeholder of an image.

    Raises:
        EmmaError: another rule.
    """
    if rule == "own":
        return instruction_from_turn(prompt, image_token)
    if rule == "first-line":
        return prompt.split("\n")[0]
    texts = {"question": question, "whole": prompt.replace(image_token, "").strip(), "empty": "", "constant": CONSTANT}
    if rule not in texts:
        raise EmmaError(f"An instruction rule is one of {', '.join(RULES)}: got {rule!r}.")
    return texts[rule]


def swap_instructions(instructions: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """For each question the instruction of another one of its kind, never a text equal to its own.

    The questions of a kind stand in a circle in the order of the hashes of their ids, and each takes the text of the
    next one whose text is another: which one does not depend on batches, processes or the order of the questions. A
    kind in which all texts are equal takes those of all kinds.

    Args:
        instructions: kind and own instruction of each question, by its id.

    Returns:
        The other instruction, by id.

    Raises:
        EmmaError: all instructions are equal.
    """
    circle = sorted(instructions, key=lambda each: hashlib.sha256(each.encode()).digest())
    kinds: dict[str, list[str]] = {}
    for each in circle:
        kinds.setdefault(instructions[each][0], []).append(each)
    donors = {}
    for members in kinds.values():
        found = _next_different(members, instructions) or _next_different(circle, instructions)
        donors.update({each: instructions[found[each]][1] for each in members if found})
    if len(donors) < len(instructions):
        raise EmmaError(
            "Instructions can be swapped where at least two differ: got the same for all "
            f"{len(instructions)} questions, {circle and instructions[circle[0]][1]!r}. Use the rule empty or constant."
        )
    return donors


def _next_different(circle: list[str], instructions: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """For each id the next one in the circle with another text; empty if there is one text only."""
    texts = {each: " ".join(instructions[each][1].lower().split()) for each in circle}
    found: dict[str, str] = {}
    if len(set(texts.values())) > 1:
        # Twice around, backwards: what the first round cannot know yet, at the circle's end, the second does.
        for each, following in reversed([*zip(circle, [*circle[1:], circle[0]])] * 2):
            if texts[following] != texts[each]:
                found[each] = following
            elif following in found:
                found[each] = found[following]
    return found


__all__ = ["CONSTANT", "RULES", "instruction_by_rule", "swap_instructions"]
