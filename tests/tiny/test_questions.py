"""Questions and captions: true, fair, the same everywhere, and with what is held out held out."""

import hashlib
import re
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from emma_hf.tiny.questions import (
    CAPTION_WORDINGS,
    ENDING,
    EXERCISES,
    FAMILIES,
    QUESTION_FAMILIES,
    ask,
    ask_all,
    caption,
    caption_question,
    captioned,
)
from emma_hf.tiny.scenes import COLORS, HELD_OUT_PAIRS, SHAPES, SIZES, Scene, SeededRandom

SEEDS = range(600)
NOUNS = {**{shape: shape for shape in SHAPES}, **{f"{s}s": s for s in SHAPES}, "crosses": "cross"}
RELATIONS = "left of|right of|left|right|above|below|colour|shape|size"


def meant(words: str) -> dict[str, str]:
    """Attributes that a phrase such as `small red things` names."""
    found = {}
    for word in words.split():
        if word in COLORS:
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
    for center in (thing.x, thing.y):
        assert min(abs(3 * center - edge) for edge in (1, 2)) > 0.09
    row = "top" if 3 * thing.y < 1 else "bottom" if 3 * thing.y > 2 else ""
    column = "left" if 3 * thing.x < 1 else "right" if 3 * thing.x > 2 else ""
    return f"{row} {column}".strip() or "middle"


@cache
def patterns(family: str) -> list[re.Pattern]:
    """The wordings of a family, the longest first: of two one can be the beginning of the other."""
    patterns = []
    wordings = QUESTION_FAMILIES[family].wordings + QUESTION_FAMILIES[family].held_out_wordings
    for wording in sorted(wordings, key=len, reverse=True):
        pattern = re.sub(r"\\\{(first|second|value)\\\}", r"(?P<\1>[\\w ]+?)", re.escape(wording))
        pattern = re.sub(r"\\\{(relation|opposite|attribute)\\\}", rf"(?P<\1>{RELATIONS})", pattern)
        patterns.append(re.compile(pattern))
    return patterns


def words_of(family: str, text: str) -> dict[str, str]:
    """What a text says in the slots of its wording."""
    text = text.removesuffix(ENDING)
    (words, *_) = [found.groupdict() for pattern in patterns(family) if (found := pattern.fullmatch(text))]
    return words


def true_answer(scene: Scene, family: str, text: str) -> str:
    """The answer, read from the text alone."""
    words = words_of(family, text)
    if family == "count":
        return str(len(matches(scene, words["first"])))
    if family == "existence":
        return "Yes" if matches(scene, words["first"]) else "No"
    (first,) = matches(scene, words["first"])
    if family in ("colour", "shape", "size"):
        return getattr(first, family).capitalize()
    if family == "place":
        return nine_parts(first).capitalize()
    (second,) = matches(scene, words["second"])
    if family == "places":
        return f"{nine_parts(first)} and {nine_parts(second)}".capitalize()
    if family == "both":
        return f"{getattr(first, words['attribute'])} and {getattr(second, words['attribute'])}".capitalize()
    if family == "told":
        return (
            "Yes"
            if getattr(first, words["attribute"]) == getattr(second, words["attribute"]) == words["value"]
            else "No"
        )
    if family in ("same", "alike"):
        return "Yes" if getattr(first, words["attribute"]) == getattr(second, words["attribute"]) else "No"
    holds = {
        "left": first.x < second.x,
        "right": first.x > second.x,
        "above": first.y < second.y,
        "below": first.y > second.y,
    }
    if family in ("left", "above"):
        assert words["relation"].removesuffix(" of") == family
    if family in ("position", "left", "above"):
        return "Yes" if holds[words["relation"].removesuffix(" of")] else "No"
    ways = [way.removesuffix(" of") for way in (words["relation"], words["opposite"])]
    return next(way for way in ways if holds[way]).capitalize()


@pytest.mark.parametrize("held_out_wording", [False, True])
@pytest.mark.parametrize("held_out", [False, True])
def test_every_answer_is_true(held_out, held_out_wording):
    asked = Counter()
    for seed in SEEDS:
        scene = Scene.random(seed, held_out)
        exercises = (ask(scene, SeededRandom(seed), family, held_out_wording) for family in EXERCISES)
        for question in [*ask_all(scene, SeededRandom(seed), held_out_wording), *filter(None, exercises)]:
            assert question.answer == true_answer(scene, question.family, question.text), question
            assert question.held_out_wording == held_out_wording
            asked[question.family] += 1
    assert set(asked) == {*FAMILIES, *EXERCISES}
    assert min(asked.values()) > 200, asked


def test_the_same_seed_gives_the_same_questions_everywhere():
    asked = [question for seed in range(40) for question in ask_all(Scene.random(seed), SeededRandom(seed))]
    assert (
        hashlib.sha256(repr(asked).encode()).hexdigest()
        == "1121f39db00b522b3969fe772d5250d3ded53d6c4a8c4d08d46d73aeaed3e885"
    )


def test_training_never_asks_about_held_out_pairs():
    for seed in SEEDS:
        for question in ask_all(Scene.random(seed), SeededRandom(seed)):
            assert not question.held_out_pair
            # Nor is one named: a model would learn that there never is one.
            for color, shape in HELD_OUT_PAIRS:
                assert not re.search(rf"\b{color} {shape}", question.text)


def test_held_out_wordings_are_not_those_of_training():
    for family in QUESTION_FAMILIES.values():
        assert family.wordings
        assert family.held_out_wordings
        assert not set(family.wordings) & set(family.held_out_wordings)


def test_training_does_not_learn_that_what_it_never_shows_is_wrong():
    scene = next(scene for scene in map(Scene.random, SEEDS) if len(scene.things) == 3)
    things = [
        replace(thing, colour=color, shape=shape)
        for thing, (color, shape) in zip(scene.things, [("red", "circle"), ("blue", "square"), ("white", "star")])
    ]
    scene = replace(scene, things=tuple(things))
    found = {}
    for family in ("shape", "colour", "both", "size", "count", "existence", "told"):
        for seed in range(200):
            if question := ask(scene, SeededRandom(seed), family):
                found.setdefault((family, question.answer), set()).add(question.excluded_answers)
    found = {asked: excluded for asked, excluded in found.items() if excluded != {()}}
    # A red thing might be a star, a circle green, a blue thing a heart, a star red.
    replaced = {"Circle": ("Star",), "Square": ("Heart",), "Red": ("Green",), "White": ("Red",)}
    for answer, excluded in replaced.items():
        assert found.pop(("shape" if answer in ("Circle", "Square") else "colour", answer)) == {excluded}
    assert {family for family, _ in found} == {"both"}
    assert found["both", "Red and blue"] == {("Green and blue",)}
    assert found["both", "White and red"] == {("Red and red", "White and green")}
    assert found["both", "Square and circle"] == {("Heart and circle", "Square and star")}
    assert found["both", "Star and square"] == {("Star and heart",)}
    question = captioned(scene, SeededRandom(0))
    changes = {("red circle", "green circle"), ("red circle", "red star"), ("blue square", "blue heart")}
    changes.add(("white star", "red star"))
    assert {caption(scene).replace(*change) for change in changes} == set(question.excluded_answers)
    assert question.answer == caption(scene)
    assert question.text in CAPTION_WORDINGS
    # What stands already where no other pair is held out has nothing to be replaced by.
    assert not ask(
        replace(scene, things=(replace(things[0], colour="white", shape="square"),)), SeededRandom(0), "shape"
    ).excluded_answers


def test_questions_are_fair():
    asked = [question for seed in range(3000) for question in ask_all(Scene.random(seed), SeededRandom(seed))]
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
        if (question := ask(Scene.random(seed), SeededRandom(seed), "existence")).answer == "No"
    ]
    for scene, question in absent:
        words = next(re.finditer(r"a (\w+ \w+)(?: in the picture)?\?", question.text))[1]
        assert any(meant(words).items() & attributes(thing).items() for thing in scene.things), question


def test_a_family_that_a_scene_cannot_answer_has_no_question():
    alone = next(scene for scene in map(Scene.random, SEEDS) if len(scene.things) == 1)
    for family in ("position", "side", "same"):
        assert ask(alone, SeededRandom(0), family) is None
    assert {question.family for question in ask_all(alone, SeededRandom(0))} == set(FAMILIES) - {
        "position",
        "side",
        "same",
    }
    assert ask(alone, SeededRandom(0), "places") is None
    thing = replace(alone.things[0], x=0.345, y=0.5)
    assert ask(replace(alone, things=(thing,)), SeededRandom(0), "place") is None
    assert ask(replace(alone, things=(replace(thing, x=0.37),)), SeededRandom(0), "place").answer == "Middle"


def test_captions_name_each_thing_once():
    for seed in range(100):
        scene = Scene.random(seed)
        text = caption(scene)
        named = re.findall(rf"({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})", text)
        assert named == [(thing.size, thing.colour, thing.shape) for thing in scene.things]
        assert text[0] == "A"
        assert text.endswith(".")
    assert caption_question(SeededRandom(0)) in CAPTION_WORDINGS
