"""CLIP's two projections for emma-tiny, whose checkpoint has none: how close each visual token is to a text.

Both towers are whole as they ship, with the layers behind V and the norms behind the last layer. On top of them, and
with them frozen, the two matrices and the temperature alone are learned anew: by CLIP's loss, on scenes and captions as
emma-tiny's CLIP was trained on, of which pooled embeddings are computed once. `check` says how good they are, on
scenes that no training shows.
"""

import math
import statistics
from collections.abc import Sequence

import torch
from common import Report, in_percent
from torch import nn
from tqdm import tqdm
from transformers import CLIPModel

from emma_hf import EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.evaluation.statistics import share
from emma_hf.model.compat_emma import unwrap_clip_model
from emma_hf.model.instruction_emma import encode_instruction
from emma_hf.tiny.clip import SIBLINGS, CaptionedScenes, clip_model, collate_groups
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.questions import caption
from emma_hf.tiny.recipe import PATCH, SIDE
from emma_hf.tiny.rows import TEST_SEEDS
from emma_hf.tiny.scenes import Scene

EPOCHS, GROUPS_PER_STEP, RATE = 30, 32, 2e-3
# As many as in a step of emma-tiny's CLIP, so that losses can be compared.
GROUPS_OF_A_LOSS = 8
# Neither those of emma-tiny's own evaluation nor those of the selections.
FRESH_SEEDS = TEST_SEEDS + 8 * 10_000_000

# Pooled embeddings of the images and of the captions of a group, (scenes, width) each.
Group = tuple[torch.Tensor, torch.Tensor]


def fit_projections(
    model: EmmaForConditionalGeneration, processor: EmmaProcessor, groups: int, seed: int = 0
) -> CLIPModel:
    """CLIP of the towers of `model`, whose projections are fitted to `groups` of up to four captioned scenes."""
    clip = clip_model(processor, seed).eval()
    for own, tower in (
        (clip.vision_model, model.model.vision_tower),
        (clip.text_model, model.model.instruction_encoder),
    ):
        unwrap_clip_model(own).load_state_dict(unwrap_clip_model(tower).state_dict())
    embedded = embed(clip, CaptionedScenes(groups, processor, seed), range(groups))
    optimizer = torch.optim.AdamW(
        [clip.visual_projection.weight, clip.text_projection.weight, clip.logit_scale], RATE, weight_decay=0.01
    )
    generator = torch.Generator().manual_seed(seed)
    steps = [part for _ in range(EPOCHS) for part in torch.randperm(groups, generator=generator).split(GROUPS_PER_STEP)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    for part in tqdm(steps, desc="projections", leave=False):
        optimizer.zero_grad()
        contrastive_loss(clip, [embedded[index] for index in part]).backward()
        optimizer.step()
        schedule.step()
    return clip.requires_grad_(False)


@torch.no_grad()
def embed(clip: CLIPModel, scenes: CaptionedScenes, indices: Sequence[int]) -> list[Group]:
    """Pooled embeddings of groups of captioned scenes, before the projections."""
    embedded: list[Group] = []
    for start in tqdm(range(0, len(indices), GROUPS_PER_STEP), desc="captioned scenes", leave=False):
        groups = [scenes[index] for index in indices[start : start + GROUPS_PER_STEP]]
        batch, sizes = collate_groups(groups), [len(group["input_ids"]) for group in groups]
        images = clip.vision_model(pixel_values=batch["pixel_values"]).pooler_output
        texts = clip.text_model(input_ids=batch["input_ids"]).pooler_output
        embedded += zip(images.split(sizes), texts.split(sizes))
    return embedded


def similarities(clip: CLIPModel, groups: Sequence[Group]) -> torch.Tensor:
    """Cosine of each image of the groups to each of their captions, (images, captions)."""
    images, texts = map(torch.cat, zip(*groups))
    images, texts = clip.visual_projection(images), clip.text_projection(texts)
    return nn.functional.normalize(images, dim=-1) @ nn.functional.normalize(texts, dim=-1).T


def contrastive_loss(clip: CLIPModel, groups: Sequence[Group]) -> torch.Tensor:
    """CLIP's loss: the cross-entropy of each image among all captions and of each caption among all images, mean."""
    logits = clip.logit_scale.exp() * similarities(clip, groups)
    own = torch.arange(len(logits))
    return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2


@torch.no_grad()
def cosine_to_text(
    clip: CLIPModel, processor: EmmaProcessor, features: torch.Tensor, texts: Sequence[str]
) -> torch.Tensor:
    """Cosine of the visual tokens V (images, N, width) to the text of their image in CLIP's space: (images, N).

    As CDPruner has it (arXiv 2506.10967): a visual token passes the norm and the projection of the pooled embedding.
    """
    ids = torch.tensor([encode_instruction(processor.instruction_tokenizer, text) for text in texts])
    embedded = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
    tokens = clip.visual_projection(unwrap_clip_model(clip.vision_model).post_layernorm(features))
    return torch.cosine_similarity(tokens, embedded[:, None], dim=-1)


class FreshScenes(CaptionedScenes):
    """Scenes that no training shows, each a group of its own, with a caption of all its things."""

    def pairs(self, index: int) -> list[tuple[Scene, str]]:
        scene = Scene.random(FRESH_SEEDS + index)
        return [(scene, caption(scene))]


@torch.no_grad()
def check(
    report: Report, model: EmmaForConditionalGeneration, clip: CLIPModel, processor: EmmaProcessor, count: int
) -> None:
    """Report how good the projections are: on fresh scenes, and on fresh groups from the end of CLIP's curriculum."""

    def add(what: str, found: object, by_chance: float) -> None:
        report.add("CLIP's projections", **{"on fresh scenes": what, "found": found, "by chance": by_chance})

    def own_is_best(groups: Sequence[Group]) -> list[bool]:
        found = similarities(clip, groups)
        return (found.argmax(1) == torch.arange(len(found))).tolist()

    hits = own_is_best(embed(clip, FreshScenes(count, processor, seed=0), range(count)))
    add(f"caption of an image among {count}, %", in_percent(share(hits)), 100 / count)
    curriculum = CaptionedScenes(count, processor, seed=0)
    curriculum.seed = FRESH_SEEDS
    groups = embed(clip, curriculum, range(int(SIBLINGS * count), count))
    hits = [hit for group in groups for hit in own_is_best([group])]
    add("caption of an image among those of its group, %", in_percent(share(hits)), 100 * len(groups) / len(hits))
    steps = [groups[start : start + GROUPS_OF_A_LOSS] for start in range(0, len(groups), GROUPS_OF_A_LOSS)]
    loss = statistics.fmean(contrastive_loss(clip, step).item() for step in steps)
    add("CLIP's loss, nats", loss, math.log(len(hits) / len(steps)))
    scenes = [Scene.random(FRESH_SEEDS + index) for index in range(count)]
    pairs = [scene.things[index % len(scene.things)].pair for index, scene in enumerate(scenes)]
    pixels = processor.image_processor([draw(scene) for scene in scenes], return_tensors="pt")["pixel_values"]
    features = torch.cat([model.get_vision_features(part) for part in pixels.split(64)])
    found = cosine_to_text(clip, processor, features, ["A {} {}.".format(*pair) for pair in pairs])
    there = torch.stack([tokens_on(scene, pair) for scene, pair in zip(scenes, pairs)])
    by_chance = 100 * there.float().mean().item()
    for name, token in (("greatest", found.argmax(1)), ("smallest", found.argmin(1))):
        hits = there[torch.arange(count), token].tolist()
        add(f"visual token of the {name} cosine to a thing's name lies on it, %", in_percent(share(hits)), by_chance)


def tokens_on(scene: Scene, pair: tuple[str, str]) -> torch.Tensor:
    """For each visual token whether its middle lies on a thing of this color and shape, (N,)."""
    middles = (torch.arange(SIDE // PATCH) + 0.5) * PATCH / SIDE
    things = [thing for thing in scene.things if thing.pair == pair]
    squares = [(middles[:, None] - thing.y) ** 2 + (middles - thing.x) ** 2 for thing in things]
    return torch.stack([each < thing.radius**2 for each, thing in zip(squares, things)]).any(0).flatten()
