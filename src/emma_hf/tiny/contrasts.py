"""Scenes that differ from each other in one respect, for contrastive learning."""

from dataclasses import replace

from .questions import caption
from .scenes import COLORS, HELD_OUT_PAIRS, SHAPES, SIZES, Scene, SeededRandom


def close_up(scene: Scene) -> Scene:
    """The scene with large, filled things on a plain background without noise."""
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


def reshaped(scene: Scene, rng: SeededRandom, count: int) -> list[tuple[Scene, str]]:
    """`count` versions of the scene in which one thing has different shapes, each with its caption."""
    index = rng.integer(0, len(scene.things) - 1)
    thing = scene.things[index]
    shapes = [shape for shape in SHAPES if (thing.colour, shape) not in HELD_OUT_PAIRS]
    versions = []
    for shape in rng.sample(shapes, count):
        things = (*scene.things[:index], replace(thing, shape=shape), *scene.things[index + 1 :])
        version = replace(scene, things=things)
        versions.append((version, caption(version)))
    return versions


def siblings(scene: Scene, rng: SeededRandom) -> list[tuple[Scene, str]]:
    """The scene and up to three others that differ from it in one respect, each with a caption of what differs.

    Without them, the colors of an image alone would tell it from the others of a batch in contrastive learning.
    """
    things = list(scene.things)
    index = rng.integer(0, len(things) - 1)
    other_index = rng.integer(0, len(things) - 1)
    thing, other = things[index], things[other_index]
    if thing.colour == other.colour:
        recolored = {index: replace(thing, colour=rng.choice([c for c in COLORS if c != thing.colour]))}
    else:
        recolored = {index: replace(thing, colour=other.colour), other_index: replace(other, colour=thing.colour)}
    shape = rng.choice([s for s in SHAPES if s != thing.shape])
    size = rng.choice([s for s in SIZES if s != thing.size])
    resized = replace(thing, size=size, radius=thing.radius * SIZES[size] / SIZES[thing.size])
    versions = []
    for changes in ({}, recolored, {index: replace(thing, shape=shape)}, {index: resized}):
        changed = [changes.get(i, unchanged) for i, unchanged in enumerate(things)]
        if any(each.pair in HELD_OUT_PAIRS for each in changed):
            continue
        version = replace(scene, things=tuple(changed))
        versions.append((version, caption(version, [changed[i] for i in sorted({index, other_index})])))
    return versions
