"""Scenes that differ in one respect: all alike but for it, and none with what is held out."""

from emma_hf.tiny.contrasts import close_up, reshaped, siblings
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.questions import caption
from emma_hf.tiny.scenes import HELD_OUT_PAIRS, Scene, SeededRandom

SEEDS = range(200)


def differences(scene: Scene, other: Scene) -> list[set[str]]:
    """Names of the attributes in which the things of two scenes differ, for those that do."""
    pairs = zip(scene.things, other.things, strict=True)
    names = [{name for name, value in vars(one).items() if vars(two)[name] != value} for one, two in pairs]
    return [each for each in names if each]


def test_close_ups_are_large_filled_and_within_a_plain_image():
    for seed in SEEDS:
        scene = Scene.random(seed)
        close = close_up(scene)
        assert (close.background, close.noise, close.paper) == ("plain", 0, scene.paper)
        assert [thing.pair for thing in close.things] == [thing.pair for thing in scene.things]
        for thing in close.things:
            assert (thing.size, thing.style, thing.radius) == ("large", "filled", 0.2)
            assert 0.2 <= thing.x <= 0.8
            assert 0.2 <= thing.y <= 0.8


def test_reshaped_scenes_differ_in_one_shape():
    for seed in SEEDS:
        scene = Scene.random(seed)
        versions = reshaped(scene, SeededRandom(seed), 4)
        assert len({text for _, text in versions}) == 4
        for version, text in versions:
            assert text == caption(version)
            assert differences(scene, version) in ([], [{"shape"}])
            assert not {thing.pair for thing in version.things} & HELD_OUT_PAIRS


def test_siblings_differ_in_one_respect_and_in_their_captions():
    respects = set()
    for seed in SEEDS:
        scene = Scene.random(seed)
        (first, _), *others = versions = siblings(scene, SeededRandom(seed))
        assert first == scene
        for version, _ in others:
            changed = differences(scene, version)
            # Two things may exchange their colors.
            assert len(changed) == 1 or changed == [{"colour"}] * 2
            respects.add(frozenset(changed[0]))
            assert not {thing.pair for thing in version.things} & HELD_OUT_PAIRS
        assert len({text for _, text in versions}) == len(versions)
        assert len({draw(version).tobytes() for version, _ in versions}) == len(versions)
    assert respects == {frozenset(names) for names in (["colour"], ["shape"], ["size", "radius"])}
