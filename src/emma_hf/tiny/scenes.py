"""A world of drawn shapes: pictures of which everything is known, questions about them, and the answers.

`Scene.random(seed)` is a picture's content, `draw` makes the picture, `ask` a question with its answer, `caption` a
sentence. The same seed gives the same pixels and words on every machine. Test scenes have pairs of colour and shape,
and test questions have wordings, that training never shows.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

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


_A, _B = 0.95, 0.32
