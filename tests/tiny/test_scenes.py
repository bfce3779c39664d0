"""The world of shapes: the same everywhere, true, fair, and with what is held out held out."""

import hashlib
import itertools
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from emma_hf.tiny.contrasts import siblings
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.questions import (
    CAPTION_WORDINGS,
    ENDING,
    EXERCISES,
    FAMILIES,
    WORDINGS,
    ask,
    caption,
    caption_question,
    captioned,
    questions,
)
from emma_hf.tiny.scenes import COLOURS, HELD_OUT_PAIRS, SHAPES, SIZES, Chance, Scene

SEEDS = range(600)
NOUNS = {**{shape: shape for shape in SHAPES}, **{f"{s}s": s for s in SHAPES}, "crosses": "cross"}

RELATIONS = "left of|right of|left|right|above|below|colour|shape|size"


def meant(words: str) -> dict[str, str]:
    """Attributes that a phrase such as `small red things` names."""
    found = {}
    for word in words.split():
        if word in COLOURS:
            found["colour"] = word
        elif word in SIZES:
            found["size"] = word
        elif word in NOUNS:
            found["shape"] = NOUNS[word]
        else:
            assert word in ("thing", "things"), words
    return found


def attributes(thing) -> dict[str, str]:
    return {name: getattr(thing, name) for name in ("colour", "shape", "size")}


def matches(scene: Scene, words: str) -> list:
    wanted = meant(words).items()
    return [thing for thing in scene.things if wanted <= attributes(thing).items()]


def nine_parts(thing) -> str:
    """Where a thing is that is not near the lines between the parts."""
    for centre in (thing.x, thing.y):
        assert min(abs(3 * centre - edge) for edge in (1, 2)) > 0.09
    row = "top" if 3 * thing.y < 1 else "bottom" if 3 * thing.y > 2 else ""
    column = "left" if 3 * thing.x < 1 else "right" if 3 * thing.x > 2 else ""
    return f"{row} {column}".strip() or "middle"


def true_answer(scene: Scene, family: str, text: str) -> str:
    """The answer, read from the words alone."""
    text = text.removesuffix(ENDING)
    # The longest first: of two wordings one can be the beginning of the other.
    for wording in sorted(itertools.chain(*WORDINGS[family]), key=len, reverse=True):
        pattern = re.sub(r"\\\{([abv])\\\}", r"(?P<\1>[\\w ]+?)", re.escape(wording))
        pattern = re.sub(r"\\\{([rqk])\\\}", rf"(?P<\1>{RELATIONS})", pattern)
        if found := re.fullmatch(pattern, text):
            words = found.groupdict()
            break
    else:
        raise AssertionError(text)
    if family == "count":
        return str(len(matches(scene, words["a"])))
    if family == "existence":
        return "Yes" if matches(scene, words["a"]) else "No"
    (first,) = matches(scene, words["a"])
    if family in ("colour", "shape", "size"):
        return getattr(first, family).capitalize()
    if family == "place":
        return nine_parts(first).capitalize()
    (second,) = matches(scene, words["b"])
    if family == "places":
        return f"{nine_parts(first)} and {nine_parts(second)}".capitalize()
    if family == "both":
        return f"{getattr(first, words['k'])} and {getattr(second, words['k'])}".capitalize()
    if family == "told":
        return "Yes" if getattr(first, words["k"]) == getattr(second, words["k"]) == words["v"] else "No"
    if family in ("same", "alike"):
        return "Yes" if getattr(first, words["k"]) == getattr(second, words["k"]) else "No"
    holds = {
        "left": first.x < second.x,
        "right": first.x > second.x,
        "above": first.y < second.y,
        "below": first.y > second.y,
    }
    if family in ("left", "above"):
        assert words["r"].removesuffix(" of") == family
    if family in ("position", "left", "above"):
        return "Yes" if holds[words["r"].removesuffix(" of")] else "No"
    ways = [way.removesuffix(" of") for way in (words["r"], words["q"])]
    return next(way for way in ways if holds[way]).capitalize()


@pytest.mark.parametrize("held_out_wording", [False, True])
@pytest.mark.parametrize("held_out", [False, True])
def test_every_answer_is_true(held_out, held_out_wording):
    asked = Counter()
    for seed in SEEDS:
        scene = Scene.random(seed, held_out)
        exercises = (ask(scene, Chance(seed), family, held_out_wording) for family in EXERCISES)
        for question in [*questions(scene, Chance(seed), held_out_wording), *filter(None, exercises)]:
            assert question.answer == true_answer(scene, question.family, question.text), question
            assert question.held_out_wording == held_out_wording
            asked[question.family] += 1
    assert set(asked) == {*FAMILIES, *EXERCISES} and min(asked.values()) > 200, asked


def test_the_same_seed_gives_the_same_pixels_everywhere():
    digest = hashlib.sha256()
    for seed in range(40):
        picture = draw(Scene.random(seed))
        assert (picture.mode, picture.size) == ("RGB", (168, 168))
        digest.update(picture.tobytes())
    assert digest.hexdigest() == "96e3d36c33398cfe4113fc9fd014f0e7a22bb918dd97b3616b2a086d94633a58"
    assert Scene.random(7) == Scene.random(7) != Scene.random(8)
    words = [question for seed in range(40) for question in questions(Scene.random(seed), Chance(seed))]
    assert (
        hashlib.sha256(repr(words).encode()).hexdigest()
        == "1121f39db00b522b3969fe772d5250d3ded53d6c4a8c4d08d46d73aeaed3e885"
    )


def test_a_thing_is_where_and_what_the_scene_says():
    for seed in SEEDS:
        scene = Scene.random(seed)
        assert 1 <= len(scene.things) <= 6
        assert list(scene.things) == sorted(scene.things, key=lambda thing: thing.x)
        for thing in scene.things:
            assert thing.radius <= thing.x <= 1 - thing.radius and thing.radius <= thing.y <= 1 - thing.radius
        for one, other in itertools.combinations(scene.things, 2):
            assert math.hypot(one.x - other.x, one.y - other.y) > 0.95 * (one.radius + other.radius)
    sizes = sorted((t.radius, t.size) for seed in SEEDS for t in Scene.random(seed).things)
    # A small one is never as large as a medium one.
    assert [size for size, _ in itertools.groupby(size for _, size in sizes)] == ["small", "medium", "large"]
    checked = 0
    for seed in range(60):
        scene = Scene.random(seed)
        pixels = np.asarray(draw(scene, 300)).astype(int)
        for thing in scene.things:
            if thing.style != "outlined":
                seen = pixels[round(thing.y * 300), round(thing.x * 300)]
                assert np.abs(seen - COLOURS[thing.colour]).max() <= 12, (seed, thing)
                checked += 1
    assert checked > 80


@pytest.mark.parametrize("side", [16, 97, 336])
def test_any_size_can_be_drawn(side):
    assert draw(Scene.random(3), side).size == (side, side)


def test_what_is_held_out_is_never_trained():
    for seed in SEEDS:
        scene = Scene.random(seed)
        pairs = {thing.pair for thing in scene.things}
        assert not pairs & HELD_OUT_PAIRS
        for question in questions(scene, Chance(seed)):
            assert not question.held_out_pair
            # Nor is it asked about: a model would learn that there never is one.
            for colour, shape in HELD_OUT_PAIRS:
                assert not re.search(rf"\b{colour} {shape}", question.text)
        for version, _ in siblings(scene, Chance(seed)):
            assert not {thing.pair for thing in version.things} & HELD_OUT_PAIRS
        other = Scene.random(seed, held_out=True)
        assert {thing.pair for thing in other.things} & HELD_OUT_PAIRS
    for trained, held_out in WORDINGS.values():
        assert trained and held_out and not set(trained) & set(held_out)


def test_training_does_not_learn_that_what_it_never_shows_is_wrong():
    scene = next(scene for scene in map(Scene.random, SEEDS) if len(scene.things) == 3)
    things = [
        replace(thing, colour=colour, shape=shape)
        for thing, (colour, shape) in zip(scene.things, [("red", "circle"), ("blue", "square"), ("white", "star")])
    ]
    scene = replace(scene, things=tuple(things))
    found = {}
    for family in ("shape", "colour", "both", "size", "count", "existence", "told"):
        for seed in range(200):
            if question := ask(scene, Chance(seed), family):
                found.setdefault((family, question.answer), set()).add(question.unshown)
    found = {asked: unshown for asked, unshown in found.items() if unshown != {()}}
    # A red thing might be a star, a circle green, a blue thing a heart, a star red.
    replaced = {"Circle": ("Star",), "Square": ("Heart",), "Red": ("Green",), "White": ("Red",)}
    for answer, unshown in replaced.items():
        assert found.pop(("shape" if answer in ("Circle", "Square") else "colour", answer)) == {unshown}
    assert {family for family, _ in found} == {"both"}
    assert found["both", "Red and blue"] == {("Green and blue",)}
    assert found["both", "White and red"] == {("Red and red", "White and green")}
    assert found["both", "Square and circle"] == {("Heart and circle", "Square and star")}
    assert found["both", "Star and square"] == {("Star and heart",)}
    question = captioned(scene, Chance(0))
    changes = {("red circle", "green circle"), ("red circle", "red star"), ("blue square", "blue heart")}
    changes.add(("white star", "red star"))
    assert {caption(scene).replace(*change) for change in changes} == set(question.unshown)
    assert question.answer == caption(scene) and question.text in CAPTION_WORDINGS
    # What stands already where no other pair is held out has nothing to be replaced by.
    assert not ask(
        replace(scene, things=(replace(things[0], colour="white", shape="square"),)), Chance(0), "shape"
    ).unshown


def test_questions_are_fair():
    asked = [question for seed in range(3000) for question in questions(Scene.random(seed), Chance(seed))]
    for family in ("existence", "position", "same"):
        share = np.mean([question.answer == "Yes" for question in asked if question.family == family])
        assert 0.47 < share < 0.53, family
    for family, most in (("colour", 0.2), ("shape", 0.25), ("size", 0.45), ("count", 0.4), ("side", 0.3)):
        counted = Counter(question.answer for question in asked if question.family == family)
        assert counted.most_common(1)[0][1] < most * counted.total(), counted
    assert 0.45 < np.mean([question.text.endswith(ENDING) for question in asked]) < 0.55
    # What is asked about and absent is like what is there.
    absent = [
        (Scene.random(seed), question)
        for seed in range(400)
        if (question := ask(Scene.random(seed), Chance(seed), "existence")).answer == "No"
    ]
    for scene, question in absent:
        words = next(re.finditer(r"a (\w+ \w+)(?: in the picture)?\?", question.text))[1]
        assert any(meant(words).items() & attributes(thing).items() for thing in scene.things), question


def test_a_family_that_a_scene_cannot_answer_has_no_question():
    alone = next(scene for scene in map(Scene.random, SEEDS) if len(scene.things) == 1)
    for family in ("position", "side", "same"):
        assert ask(alone, Chance(0), family) is None
    assert {question.family for question in questions(alone, Chance(0))} == set(FAMILIES) - {"position", "side", "same"}
    assert ask(alone, Chance(0), "places") is None
    thing = replace(alone.things[0], x=0.345, y=0.5)
    assert ask(replace(alone, things=(thing,)), Chance(0), "place") is None
    assert ask(replace(alone, things=(replace(thing, x=0.37),)), Chance(0), "place").answer == "Middle"


def test_captions_name_each_thing_once():
    for seed in range(100):
        scene = Scene.random(seed)
        text = caption(scene)
        named = re.findall(rf"({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", text)
        assert named == [(thing.size, thing.colour, thing.shape) for thing in scene.things]
        assert text[0] == "A" and text.endswith(".")
    assert caption_question(Chance(0)) in CAPTION_WORDINGS
