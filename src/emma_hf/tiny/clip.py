"""A small CLIP, trained on scenes and their captions."""

import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, set_seed

from ..model.compat_emma import unwrap_clip_model
from ..model.instruction_emma import encode_instruction
from ..model.processing_emma import EmmaProcessor
from ..training.checkpoints import IncompleteCheckpointCallback
from .contrasts import close_up, reshaped, siblings
from .curve import CurveCallback
from .drawing import draw
from .recipe import GROUP, INSTRUCTION, PATCH, SIDE, VISION, Budget, SequentialTrainer, run_phase, training_arguments
from .rows import CLIP_SEEDS
from .scenes import Scene, SeededRandom

# Shares of the groups after which the curriculum goes on: to one thing, to two, and to siblings.
ONE_THING, TWO_THINGS, SIBLINGS = 0.1, 0.35, 0.6


class CaptionedScenes(Dataset):
    """A curriculum of groups of scenes, each scene with a caption of some of its things.

    Colors and places alone tell random scenes apart, and teach nothing about shapes. The curriculum therefore begins
    with close-ups of one thing whose captions say color and shape only, goes on to scenes of one thing and then of two
    that are alike but for a shape, and ends with siblings of any kind.

    Args:
        groups: number of groups.
        processor: the processor whose image processor and instruction tokenizer prepare scenes and captions.
        seed: seed of the scenes.
    """

    def __init__(self, groups: int, processor: EmmaProcessor, seed: int) -> None:
        self.groups, self.processor, self.seed = groups, processor, CLIP_SEEDS + seed * GROUP * groups

    def __len__(self) -> int:
        return self.groups

    def pairs(self, index: int) -> list[tuple[Scene, str]]:
        """The scenes of a group and their captions."""
        seed = self.seed + GROUP * index
        rng, progress = SeededRandom(seed), index / self.groups
        if progress < ONE_THING:
            scenes = [close_up(Scene.random(seed + offset, max_things=1)) for offset in range(GROUP)]
            return [(scene, "A {} {}.".format(*scene.things[0].pair)) for scene in scenes]
        if progress < SIBLINGS:
            return reshaped(Scene.random(seed, max_things=1 if progress < TWO_THINGS else 2), rng, GROUP)
        scene = Scene.random(seed)
        return siblings(scene, rng) if rng.bernoulli() else reshaped(scene, rng, GROUP)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pairs = self.pairs(index)
        tokenizer = self.processor.instruction_tokenizer
        images = [draw(scene, SIDE) for scene, _ in pairs]
        return {
            "pixel_values": self.processor.image_processor(images, return_tensors="pt")["pixel_values"],
            "input_ids": torch.tensor([encode_instruction(tokenizer, text) for _, text in pairs]),
        }


def collate_groups(groups: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """All groups in one batch, with the texts cut where the longest ends."""
    batch = {name: torch.cat([group[name] for group in groups]) for name in groups[0]}
    length = int((batch["input_ids"] != 0).sum(-1).max())
    return {**batch, "input_ids": batch["input_ids"][:, :length], "return_loss": True}


def clip_model(processor: EmmaProcessor, seed: int) -> CLIPModel:
    """The small CLIP with random weights."""
    set_seed(seed)
    tokenizer = processor.instruction_tokenizer
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    text = CLIPTextConfig(**INSTRUCTION, vocab_size=len(tokenizer), max_position_embeddings=77, **ids)
    vision = CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)
    model = CLIPModel(config)
    # At these small sizes the plain attention is faster than the fused one.
    model.set_attn_implementation("eager")
    # Random position vectors are too small beside those of patches: waves of half their size are learned from sooner.
    positions = unwrap_clip_model(model.vision_model).embeddings.position_embedding.weight
    with torch.no_grad():
        positions[1:] = 0.5 * _waves(SIDE // PATCH, VISION["hidden_size"])
    return model


def _waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column, (side², width)."""
    frequencies = math.pi * (2.0 * side) ** -(torch.arange(width // 4) * 4 / width)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [position.reshape(-1, 1) * frequencies for position in (row, column)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def train_clip(folder: Path, processor: EmmaProcessor, budget: Budget, seed: int, overrides: dict) -> None:
    """Train the small CLIP with the arguments that `overrides` does not name, and save it."""
    trainer = SequentialTrainer(
        model=clip_model(processor, seed),
        # As OpenAI's CLIP was trained (arXiv 2103.00020, table 18).
        args=training_arguments(
            folder, budget.clip_steps, budget.clip_groups, budget.clip_rate, seed, {"adam_beta2": 0.98, **overrides}
        ),
        train_dataset=CaptionedScenes(budget.clip_steps * budget.clip_groups, processor, seed),
        data_collator=collate_groups,
        callbacks=[IncompleteCheckpointCallback(), CurveCallback(folder.parent / "curve.jsonl", "clip")],
    )
    run_phase(trainer, folder, "nats per image")
