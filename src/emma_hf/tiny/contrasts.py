"""Scenes that differ from each other in one respect, for contrastive learning."""

from dataclasses import replace

from .questions import caption
from .scenes import COLOURS, HELD_OUT_PAIRS, SHAPES, SIZES, Chance, Scene


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
