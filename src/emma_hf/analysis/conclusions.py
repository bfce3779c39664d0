"""What an analysis says, in three sentences computed from its figures."""

from typing import Any

from .counterfactuals import ANY_OTHER, MEAN, OTHER_KIND, OWN, REMOVED, SAME_KIND

# Shares within which two conditions count as the same, if their 95% interval lies within.
MARGIN = 0.05


def verdict(result: dict[str, Any]) -> list[str]:
    """Three sentences: whether the answers depend on the instruction, what the text term is, what the weights are.

    That the answers do not depend is said only where the 95% intervals of the changed answers and of the paired
    difference in accuracy end within 5 points; that they do, where one of them excludes no difference. Otherwise the
    questions do not decide.
    """
    conditions = result["counterfactuals"]["conditions"]
    name = next(each for each in (OTHER_KIND, ANY_OTHER, SAME_KIND) if each in conditions)
    return [_answers(result, conditions, name), _text_term(conditions), _weights(result, dependence(conditions[name]))]


def dependence(figures: dict[str, Any]) -> str:
    """`better`, `worse` or `other` answers with the own instruction, the `same`, or `undecided`, of a condition."""
    gain, changed = figures.get("gain"), figures["changed"]
    if gain and gain["low"] > 0:
        return "better"
    if gain and gain["high"] < 0:
        return "worse"
    if changed["low"] > MARGIN:
        return "other"
    if changed["high"] <= MARGIN and (not gain or max(gain["high"], -gain["low"]) <= MARGIN):
        return "same"
    return "undecided"


def _answers(result: dict[str, Any], conditions: dict[str, Any], name: str) -> str:
    figures = conditions[name]
    changed = figures["changed"]
    beginning = {
        "better": "The answers depend on the instruction",
        "worse": "The answers depend on the instruction, and are worse with their own",
        "other": "The answers depend on the instruction",
        "same": "The answers do not depend on the instruction",
        "undecided": f"{changed['of']} questions do not decide whether the answers depend on the instruction",
    }[dependence(figures)]
    if not result["weights"]["text_share_l1"]:
        beginning = "The text has no part in the visual tokens, as the alignment's text columns are zero"
    with_other = f"{changed['right']} of {changed['of']} answers change"
    if "accuracy" not in figures:
        return f"{beginning}: {with_other} with the instruction of {name} (the right answers were not given)."
    own, gain = conditions[OWN]["accuracy"], figures["gain"]
    interval = f"95% interval {_points(gain['low'])} to {_points(gain['high'])}"
    return (
        f"{beginning}: {own['share']:.1%} of {own['of']} are right with their own and "
        f"{figures['accuracy']['share']:.1%} with that of {name} (difference {_points(gain['difference'])} points, "
        f"{interval}); {with_other}."
    )


def _text_term(conditions: dict[str, Any]) -> str:
    mean, removed = conditions[MEAN], conditions[REMOVED]

    def figures(condition: dict[str, Any]) -> str:
        if "accuracy" in condition:
            return f"{condition['accuracy']['share']:.1%} are right"
        return f"{condition['changed']['share']:.1%} of the answers change"

    beginning = {
        "same": "What the text adds is as good as a constant",
        "undecided": "Whether what the text adds is more than a constant is not decided",
    }.get(dependence(mean), "What the text adds is more than a constant")
    if dependence(mean) == dependence(removed) == "same":
        beginning = "The answers do not need what the text adds"
    return f"{beginning}: with its mean over the questions in its place {figures(mean)}, without it {figures(removed)}."


def _weights(result: dict[str, Any], depends: str) -> str:
    parts = [f"{result['terms']['shares']['question']['mean']:.1%} of |F| varies with the question"]
    parts.append(f"{result['gates']['index']:.2%} of the projector's gates turn from one question to another")
    if result["variance"] and result["variance"]["interaction"] is not None:
        parts.append(
            f"{result['variance']['question'] + result['variance']['interaction']:.2%} of the variance of the visual "
            "tokens involves the question"
        )
    share = result["weights"]["text_share_l1"]
    ending = ", so that large weights are no sign of use here" if depends == "same" and share > 0.1 else ""
    return f"The text columns hold {share:.1%} of the alignment's l1 norm, while {_listed(parts)}{ending}."


def _listed(parts: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "\N{MINUS SIGN}")


__all__ = ["dependence", "verdict"]
