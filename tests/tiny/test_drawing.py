"""Images of scenes: the same pixels everywhere, each thing in its color at its place, and any size."""

import hashlib

import numpy as np
import pytest

from emma_hf.tiny.drawing import draw
from emma_hf.tiny.scenes import COLORS, Scene


def test_the_same_seed_gives_the_same_pixels_everywhere():
    digest = hashlib.sha256()
    for seed in range(40):
        image = draw(Scene.random(seed))
        assert (image.mode, image.size) == ("RGB", (168, 168))
        digest.update(image.tobytes())
    assert digest.hexdigest() == "96e3d36c33398cfe4113fc9fd014f0e7a22bb918dd97b3616b2a086d94633a58"


def test_a_thing_has_its_color_where_the_scene_says():
    checked = 0
    for seed in range(60):
        scene = Scene.random(seed)
        pixels = np.asarray(draw(scene, 300)).astype(int)
        for thing in scene.things:
            if thing.style != "outlined":
                seen = pixels[round(thing.y * 300), round(thing.x * 300)]
                assert np.abs(seen - COLORS[thing.colour]).max() <= 12, (seed, thing)
                checked += 1
    assert checked > 80


@pytest.mark.parametrize("side", [16, 97, 336])
def test_any_size_can_be_drawn(side):
    assert draw(Scene.random(3), side).size == (side, side)
