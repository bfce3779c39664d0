"""Scenes: the same for the same seed, within the image, and with what is held out held out."""

import itertools
import math

import pytest

from emma_hf.tiny.scenes import HELD_OUT_PAIRS, Scene, SeededRandom

SEEDS = range(600)


def test_the_same_seed_gives_the_same_scene():
    assert Scene.random(7) == Scene.random(7) != Scene.random(8)


def test_things_are_within_the_image_and_do_not_hide_each_other():
    for seed in SEEDS:
        scene = Scene.random(seed)
        assert 1 <= len(scene.things) <= 6
        assert list(scene.things) == sorted(scene.things, key=lambda thing: thing.x)
        for thing in scene.things:
            assert thing.radius <= thing.x <= 1 - thing.radius
            assert thing.radius <= thing.y <= 1 - thing.radius
        for one, other in itertools.combinations(scene.things, 2):
            assert math.hypot(one.x - other.x, one.y - other.y) > 0.95 * (one.radius + other.radius)
    sizes = sorted((t.radius, t.size) for seed in SEEDS for t in Scene.random(seed).things)
    # A small one is never as large as a medium one.
    assert [size for size, _ in itertools.groupby(size for _, size in sizes)] == ["small", "medium", "large"]


@pytest.mark.parametrize("max_things", [1, 2, 6])
def test_a_scene_has_at_most_so_many_things(max_things):
    assert {len(Scene.random(seed, max_things=max_things).things) for seed in SEEDS} == set(range(1, max_things + 1))


def test_only_held_out_scenes_have_held_out_pairs():
    for seed in SEEDS:
        assert not {thing.pair for thing in Scene.random(seed).things} & HELD_OUT_PAIRS
        assert {thing.pair for thing in Scene.random(seed, held_out=True).things} & HELD_OUT_PAIRS


def test_references_are_to_one_thing_alone():
    for seed in SEEDS:
        scene = Scene.random(seed)
        for names, thing in scene.references:
            assert scene.find(**{name: getattr(thing, name) for name in names}) == [thing]


def test_random_choices_are_uniform():
    rng = SeededRandom(0)
    assert set(range(2, 6)) == {rng.integer(2, 5) for _ in range(200)} == {rng.choice([2, 3, 4, 5]) for _ in range(200)}
    assert len({tuple(rng.sample("abc", 2)) for _ in range(200)}) == 6
    assert 0.25 < sum(rng.bernoulli(0.3) for _ in range(1000)) / 1000 < 0.35
    assert all(-1 <= rng.uniform(-1, 1) <= 1 for _ in range(200))
