"""Questions about scenes and their answers, and captions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from .scenes import COLOURS, HELD_OUT_PAIRS, SHAPES, SIZES, Chance, Scene, Thing

ENDING = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Args:
        text: with or without the ending that asks for a single word.
        answer: what is right.
        family: of questions, one of [`FAMILIES`] or [`EXERCISES`], or `caption`.
        held_out_wording: whether training never says it so.
        held_out_pair: whether it is about a pair of colour and shape that training never shows.
        unshown: wrong answers that would be right of such a pair. Training shows no picture for them, so it must not
            learn that they are never right.
    """

    text: str
    answer: str
    family: str
    held_out_wording: bool = False
    held_out_pair: bool = False
    unshown: tuple[str, ...] = field(default=(), repr=False)


# Per family: wordings of training, and others of the same words that only tests use.
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "colour": (
        ("What colour is the {a}?", "Which colour does the {a} have?", "What is the colour of the {a}?",
         "The {a}: what colour is it?", "Tell me the colour of the {a}."),
        ("Which colour is the {a}?", "The {a} has what colour?"),
    ),
    "shape": (
        ("What shape is the {a}?", "Which shape does the {a} have?", "What is the shape of the {a}?",
         "The {a}: what shape is it?", "Tell me the shape of the {a}."),
        ("Which shape is the {a}?", "The {a} has what shape?"),
    ),
    "size": (
        ("How big is the {a}?", "What size is the {a}?", "Is the {a} small, medium or large?",
         "What is the size of the {a}?", "Tell me the size of the {a}."),
        ("Which size is the {a}?", "The {a}: how big is it?"),
    ),
    "count": (
        ("How many {a} are there?", "How many {a} does the picture show?", "Count the {a}.",
         "What is the number of {a}?", "How many {a} can you see?"),
        ("How many {a} are in the picture?", "Tell me the number of {a}."),
    ),
    "existence": (
        ("Is there a {a}?", "Is there a {a} in the picture?", "Can you see a {a}?", "Does the picture show a {a}?",
         "Do you see a {a}?"),
        ("Can you see a {a} in the picture?", "Is a {a} there?"),
    ),
    "position": (
        ("Is the {a} {r} the {b}?", "Does the picture show the {a} {r} the {b}?", "Can you see the {a} {r} the {b}?",
         "The {a}: is it {r} the {b}?"),
        ("Do you see the {a} {r} the {b}?", "Is it the {a} that is {r} the {b}?"),
    ),
    "side": (
        ("Is the {a} {r} or {q} the {b}?", "Which is right: the {a} is {r} or {q} the {b}?",
         "The {a}: is it {r} or {q} the {b}?"),
        ("Tell me: is the {a} {r} or {q} the {b}?",),
    ),
    "same": (
        ("Do the {a} and the {b} have the same {k}?", "Is the {k} of the {a} the same as that of the {b}?",
         "Are the {a} and the {b} of the same {k}?"),
        ("The {a} and the {b}: do they have the same {k}?",),
    ),
    "place": (
        ("Where is the {a}?", "Where in the picture is the {a}?", "Where can you see the {a}?"),
        ("Tell me where the {a} is.", "Where does the picture show the {a}?"),
    ),
    "places": (
        ("Where are the {a} and the {b}?", "Where do you see the {a} and the {b}?"),
        ("Where can you see the {a} and the {b}?",),
    ),
    "both": (
        ("What {k}s do the {a} and the {b} have?", "What are the {k}s of the {a} and the {b}?"),
        ("Tell me the {k}s of the {a} and the {b}.",),
    ),
    "alike": (
        ("The {a} and the {b}: are they of the same {k}?", "The {a} and the {b}: is their {k} the same?",
         "The {a} and the {b}: do they share a {k}?", "The {a} and the {b}: do they agree in {k}?"),
        ("The {a} and the {b}: are they alike in {k}?",),
    ),
    "told": (
        ("Do the {a} and the {b} both have the {k} {v}?", "Is {v} the {k} of the {a} and of the {b}?",
         "Are the {a} and the {b} both of the {k} {v}?"),
        ("The {a} and the {b}: do both have the {k} {v}?",),
    ),
}  # fmt: skip


WORDINGS["left"] = WORDINGS["above"] = WORDINGS["position"]


# Asked in training alone. What a comparison must know of each thing is learned sooner as an answer of its own. Where
# every relation is asked for as often as its opposite, "yes" goes with nothing that is easier to see than all of it.
# And whether two things are the same is easier to see if it is told what one of them has. Questions that name two
# things first are all of yes and no: a new wording of "same" begins so, and was answered like exercises that began so
# too. For the same reason no exercise has an answer that begins as "no" does: "none" was once said in its place.
EXERCISES = ("place", "places", "both", "left", "above", "alike", "told")
FAMILIES = tuple(family for family in WORDINGS if family not in EXERCISES)
CAPTION_WORDINGS = ("Describe the picture.", "What does the picture show?", "What can you see in the picture?")
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Two things closer than this are neither left nor right of each other.
CLEARLY = 0.12
# A thing closer than this to where two parts of the picture meet is in neither.
MARGIN = 0.03


def caption(scene: Scene, things: Sequence[Thing] | None = None) -> str:
    """What is where, from left to right: `A large red circle at the top left and a small blue star in the middle.`"""
    phrases = []
    for thing in scene.things if things is None else things:
        place = "in the middle" if thing.place == "middle" else f"at the {thing.place}"
        phrases.append(f"a {thing.size} {thing.colour} {thing.shape} {place}")
    text = " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
    return f"{text[0].upper()}{text[1:]}."


def caption_question(chance: Chance) -> str:
    return chance.one(CAPTION_WORDINGS)


def captioned(scene: Scene, chance: Chance) -> Question:
    """The question for a caption and the caption, as a question of the family `caption`."""
    things = scene.things
    unshown = tuple(
        caption(scene, [*things[:place], replace(thing, colour=colour, shape=shape), *things[place + 1 :]])
        for place, thing in enumerate(things)
        for colour, shape in _held_out_neighbours(thing.pair)
    )
    return Question(caption_question(chance), caption(scene), "caption", unshown=unshown)


def _held_out_neighbours(pair: tuple[str, str]) -> list[tuple[str, str]]:
    """The pairs that training never shows and that differ from this one in either colour or shape."""
    return [other for other in sorted(HELD_OUT_PAIRS) if (other[0] == pair[0]) != (other[1] == pair[1])]


def ask(scene: Scene, chance: Chance, family: str, held_out_wording: bool = False) -> Question | None:
    """A question of a family about a scene, or None where the scene allows none."""
    made = _MAKERS[family](scene, chance)
    if made is None:
        return None
    words, answer, about = made
    text = chance.one(WORDINGS[family][held_out_wording]).format(**words)
    ending = ENDING if chance.maybe() else ""
    held_out = any(pair in HELD_OUT_PAIRS for pair in about)
    parts = answer.split(" and ")
    unshown = [
        " and ".join([*parts[:place], instead, *parts[place + 1 :]])
        for place, (part, pair) in enumerate(zip(parts, about, strict=False))
        for other in _held_out_neighbours(pair)
        for word, instead in zip(pair, other)
        if word == part != instead
    ]
    answer, *others = (f"{said[0].upper()}{said[1:]}" for said in (answer, *unshown))
    return Question(text + ending, answer, family, held_out_wording, held_out, tuple(others))


def questions(scene: Scene, chance: Chance, held_out_wording: bool = False) -> list[Question]:
    """One question of every family that the scene allows."""
    made = (ask(scene, chance, family, held_out_wording) for family in FAMILIES)
    return [question for question in made if question is not None]


Made = tuple[dict[str, str], str, list[tuple[str, str]]] | None


def _referred(scene: Scene, chance: Chance, *hidden: str) -> tuple[str, Thing] | None:
    """Words that mean one thing of the scene and do not say a `hidden` attribute, and that thing."""
    ways = [way for way in scene.references if not set(hidden) & set(way[0])]
    if not ways:
        return None
    names, thing = chance.one(ways)
    words = [getattr(thing, name) for name in names] + ([] if "shape" in names else ["thing"])
    return " ".join(words), thing


def _attribute(name: str) -> Callable[[Scene, Chance], Made]:
    def make(scene: Scene, chance: Chance) -> Made:
        found = _referred(scene, chance, name)
        if found is None:
            return None
        words, thing = found
        return {"a": words}, getattr(thing, name), [thing.pair]

    return make


def _clear(thing: Thing) -> bool:
    """Whether it is plain to see which part of the picture a thing is in."""
    return all(abs(centre - edge / 3) > MARGIN for centre in (thing.x, thing.y) for edge in (1, 2))


def _place(scene: Scene, chance: Chance) -> Made:
    for _ in range(6):
        found = _referred(scene, chance)
        if found is not None and _clear(found[1]):
            return {"a": found[0]}, found[1].place, [found[1].pair]
    return None


def _attributes_of_two(*names: str) -> Callable[[Scene, Chance], Made]:
    def make(scene: Scene, chance: Chance) -> Made:
        for _ in range(6):
            name = chance.one(names)
            found = _two(scene, chance, *(() if name == "place" else (name,)))
            if found is not None and (name != "place" or all(_clear(thing) for _, thing in found)):
                (a, first), (b, second) = found
                answer = f"{getattr(first, name)} and {getattr(second, name)}"
                return {"a": a, "b": b, "k": name}, answer, [first.pair, second.pair]
        return None

    return make


def _may_ask(scene: Scene, colour: str, shape: str) -> bool:
    """Training must not learn that there never is one of a pair that it is not shown."""
    return (colour, shape) not in HELD_OUT_PAIRS or bool(scene.find(colour=colour, shape=shape))


def _kind(scene: Scene, chance: Chance) -> tuple[dict[str, str], str]:
    """Attributes of a kind of things, and its plural."""
    colour, shape = chance.one(tuple(COLOURS)), chance.one(SHAPES)
    if not _may_ask(scene, colour, shape):
        return {"colour": colour}, f"{colour} things"
    return chance.one(
        (
            ({"colour": colour}, f"{colour} things"),
            ({"shape": shape}, _plural(shape)),
            ({"colour": colour, "shape": shape}, f"{colour} {_plural(shape)}"),
        )
    )


def _plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def _count(scene: Scene, chance: Chance) -> Made:
    if chance.maybe(0.3):
        return {"a": "things"}, str(len(scene.things)), [thing.pair for thing in scene.things]
    # Of several kinds the most frequent: most kinds of a world are absent from a picture.
    wanted = chance.between(0, 4)
    kinds = [_kind(scene, chance) for _ in range(12)]
    attributes, plural = min(kinds, key=lambda kind: abs(len(scene.find(**kind[0])) - wanted))
    found = scene.find(**attributes)
    return {"a": plural}, str(len(found)), [thing.pair for thing in found]


def _existence(scene: Scene, chance: Chance) -> Made:
    if chance.maybe():
        thing = chance.one(scene.things)
        there = [(thing.colour, thing.shape), (thing.size, thing.shape)]
        adjective, shape = chance.one(there)
        return {"a": f"{adjective} {shape}"}, "yes", [thing.pair]
    # Absent, but like what is there: its colour or its shape occurs.
    absent = [
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        if _may_ask(scene, colour, shape)
        and not scene.find(colour=colour, shape=shape)
        and (scene.find(colour=colour) or scene.find(shape=shape))
    ]
    absent_sizes = [
        (size, shape)
        for size in SIZES
        for shape in SHAPES
        if not scene.find(size=size, shape=shape) and scene.find(shape=shape)
    ]
    adjective, shape = chance.one(absent_sizes if absent_sizes and chance.maybe() else absent)
    return {"a": f"{adjective} {shape}"}, "no", [(adjective, shape)]


def _two(scene: Scene, chance: Chance, *hidden: str) -> tuple[tuple[str, Thing], tuple[str, Thing]] | None:
    for _ in range(10):
        first, second = _referred(scene, chance, *hidden), _referred(scene, chance, *hidden)
        if first is not None and second is not None and first[1] is not second[1]:
            return first, second
    return None


def _related(scene: Scene, chance: Chance) -> tuple[str, str, str, list[tuple[str, str]]] | None:
    """Two things in words and how the first stands to the second."""
    for _ in range(6):
        found = _two(scene, chance)
        if found is None:
            return None
        (a, first), (b, second) = found
        ways = []
        if abs(first.x - second.x) > CLEARLY:
            ways.append("left of" if first.x < second.x else "right of")
        if abs(first.y - second.y) > CLEARLY:
            ways.append("above" if first.y < second.y else "below")
        if ways:
            return a, b, chance.one(ways), [first.pair, second.pair]
    return None


def _position(scene: Scene, chance: Chance) -> Made:
    found = _related(scene, chance)
    if found is None:
        return None
    a, b, relation, about = found
    if chance.maybe():
        return {"a": a, "b": b, "r": relation}, "yes", about
    return {"a": a, "b": b, "r": OPPOSITES[relation]}, "no", about


def _one_way(asked: str) -> Callable[[Scene, Chance], Made]:
    def make(scene: Scene, chance: Chance) -> Made:
        for _ in range(6):
            found = _related(scene, chance)
            if found is not None and found[2] in (asked, OPPOSITES[asked]):
                a, b, relation, about = found
                return {"a": a, "b": b, "r": asked}, "yes" if asked == relation else "no", about
        return None

    return make


def _side(scene: Scene, chance: Chance) -> Made:
    found = _related(scene, chance)
    if found is None:
        return None
    a, b, relation, about = found
    first, second = chance.several((relation, OPPOSITES[relation]), 2)
    return {"a": a, "b": b, "r": first.removesuffix(" of"), "q": second}, relation.removesuffix(" of"), about


def _compared(scene: Scene, chance: Chance) -> tuple[str, str, str, Thing, Thing] | None:
    """An attribute, two things in words that do not say it, and the things."""
    # Asked only where both answers can be had: more scenes have things that differ than things that are alike.
    made: dict[bool, tuple[str, str, str, Thing, Thing]] = {}
    for _ in range(12):
        name = chance.one(("colour", "shape", "size"))
        found = _two(scene, chance, name)
        if found is not None:
            (a, first), (b, second) = found
            made[getattr(first, name) == getattr(second, name)] = name, a, b, first, second
    return made[chance.maybe()] if len(made) == 2 else None


def _comparison(family: str) -> Callable[[Scene, Chance], Made]:
    def make(scene: Scene, chance: Chance) -> Made:
        found = _compared(scene, chance)
        if found is None:
            return None
        name, a, b, first, second = found
        values = getattr(first, name), getattr(second, name)
        told = chance.one(values) if family == "told" else ""
        answer = "yes" if values[0] == values[1] else "no"
        return {"a": a, "b": b, "k": name, "v": told}, answer, [first.pair, second.pair]

    return make


_MAKERS: dict[str, Callable[[Scene, Chance], Made]] = {
    "colour": _attribute("colour"),
    "shape": _attribute("shape"),
    "size": _attribute("size"),
    "count": _count,
    "existence": _existence,
    "position": _position,
    "side": _side,
    "same": _comparison("same"),
    "place": _place,
    "places": _attributes_of_two("place"),
    "both": _attributes_of_two("colour", "shape", "size"),
    "left": _one_way("left of"),
    "above": _one_way("above"),
    "alike": _comparison("alike"),
    "told": _comparison("told"),
}
