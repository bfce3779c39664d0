"""A world of drawn shapes: images of which everything is known, questions about them, and the answers.

`Scene.random(seed)` is the content of an image, `draw` makes the image, `ask` a question with its answer, `caption` a
sentence. The same seed gives the same pixels and words on every machine. Test scenes have pairs of color and shape,
and test questions have wordings, that training never shows.
"""

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

T = TypeVar("T")

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLORS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (250, 220, 50),
    "green": (40, 160, 70),
    "blue": (40, 90, 220),
    "purple": (140, 60, 180),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
}
# Radius of the circle around a shape, as a share of the image's side.
SIZES = {"small": 0.09, "medium": 0.14, "large": 0.2}
STYLES = ("filled", "edged", "outlined")
BACKGROUNDS = ("plain", "gradient", "stripes", "dots")
# Grays and pale tints between the colors of the things.
PAPER = ((168, 172, 176), (190, 184, 172), (176, 190, 196), (196, 180, 186), (178, 192, 174))
# Pairs that training never shows.
HELD_OUT_PAIRS = frozenset(
    [("red", "star"), ("blue", "heart"), ("green", "circle"), ("yellow", "cross"), ("purple", "triangle")]
)


class SeededRandom:
    """Random choices that depend on the seed alone; only `random()` of the standard library is promised to stay."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def uniform(self, low: float, high: float) -> float:
        """A number between `low` and `high`."""
        return low + (high - low) * self._random()

    def integer(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        return low + int(self._random() * (high - low + 1))

    def choice(self, values: Sequence[T]) -> T:
        """One of the values."""
        return values[int(self._random() * len(values))]

    def sample(self, values: Iterable[T], count: int) -> list[T]:
        """`count` of the values, in random order."""
        values = list(values)
        for index in range(count):
            other = self.integer(index, len(values) - 1)
            values[index], values[other] = values[other], values[index]
        return values[:count]

    def bernoulli(self, p: float = 0.5) -> bool:
        """True with probability `p`."""
        return self._random() < p


@dataclass(frozen=True)
class Thing:
    """A shape in an image.

    The names of the attributes are words of questions. `colour` is therefore spelled as emma-tiny learned it, here and
    as the name of a family of questions.

    Args:
        shape: one of [`SHAPES`].
        colour: one of [`COLORS`].
        size: one of [`SIZES`].
        style: one of [`STYLES`].
        x, y: center, from the top left, as shares of the image's side.
        radius: radius of the circle around the shape, as a share of the image's side.
        angle: clockwise rotation in degrees.
    """

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
        """Color and shape."""
        return self.colour, self.shape

    @property
    def place(self) -> str:
        """The one of nine parts of the image that holds the center, such as `top left` or `middle`."""
        column = ("left", "", "right")[min(2, int(self.x * 3))]
        row = ("top", "", "bottom")[min(2, int(self.y * 3))]
        return " ".join(filter(None, (row, column))) or "middle"


@dataclass(frozen=True)
class Scene:
    """The content of an image.

    Args:
        things: one to six things, from left to right.
        background: one of [`BACKGROUNDS`].
        paper: RGB color of the background, each value from 0 to 255.
        noise: greatest change of a pixel's values, in units of the same scale.
        seed: seed of the noise.
    """

    things: tuple[Thing, ...]
    background: str = "plain"
    paper: tuple[int, int, int] = PAPER[0]
    noise: int = 0
    seed: int = field(default=0, compare=False)

    @classmethod
    def random(cls, seed: int, held_out: bool = False, max_things: int = 6) -> "Scene":
        """The scene of a seed.

        Args:
            seed: seed of everything in the scene.
            held_out: whether one thing has a pair of color and shape that training never shows.
            max_things: largest number of things.
        """
        rng = SeededRandom(seed)
        count = rng.integer(1, max_things)
        things = _random_things(rng, count, _random_pairs(rng, count, held_out), held_out)
        return cls(
            things=tuple(sorted(things, key=lambda thing: thing.x)),
            background=rng.choice(BACKGROUNDS),
            paper=rng.choice(PAPER),
            noise=rng.choice((0, 6, 12)),
            seed=seed,
        )

    @cached_property
    def references(self) -> list[tuple[tuple[str, ...], Thing]]:
        """Names of attributes whose values only one thing of the scene has, and that thing."""
        references: list[tuple[tuple[str, ...], Thing]] = []
        for names in (("shape",), ("colour",), ("size", "shape"), ("size", "colour"), ("colour", "shape")):
            values = [tuple(getattr(thing, name) for name in names) for thing in self.things]
            counts = Counter(values)
            references += [(names, thing) for value, thing in zip(values, self.things) if counts[value] == 1]
        return references

    def find(self, **attributes: str) -> list[Thing]:
        """The things that have all these attributes."""
        return [
            thing for thing in self.things if all(getattr(thing, name) == value for name, value in attributes.items())
        ]


def _random_pairs(rng: SeededRandom, count: int, held_out: bool) -> list[tuple[str, str]]:
    """Pairs of color and shape for an image of `count` things, the held-out one first."""
    # Few colors and shapes in an image, so that some things are alike.
    colors = rng.sample(COLORS, rng.integer(min(2, count), 4))
    shapes = rng.sample(SHAPES, rng.integer(min(2, count), 4))
    pairs = [(color, shape) for color in colors for shape in shapes]
    if held_out:
        return [rng.choice(sorted(HELD_OUT_PAIRS)), *pairs[1:]]
    return [pair for pair in pairs if pair not in HELD_OUT_PAIRS] or [("red", "circle")]


def _random_things(rng: SeededRandom, count: int, pairs: list[tuple[str, str]], held_out: bool) -> list[Thing]:
    """Up to `count` things that do not hide each other; with `held_out` the first has the first pair."""
    things: list[Thing] = []
    for _ in range(200):
        if len(things) == count:
            break
        color, shape = pairs[0] if held_out and not things else rng.choice(pairs)
        size = rng.choice(tuple(SIZES))
        radius = SIZES[size] * rng.uniform(0.93, 1.07)
        x, y = (rng.uniform(radius + 0.01, 0.99 - radius) for _ in range(2))
        # Things may touch, but never hide each other.
        if all(math.hypot(x - other.x, y - other.y) > 0.95 * (radius + other.radius) for other in things):
            style, angle = rng.choice(STYLES), rng.uniform(-12, 12)
            things.append(Thing(shape, color, size, style, x, y, radius, angle))
    return things
