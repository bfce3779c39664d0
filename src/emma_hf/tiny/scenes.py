"""A world of drawn shapes: pictures of which everything is known, questions about them, and the answers.

`Scene.random(seed)` is a picture's content, `draw` makes the picture, `ask` a question with its answer, `caption` a
sentence. The same seed gives the same pixels and words on every machine. Test scenes have pairs of colour and shape,
and test questions have wordings, that training never shows.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (250, 220, 50),
    "green": (40, 160, 70),
    "blue": (40, 90, 220),
    "purple": (140, 60, 180),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
}
# Radius of the circle around a shape, as a share of the picture's side.
SIZES = {"small": 0.09, "medium": 0.14, "large": 0.2}
STYLES = ("filled", "edged", "outlined")
BACKGROUNDS = ("plain", "gradient", "stripes", "dots")
# Greys and pale tints between the colours of the things.
PAPER = ((168, 172, 176), (190, 184, 172), (176, 190, 196), (196, 180, 186), (178, 192, 174))

# Pairs that training never shows.
HELD_OUT_PAIRS = frozenset(
    [("red", "star"), ("blue", "heart"), ("green", "circle"), ("yellow", "cross"), ("purple", "triangle")]
)
ENDING = "\nAnswer the question using a single word or phrase."
# Drawn this much larger and averaged, so that edges are smooth.
OVERSAMPLING = 2


@dataclass(frozen=True)
class Thing:
    """A shape in a picture; lengths and places are shares of the picture's side, `angle` is in degrees."""

    shape: str
    colour: str
    size: str
    style: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def place(self) -> str:
        """Which of nine parts of the picture its centre is in."""
        column = ("left", "", "right")[min(2, int(self.x * 3))]
        row = ("top", "", "bottom")[min(2, int(self.y * 3))]
        return " ".join(filter(None, (row, column))) or "middle"


@dataclass(frozen=True)
class Scene:
    """What is in a picture.

    Args:
        things: one to six, from left to right.
        background: kind of paper.
        paper: its colour.
        noise: greatest change of a value, of 255.
        seed: decides the noise.
    """

    things: tuple[Thing, ...]
    background: str = "plain"
    paper: tuple[int, int, int] = PAPER[0]
    noise: int = 0
    seed: int = field(default=0, compare=False)

    @classmethod
    def random(cls, seed: int, held_out: bool = False, most: int = 6) -> "Scene":
        """The scene of that seed, of at most so many things; with `held_out` one has a pair that is never trained."""
        chance = Chance(seed)
        count = chance.between(1, most)
        # Few colours and shapes to a picture, so that some things are alike.
        colours = chance.several(tuple(COLOURS), chance.between(min(2, count), 4))
        shapes = chance.several(SHAPES, chance.between(min(2, count), 4))
        pairs = [(colour, shape) for colour in colours for shape in shapes]
        if held_out:
            pairs[0] = chance.one(sorted(HELD_OUT_PAIRS))
        else:
            pairs = [pair for pair in pairs if pair not in HELD_OUT_PAIRS] or [("red", "circle")]
        things: list[Thing] = []
        for _ in range(200):
            if len(things) == count:
                break
            colour, shape = pairs[0] if held_out and not things else chance.one(pairs)
            size = chance.one(tuple(SIZES))
            radius = SIZES[size] * chance.uniform(0.93, 1.07)
            x, y = (chance.uniform(radius + 0.01, 0.99 - radius) for _ in range(2))
            # Things may touch, but never hide each other.
            if all(math.hypot(x - other.x, y - other.y) > 0.95 * (radius + other.radius) for other in things):
                style, angle = chance.one(STYLES), chance.uniform(-12, 12)
                things.append(Thing(shape, colour, size, style, x, y, radius, angle))
        return cls(
            things=tuple(sorted(things, key=lambda thing: thing.x)),
            background=chance.one(BACKGROUNDS),
            paper=chance.one(PAPER),
            noise=chance.one((0, 6, 12)),
            seed=seed,
        )

    @cached_property
    def references(self) -> list[tuple[tuple[str, ...], Thing]]:
        """Attributes that only one thing of the scene has, and that thing."""
        ways: list[tuple[tuple[str, ...], Thing]] = []
        for names in (("shape",), ("colour",), ("size", "shape"), ("size", "colour"), ("colour", "shape")):
            found = Counter(tuple(getattr(thing, name) for name in names) for thing in self.things)
            alone = (thing for thing in self.things if found[tuple(getattr(thing, name) for name in names)] == 1)
            ways += [(names, thing) for thing in alone]
        return ways

    def find(self, **attributes: str) -> list[Thing]:
        """The things that have all these attributes."""
        return [
            thing for thing in self.things if all(getattr(thing, name) == value for name, value in attributes.items())
        ]


class Chance:
    """Random choices that depend on the seed alone; only `random()` of the standard library is promised to stay."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._random()

    def between(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + int(self._random() * (high - low + 1))

    def one(self, values: Sequence):
        return values[int(self._random() * len(values))]

    def several(self, values: Sequence, count: int) -> list:
        """Some of the values, in random order."""
        values = list(values)
        for index in range(count):
            other = self.between(index, len(values) - 1)
            values[index], values[other] = values[other], values[index]
        return values[:count]

    def maybe(self, share: float = 0.5) -> bool:
        return self._random() < share


# Pictures


def draw(scene: Scene, side: int = 168) -> Image.Image:
    """The picture of a scene, RGB, `side` pixels wide and high."""
    big = side * OVERSAMPLING
    image = _paper(scene, big)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_thing(pen, thing, big, scene.paper)
    image = image.reduce(OVERSAMPLING)
    if scene.noise:
        noise = np.random.Generator(np.random.PCG64(scene.seed)).integers(
            -scene.noise, scene.noise, (side, side, 1), endpoint=True
        )
        image = Image.fromarray(np.clip(np.asarray(image, dtype=np.int16) + noise, 0, 255).astype(np.uint8))
    return image


def _paper(scene: Scene, side: int) -> Image.Image:
    image = Image.new("RGB", (side, side), scene.paper)
    darker = tuple(value - 22 for value in scene.paper)
    pen = ImageDraw.Draw(image)
    if scene.background == "gradient":
        for row in range(side):
            pen.line([(0, row), (side, row)], fill=tuple(value - 40 * row // side for value in scene.paper))
    step = side // 14
    if scene.background == "stripes":
        for start in range(-side, side, 2 * step):
            pen.line([(start, 0), (start + side, side)], fill=darker, width=step // 2)
    if scene.background == "dots":
        for x in range(step, side, 2 * step):
            for y in range(step, side, 2 * step):
                pen.ellipse([x - step // 4, y - step // 4, x + step // 4, y + step // 4], fill=darker)
    return image


# Corners of the shapes on a circle of radius one, y downwards.
def _star() -> list[tuple[float, float]]:
    radii = (1.0, 0.42)
    return [(radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)]


def _heart() -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / 40 for i in range(40)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.12,
        )
        for t in angles
    ]


_A, _B = 0.95, 0.32
CORNERS: dict[str, list[tuple[float, float]]] = {
    "circle": [(0.9 * math.cos(i * math.pi / 32), 0.9 * math.sin(i * math.pi / 32)) for i in range(64)],
    "square": [(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)],
    "triangle": [(0, -0.95), (0.9, 0.7), (-0.9, 0.7)],
    "star": _star(),
    "cross": [
        *((-_B, -_A), (_B, -_A), (_B, -_B), (_A, -_B), (_A, _B), (_B, _B)),
        *((_B, _A), (-_B, _A), (-_B, _B), (-_A, _B), (-_A, -_B), (-_B, -_B)),
    ],
    "heart": _heart(),
}


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, side: int, paper: tuple[int, int, int]) -> None:
    turn = math.radians(thing.angle)
    cos, sin = math.cos(turn), math.sin(turn)

    def polygon(scale: float, fill: tuple[int, int, int]) -> None:
        radius = thing.radius * scale
        # Whole pixels, so that no machine rounds a corner another way while drawing.
        points = [
            (
                round((thing.x + radius * (x * cos - y * sin)) * side),
                round((thing.y + radius * (x * sin + y * cos)) * side),
            )
            for x, y in CORNERS[thing.shape]
        ]
        pen.polygon(points, fill=fill)

    colour = COLOURS[thing.colour]
    edge = (colour[0] // 2, colour[1] // 2, colour[2] // 2) if thing.colour != "black" else (90, 90, 90)
    polygon(1.0, edge if thing.style == "edged" else colour)
    if thing.style == "edged":
        polygon(0.82, colour)
    elif thing.style == "outlined":
        polygon(0.5, paper)


# Words


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


def close_up(scene: Scene) -> Scene:
    """The scene with its things large, filled and on plain paper."""
    radius = SIZES["large"]
    things = [
        replace(
            thing,
            size="large",
            style="filled",
            radius=radius,
            **{axis: min(max(getattr(thing, axis), radius + 0.01), 0.99 - radius) for axis in ("x", "y")},
        )
        for thing in scene.things
    ]
    return replace(scene, things=tuple(things), background="plain", noise=0)


def reshaped(scene: Scene, chance: Chance, count: int) -> list[tuple[Scene, str]]:
    """The scene with one thing in so many shapes, each with its caption."""
    place = chance.between(0, len(scene.things) - 1)
    thing = scene.things[place]
    shapes = [shape for shape in SHAPES if (thing.colour, shape) not in HELD_OUT_PAIRS]
    made = []
    for shape in chance.several(shapes, count):
        things = (*scene.things[:place], replace(thing, shape=shape), *scene.things[place + 1 :])
        version = replace(scene, things=things)
        made.append((version, caption(version)))
    return made


def siblings(scene: Scene, chance: Chance) -> list[tuple[Scene, str]]:
    """The scene and up to three others that differ from it in one respect, each with a caption of what differs.

    Contrastive learning needs them: without, the colours of a picture alone would tell it from the others.
    """
    things = list(scene.things)
    index = chance.between(0, len(things) - 1)
    other = chance.between(0, len(things) - 1)
    mine, theirs = things[index], things[other]
    swapped = {index: replace(mine, colour=theirs.colour), other: replace(theirs, colour=mine.colour)}
    if theirs.colour == mine.colour:
        swapped = {index: replace(mine, colour=chance.one([c for c in COLOURS if c != mine.colour]))}
    shape = {index: replace(mine, shape=chance.one([s for s in SHAPES if s != mine.shape]))}
    size = chance.one([s for s in SIZES if s != mine.size])
    sized = {index: replace(mine, size=size, radius=mine.radius * SIZES[size] / SIZES[mine.size])}
    shown = {index, other}
    made = []
    for changes in ({}, swapped, shape, sized):
        changed = [changes.get(place, thing) for place, thing in enumerate(things)]
        if any(thing.pair in HELD_OUT_PAIRS for thing in changed):
            continue
        version = replace(scene, things=tuple(changed))
        made.append((version, caption(version, [changed[place] for place in sorted(shown)])))
    return made
