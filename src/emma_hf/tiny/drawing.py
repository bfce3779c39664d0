"""Scenes as images."""

import math

import numpy as np
from PIL import Image, ImageDraw

from .scenes import COLORS, Scene, Thing

# Images are drawn larger by this factor and averaged, so that edges are smooth.
OVERSAMPLING = 2


def draw(scene: Scene, side: int = 168) -> Image.Image:
    """The RGB image of a scene, `side` pixels wide and high."""
    oversampled_side = side * OVERSAMPLING
    image = _background(scene, oversampled_side)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_thing(pen, thing, oversampled_side, scene.paper)
    image = image.reduce(OVERSAMPLING)
    if scene.noise:
        noise = np.random.Generator(np.random.PCG64(scene.seed)).integers(
            -scene.noise, scene.noise, (side, side, 1), endpoint=True
        )
        image = Image.fromarray(np.clip(np.asarray(image, dtype=np.int16) + noise, 0, 255).astype(np.uint8))
    return image


def _background(scene: Scene, side: int) -> Image.Image:
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


# Half the length and half the width of the bars of a cross.
_A, _B = 0.95, 0.32
# Corners of the shapes in a circle of radius one around the origin, y downwards.
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
    angle = math.radians(thing.angle)
    cos, sin = math.cos(angle), math.sin(angle)

    def polygon(scale: float, fill: tuple[int, int, int]) -> None:
        radius = thing.radius * scale
        # Corners lie on whole pixels, because Pillow may round others differently from one machine to the next.
        points = [
            (
                round((thing.x + radius * (x * cos - y * sin)) * side),
                round((thing.y + radius * (x * sin + y * cos)) * side),
            )
            for x, y in CORNERS[thing.shape]
        ]
        pen.polygon(points, fill=fill)

    color = COLORS[thing.colour]
    edge = (color[0] // 2, color[1] // 2, color[2] // 2) if thing.colour != "black" else (90, 90, 90)
    polygon(1.0, edge if thing.style == "edged" else color)
    if thing.style == "edged":
        polygon(0.82, color)
    elif thing.style == "outlined":
        polygon(0.5, paper)
