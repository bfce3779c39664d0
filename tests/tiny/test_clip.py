"""The small CLIP: its curriculum, its batches, and the positions that it knows from the start."""

import math
import re

import torch

from emma_hf.model.instruction_emma import encode_instruction
from emma_hf.tiny.clip import CaptionedScenes, clip_model, collate_groups
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.scenes import SHAPES


def test_captions_and_scenes_of_contrastive_learning(untrained):
    processor, _ = untrained
    dataset = CaptionedScenes(40, processor, seed=0)
    close, one, two = dataset.pairs(0), dataset.pairs(12), dataset.pairs(20)
    assert len({scene.seed for scene, _ in close}) == 4
    for scene, text in close:
        (thing,) = scene.things
        assert (thing.style, thing.size, scene.background, scene.noise) == ("filled", "large", "plain", 0)
        assert text == f"A {thing.colour} {thing.shape}."
    for shapes, most in ((one, 1), (two, 2)):
        assert len({scene.seed for scene, _ in shapes}) == 1
        assert len(shapes) == 4
        assert max(len(scene.things) for scene, _ in shapes) <= most
        assert len({re.sub("|".join(SHAPES), "", text) for _, text in shapes}) == 1
    # Close-ups are each of another scene; then the largest number of things grows, at 10, 35 and 60% of the groups.
    assert [len({scene.seed for scene, _ in dataset.pairs(index)}) for index in (3, 4)] == [4, 1]
    for groups, most in (((4, 14), 1), ((14, 16), 2), ((24, 28), 6)):
        counts = [len(scene.things) for index in range(*groups) for scene, _ in dataset.pairs(index)]
        assert most // 2 < max(counts) <= most
    assert any(len(scene.things) == 6 for index in range(24, 40) for scene, _ in dataset.pairs(index))
    for index in range(24, 40):
        alike = dataset.pairs(index)
        assert len({scene.seed for scene, _ in alike}) == 1
        assert 2 <= len(alike) <= 4
        # They differ, in the picture and in the words.
        assert len({text for _, text in alike}) == len(alike)
        assert len({draw(scene).tobytes() for scene, _ in alike}) == len(alike)
    batch = collate_groups([dataset[0], dataset[39]])
    ids = [encode_instruction(processor.instruction_tokenizer, text) for _, text in close + alike]
    longest = max(sum(token != 0 for token in row) for row in ids)
    assert torch.equal(batch["input_ids"], torch.tensor(ids)[:, :longest])
    assert batch["pixel_values"].shape == (len(ids), 3, 112, 112)
    assert batch["return_loss"] is True


def test_clip_knows_positions_from_the_start(untrained):
    processor, _ = untrained
    positions = clip_model(processor, seed=0).vision_model
    positions = (
        getattr(positions, "vision_model", positions).embeddings.position_embedding.weight[1:].reshape(8, 8, 128)
    )
    # Row and column by hand: the first quarter is the sine of pi times the row, the next its cosine.
    assert torch.allclose(positions[3, 5, 32], torch.tensor(0.5 * math.cos(3 * math.pi)), atol=1e-5)
    assert torch.allclose(positions[3, 5, 33], torch.tensor(0.5 * math.cos(3 * math.pi * 16 ** (-1 / 32))), atol=1e-5)
    assert torch.allclose(positions[3, 5, 97], torch.tensor(0.5 * math.cos(5 * math.pi * 16 ** (-1 / 32))), atol=1e-5)
    assert positions.reshape(64, 128).unique(dim=0).shape[0] == 64
