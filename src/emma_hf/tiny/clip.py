"""A small CLIP, trained on scenes and their captions."""

import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    set_seed,
)

from ..model.compat_emma import core_of
from ..model.instruction_emma import encode_instruction
from ..model.processing_emma import EmmaProcessor
from ..training.checkpoints import IncompleteCheckpointCallback
from .contrasts import close_up, reshaped, siblings
from .drawing import draw
from .recipe import GROUP, INSTRUCTION, PATCH, SIDE, VISION, Budget, InOrder, _arguments, _run
from .rows import CLIP_SEEDS
from .scenes import Chance, Scene


class Captioned(Dataset):
    """Groups of scenes, and a caption of some things of each: a curriculum.

    Random scenes are told apart by their colours and places, so that nothing is learned of shapes. Close-ups of one
    thing, of which only colour and shape are said, teach these first; then come scenes of one thing and of two, alike
    but for a shape; last are siblings of any kind.
    """

    def __init__(self, groups: int, processor: EmmaProcessor, seed: int) -> None:
        self.groups, self.processor, self.seed = groups, processor, CLIP_SEEDS + seed * GROUP * groups

    def __len__(self) -> int:
        return self.groups

    def pairs(self, index: int) -> list[tuple[Scene, str]]:
        """The scenes of a group and their captions."""
        seed = self.seed + GROUP * index
        chance, part = Chance(seed), index / self.groups
        if part < 0.1:
            scenes = [close_up(Scene.random(seed + place, most=1)) for place in range(GROUP)]
            return [(scene, "A {} {}.".format(*scene.things[0].pair)) for scene in scenes]
        if part < 0.6:
            return reshaped(Scene.random(seed, most=1 if part < 0.35 else 2), chance, GROUP)
        return siblings(Scene.random(seed), chance) if chance.maybe() else reshaped(Scene.random(seed), chance, GROUP)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pairs = self.pairs(index)
        tokenizer = self.processor.instruction_tokenizer
        pictures = [draw(scene, SIDE) for scene, _ in pairs]
        return {
            "pixel_values": self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"],
            "input_ids": torch.tensor([encode_instruction(tokenizer, text) for _, text in pairs]),
        }


def collate_groups(groups: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """All groups in one batch, texts cut where the longest ends."""
    batch = {name: torch.cat([group[name] for group in groups]) for name in groups[0]}
    length = int((batch["input_ids"] != 0).sum(-1).max())
    return {**batch, "input_ids": batch["input_ids"][:, :length], "return_loss": True}


def clip_model(processor: EmmaProcessor, seed: int) -> CLIPModel:
    """The small CLIP, at random."""
    set_seed(seed)
    tokenizer = processor.instruction_tokenizer
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    text = CLIPTextConfig(**INSTRUCTION, vocab_size=len(tokenizer), max_position_embeddings=77, **ids)
    vision = CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)
    model = CLIPModel(config)
    # At these small sizes the plain attention is faster than the fused one.
    model.set_attn_implementation("eager")
    # A random place is too small beside a patch: it took thousands of pictures to learn where things are.
    places = core_of(model.vision_model).embeddings.position_embedding.weight
    with torch.no_grad():
        places[1:] = 0.5 * _waves(SIDE // PATCH, VISION["hidden_size"])
    return model


def _waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column, (side², width)."""
    frequencies = math.pi * (2.0 * side) ** -(torch.arange(width // 4) * 4 / width)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    turns = [(place.reshape(-1, 1) * frequencies) for place in (row, column)]
    return torch.cat([wave(turn) for turn in turns for wave in (torch.sin, torch.cos)], dim=1)


def _train_clip(folder: Path, processor: EmmaProcessor, budget: Budget, seed: int, more: dict) -> None:
    trainer = InOrder(
        model=clip_model(processor, seed),
        # As OpenAI's CLIP was trained (arXiv 2103.00020, table 18).
        args=_arguments(
            folder, budget.clip_steps, budget.clip_groups, budget.clip_rate, seed, {"adam_beta2": 0.98, **more}
        ),
        train_dataset=Captioned(budget.clip_steps * budget.clip_groups, processor, seed),
        data_collator=collate_groups,
        callbacks=[IncompleteCheckpointCallback()],
    )
    _run(trainer, folder, "nats per picture")
