"""Questions about scenes and their answers, and captions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from .scenes import COLORS, HELD_OUT_PAIRS, SHAPES, SIZES, Scene, SeededRandom, Thing

ENDING = "\nAnswer the question using a single word or phrase."
CAPTION_WORDINGS = ("Describe the picture.", "What does the picture show?", "What can you see in the picture?")
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Two things closer than this, as a share of the image's side, are neither left nor right of each other.
MIN_DISTANCE = 0.12
# A thing closer than this to the border between two of the nine parts of the image is in neither.
MARGIN = 0.03


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Args:
        text: the question, with or without the ending that asks for a single word.
        answer: the right answer.
        family: one of [`FAMILIES`] or [`EXERCISES`], or `caption`.
        held_out_wording: whether the wording is one that training never uses.
        held_out_pair: whether the question is about a pair of color and shape that training never shows.
        excluded_answers: wrong answers that would be right for such a pair. Training shows no image for them, so the
            model must not learn that they are never right.
    """

    text: str
    answer: str
    family: str
    held_out_wording: bool = False
    held_out_pair: bool = False
    excluded_answers: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Draft:
    """A question before it is worded.

    Args:
        slots: the text for each slot of the family's wordings.
        answer: the right answer in lower case; two answers are joined by " and ".
        subjects: color and shape of the things that the question is about, in the order of the answers.
    """

    slots: dict[str, str]
    answer: str
    subjects: list[tuple[str, str]]

    def excluded_answers(self) -> list[str]:
        """The answer with one of its words changed as a held-out pair would change it."""
        parts = self.answer.split(" and ")
        return [
            " and ".join([*parts[:index], other_word, *parts[index + 1 :]])
            for index, (part, pair) in enumerate(zip(parts, self.subjects, strict=False))
            for other_pair in _held_out_neighbors(pair)
            for word, other_word in zip(pair, other_pair)
            if word == part != other_word
        ]


@dataclass(frozen=True)
class Family:
    """Questions that are worded alike and answered by one rule.

    Args:
        draft: makes a question about a scene, or None where the scene allows none.
        wordings: wordings of training.
        held_out_wordings: wordings of the same words that only tests use.
        exercise: whether the family is asked in training alone, because its answer is a step towards another family's.
    """

    draft: Callable[[Scene, SeededRandom], Draft | None]
    wordings: tuple[str, ...]
    held_out_wordings: tuple[str, ...]
    exercise: bool = False


@dataclass(frozen=True)
class Reference:
    """Words that mean one thing of a scene, and that thing."""

    text: str
    thing: Thing


def caption(scene: Scene, things: Sequence[Thing] | None = None) -> str:
    """What is where, from left to right: `A large red circle at the top left and a small blue star in the middle.`"""
    phrases = []
    for thing in scene.things if things is None else things:
        place = "in the middle" if thing.place == "middle" else f"at the {thing.place}"
        phrases.append(f"a {thing.size} {thing.colour} {thing.shape} {place}")
    text = " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
    return f"{_capitalized(text)}."


def caption_question(rng: SeededRandom) -> str:
    """A question that asks for a caption."""
    return rng.choice(CAPTION_WORDINGS)


def captioned(scene: Scene, rng: SeededRandom) -> Question:
    """A question that asks for a caption, with the caption as its answer and `caption` as its family."""
    things = scene.things
    excluded = tuple(
        caption(scene, [*things[:index], replace(thing, colour=color, shape=shape), *things[index + 1 :]])
        for index, thing in enumerate(things)
        for color, shape in _held_out_neighbors(thing.pair)
    )
    return Question(caption_question(rng), caption(scene), "caption", excluded_answers=excluded)


def ask(scene: Scene, rng: SeededRandom, family: str, held_out_wording: bool = False) -> Question | None:
    """A question of a family about a scene, or None where the scene allows none."""
    entry = QUESTION_FAMILIES[family]
    draft = entry.draft(scene, rng)
    if draft is None:
        return None
    text = rng.choice(entry.held_out_wordings if held_out_wording else entry.wordings).format(**draft.slots)
    ending = ENDING if rng.bernoulli() else ""
    held_out_pair = any(pair in HELD_OUT_PAIRS for pair in draft.subjects)
    answer, *excluded = map(_capitalized, (draft.answer, *draft.excluded_answers()))
    return Question(text + ending, answer, family, held_out_wording, held_out_pair, tuple(excluded))


def ask_all(scene: Scene, rng: SeededRandom, held_out_wording: bool = False) -> list[Question]:
    """One question of every family that the scene allows."""
    asked = (ask(scene, rng, family, held_out_wording) for family in FAMILIES)
    return [question for question in asked if question is not None]


def _capitalized(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _held_out_neighbors(pair: tuple[str, str]) -> list[tuple[str, str]]:
    """The pairs that training never shows and that differ from this one in either color or shape."""
    return [other for other in sorted(HELD_OUT_PAIRS) if (other[0] == pair[0]) != (other[1] == pair[1])]


def _refer(scene: Scene, rng: SeededRandom, *hidden: str) -> Reference | None:
    """A reference to one thing of the scene that does not name a `hidden` attribute."""
    references = [reference for reference in scene.references if not set(hidden) & set(reference[0])]
    if not references:
        return None
    names, thing = rng.choice(references)
    words = [getattr(thing, name) for name in names] + ([] if "shape" in names else ["thing"])
    return Reference(" ".join(words), thing)


def _refer_to_two(scene: Scene, rng: SeededRandom, *hidden: str) -> tuple[Reference, Reference] | None:
    for _ in range(10):
        first, second = _refer(scene, rng, *hidden), _refer(scene, rng, *hidden)
        if first is not None and second is not None and first.thing is not second.thing:
            return first, second
    return None


def _draft_of_two(first: Reference, second: Reference, answer: str | bool, **slots: str) -> Draft:
    """A draft about two things; an answer that is a truth value is said as yes or no."""
    if isinstance(answer, bool):
        answer = "yes" if answer else "no"
    return Draft({"first": first.text, "second": second.text, **slots}, answer, [first.thing.pair, second.thing.pair])


def _attribute(scene: Scene, rng: SeededRandom, name: str) -> Draft | None:
    reference = _refer(scene, rng, name)
    if reference is None:
        return None
    return Draft({"first": reference.text}, getattr(reference.thing, name), [reference.thing.pair])


def _may_ask(scene: Scene, color: str, shape: str) -> bool:
    """Training must not learn that there never is one of a pair that it is not shown."""
    return (color, shape) not in HELD_OUT_PAIRS or bool(scene.find(colour=color, shape=shape))


def _group(scene: Scene, rng: SeededRandom) -> tuple[dict[str, str], str]:
    """Attributes that a group of things has in common, and the words for the group."""
    color, shape = rng.choice(tuple(COLORS)), rng.choice(SHAPES)
    if not _may_ask(scene, color, shape):
        return {"colour": color}, f"{color} things"
    plural = f"{shape}es" if shape == "cross" else f"{shape}s"
    return rng.choice(
        (
            ({"colour": color}, f"{color} things"),
            ({"shape": shape}, plural),
            ({"colour": color, "shape": shape}, f"{color} {plural}"),
        )
    )


def _count(scene: Scene, rng: SeededRandom) -> Draft:
    if rng.bernoulli(0.3):
        return Draft({"first": "things"}, str(len(scene.things)), [thing.pair for thing in scene.things])
    # Of twelve groups the one nearest to a random number of things: most groups are absent from an image.
    wanted = rng.integer(0, 4)
    groups = [_group(scene, rng) for _ in range(12)]
    attributes, text = min(groups, key=lambda group: abs(len(scene.find(**group[0])) - wanted))
    things = scene.find(**attributes)
    return Draft({"first": text}, str(len(things)), [thing.pair for thing in things])


def _existence(scene: Scene, rng: SeededRandom) -> Draft:
    if rng.bernoulli():
        thing = rng.choice(scene.things)
        adjective, shape = rng.choice([(thing.colour, thing.shape), (thing.size, thing.shape)])
        return Draft({"first": f"{adjective} {shape}"}, "yes", [thing.pair])
    # Absent, but like what is there: its color or its shape occurs.
    absent = [
        (color, shape)
        for color in COLORS
        for shape in SHAPES
        if _may_ask(scene, color, shape)
        and not scene.find(colour=color, shape=shape)
        and (scene.find(colour=color) or scene.find(shape=shape))
    ]
    absent_sizes = [
        (size, shape)
        for size in SIZES
        for shape in SHAPES
        if not scene.find(size=size, shape=shape) and scene.find(shape=shape)
    ]
    adjective, shape = rng.choice(absent_sizes if absent_sizes and rng.bernoulli() else absent)
    return Draft({"first": f"{adjective} {shape}"}, "no", [(adjective, shape)])


def _related(scene: Scene, rng: SeededRandom) -> tuple[Reference, Reference, str] | None:
    """Two things and the relation of the first to the second."""
    for _ in range(6):
        pair = _refer_to_two(scene, rng)
        if pair is None:
            return None
        first, second = pair
        relations = []
        if abs(first.thing.x - second.thing.x) > MIN_DISTANCE:
            relations.append("left of" if first.thing.x < second.thing.x else "right of")
        if abs(first.thing.y - second.thing.y) > MIN_DISTANCE:
            relations.append("above" if first.thing.y < second.thing.y else "below")
        if relations:
            return first, second, rng.choice(relations)
    return None


def _position(scene: Scene, rng: SeededRandom) -> Draft | None:
    related = _related(scene, rng)
    if related is None:
        return None
    first, second, relation = related
    holds = rng.bernoulli()
    return _draft_of_two(first, second, holds, relation=relation if holds else OPPOSITES[relation])


def _position_in_one_direction(scene: Scene, rng: SeededRandom, asked: str) -> Draft | None:
    for _ in range(6):
        related = _related(scene, rng)
        if related is not None and related[2] in (asked, OPPOSITES[asked]):
            first, second, relation = related
            return _draft_of_two(first, second, asked == relation, relation=asked)
    return None


def _side(scene: Scene, rng: SeededRandom) -> Draft | None:
    related = _related(scene, rng)
    if related is None:
        return None
    first, second, relation = related
    said, opposite = rng.sample((relation, OPPOSITES[relation]), 2)
    slots = {"relation": said.removesuffix(" of"), "opposite": opposite}
    return _draft_of_two(first, second, relation.removesuffix(" of"), **slots)


def _comparison(scene: Scene, rng: SeededRandom, name_value: bool = False) -> Draft | None:
    """Whether two things agree in an attribute; with `name_value` the question says the attribute of one of them."""
    # Asked only where both answers can be had: more scenes have things that differ than things that are alike.
    candidates: dict[bool, tuple[str, Reference, Reference]] = {}
    for _ in range(12):
        name = rng.choice(("colour", "shape", "size"))
        pair = _refer_to_two(scene, rng, name)
        if pair is not None:
            first, second = pair
            candidates[getattr(first.thing, name) == getattr(second.thing, name)] = name, first, second
    if len(candidates) < 2:
        return None
    same = rng.bernoulli()
    name, first, second = candidates[same]
    slots = {"attribute": name}
    if name_value:
        slots["value"] = rng.choice([getattr(reference.thing, name) for reference in (first, second)])
    return _draft_of_two(first, second, same, **slots)


def _is_clearly_placed(thing: Thing) -> bool:
    """Whether it is plain to see which of the nine parts of the image a thing is in."""
    return all(abs(center - border / 3) > MARGIN for center in (thing.x, thing.y) for border in (1, 2))


def _place(scene: Scene, rng: SeededRandom) -> Draft | None:
    for _ in range(6):
        reference = _refer(scene, rng)
        if reference is not None and _is_clearly_placed(reference.thing):
            return Draft({"first": reference.text}, reference.thing.place, [reference.thing.pair])
    return None


def _attributes_of_two(scene: Scene, rng: SeededRandom, names: tuple[str, ...]) -> Draft | None:
    for _ in range(6):
        name = rng.choice(names)
        pair = _refer_to_two(scene, rng, *(() if name == "place" else (name,)))
        if pair is not None and (name != "place" or all(_is_clearly_placed(reference.thing) for reference in pair)):
            answer = " and ".join(getattr(reference.thing, name) for reference in pair)
            return _draft_of_two(*pair, answer, attribute=name)
    return None


_POSITION_WORDINGS = (
    ("Is the {first} {relation} the {second}?", "Does the picture show the {first} {relation} the {second}?",
     "Can you see the {first} {relation} the {second}?", "The {first}: is it {relation} the {second}?"),
    ("Do you see the {first} {relation} the {second}?", "Is it the {first} that is {relation} the {second}?"),
)  # fmt: skip

# Slots: `first` and `second` are words for things, `attribute` the name of an attribute and `value` one of its values,
# `relation` and `opposite` opposite directions.
# Exercises ask for what a comparison must know of each thing, for one direction alone, or name the value that is
# compared. Of their answers only "no" itself begins with "no", so that none is confused with it
# (docs/emma-tiny/log.md).
QUESTION_FAMILIES: dict[str, Family] = {
    "colour": Family(
        partial(_attribute, name="colour"),
        ("What colour is the {first}?", "Which colour does the {first} have?",
         "What is the colour of the {first}?", "The {first}: what colour is it?",
         "Tell me the colour of the {first}."),
        ("Which colour is the {first}?", "The {first} has what colour?"),
    ),
    "shape": Family(
        partial(_attribute, name="shape"),
        ("What shape is the {first}?", "Which shape does the {first} have?", "What is the shape of the {first}?",
         "The {first}: what shape is it?", "Tell me the shape of the {first}."),
        ("Which shape is the {first}?", "The {first} has what shape?"),
    ),
    "size": Family(
        partial(_attribute, name="size"),
        ("How big is the {first}?", "What size is the {first}?", "Is the {first} small, medium or large?",
         "What is the size of the {first}?", "Tell me the size of the {first}."),
        ("Which size is the {first}?", "The {first}: how big is it?"),
    ),
    "count": Family(
        _count,
        ("How many {first} are there?", "How many {first} does the picture show?", "Count the {first}.",
         "What is the number of {first}?", "How many {first} can you see?"),
        ("How many {first} are in the picture?", "Tell me the number of {first}."),
    ),
    "existence": Family(
        _existence,
        ("Is there a {first}?", "Is there a {first} in the picture?", "Can you see a {first}?",
         "Does the picture show a {first}?", "Do you see a {first}?"),
        ("Can you see a {first} in the picture?", "Is a {first} there?"),
    ),
    "position": Family(_position, *_POSITION_WORDINGS),
    "side": Family(
        _side,
        ("Is the {first} {relation} or {opposite} the {second}?",
         "Which is right: the {first} is {relation} or {opposite} the {second}?",
         "The {first}: is it {relation} or {opposite} the {second}?"),
        ("Tell me: is the {first} {relation} or {opposite} the {second}?",),
    ),
    "same": Family(
        _comparison,
        ("Do the {first} and the {second} have the same {attribute}?",
         "Is the {attribute} of the {first} the same as that of the {second}?",
         "Are the {first} and the {second} of the same {attribute}?"),
        ("The {first} and the {second}: do they have the same {attribute}?",),
    ),
    "place": Family(
        _place,
        ("Where is the {first}?", "Where in the picture is the {first}?", "Where can you see the {first}?"),
        ("Tell me where the {first} is.", "Where does the picture show the {first}?"),
        exercise=True,
    ),
    "places": Family(
        partial(_attributes_of_two, names=("place",)),
        ("Where are the {first} and the {second}?", "Where do you see the {first} and the {second}?"),
        ("Where can you see the {first} and the {second}?",),
        exercise=True,
    ),
    "both": Family(
        partial(_attributes_of_two, names=("colour", "shape", "size")),
        ("What {attribute}s do the {first} and the {second} have?",
         "What are the {attribute}s of the {first} and the {second}?"),
        ("Tell me the {attribute}s of the {first} and the {second}.",),
        exercise=True,
    ),
    "left": Family(
        partial(_position_in_one_direction, asked="left of"), *_POSITION_WORDINGS, exercise=True,
    ),
    "above": Family(
        partial(_position_in_one_direction, asked="above"), *_POSITION_WORDINGS, exercise=True,
    ),
    "alike": Family(
        _comparison,
        ("The {first} and the {second}: are they of the same {attribute}?",
         "The {first} and the {second}: is their {attribute} the same?",
         "The {first} and the {second}: do they share a {attribute}?",
         "The {first} and the {second}: do they agree in {attribute}?"),
        ("The {first} and the {second}: are they alike in {attribute}?",),
        exercise=True,
    ),
    "told": Family(
        partial(_comparison, name_value=True),
        ("Do the {first} and the {second} both have the {attribute} {value}?",
         "Is {value} the {attribute} of the {first} and of the {second}?",
         "Are the {first} and the {second} both of the {attribute} {value}?"),
        ("The {first} and the {second}: do both have the {attribute} {value}?",),
        exercise=True,
    ),
}  # fmt: skip
FAMILIES = tuple(name for name, family in QUESTION_FAMILIES.items() if not family.exercise)
EXERCISES = tuple(name for name, family in QUESTION_FAMILIES.items() if family.exercise)
