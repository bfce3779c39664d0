"""An EMMA whose weights were written by hand, so that its answers need the instruction; nothing in it is trained.

A picture holds six things in a grid of 4 x 4; each has one of eight colors and one of eight shapes. Naming a color asks
for its thing's shape, naming a shape for its color; the answer is a letter, "a" for the first of either. The language
model takes the mean over the visual tokens and reads eight numbers in it, and no word of the prompt: what is asked must
be in the visual tokens.
Each hidden unit of the projector stands for a color, a shape and which of the two is named, and its GELU lets it through
where all three are there.
"""

import random

import numpy as np
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPVisionConfig

from emma_hf import EMMA_TINY, EmmaConfig, EmmaForConditionalGeneration, EmmaImageProcessor, EmmaProcessor
from emma_hf.analysis import Row

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
# Words that are one token for emma-tiny's instruction tokenizer.
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "medium", "large")
LETTERS = "abcdefgh"
COUNT, GRID, THINGS = 8, 4, 6
# Channels of V and F: color, shape, two for an empty cell, and the named color or shape.
EMPTY, NAMED = 2 * COUNT, 2 * COUNT + 2
WIDTH = NAMED + 2 * COUNT
# Channels of the language model: eight numbers, a constant, "an answer was given", and the numbers' mean.
CONSTANT, GIVEN, MEAN = COUNT, COUNT + 1, COUNT + 2
UNITS = 2 * COUNT * COUNT


def constructed() -> tuple[EmmaForConditionalGeneration, EmmaProcessor]:
    """The model, in float32, and its processor."""
    parts = EmmaProcessor.from_pretrained(EMMA_TINY)
    processor = EmmaProcessor(
        EmmaImageProcessor(size=4 * GRID, crop_size=4 * GRID),
        parts.tokenizer,
        parts.instruction_tokenizer,
        chat_template=parts.chat_template,
        image_seq_length=GRID * GRID,
    )
    two_layers = {"num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 8}
    tokenizer = processor.tokenizer
    config = EmmaConfig(
        vision_config=CLIPVisionConfig(**two_layers, hidden_size=WIDTH, image_size=4 * GRID, patch_size=4),
        instruction_config=CLIPTextConfig(
            **two_layers, hidden_size=2 * COUNT, vocab_size=711, max_position_embeddings=77, pad_token_id=0,
            bos_token_id=709, eos_token_id=710,
        ),
        text_config={
            "model_type": "llama", "hidden_size": UNITS, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "vocab_size": 601, "max_position_embeddings": 512,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0,
        },
        image_token_index=600,
    )  # fmt: skip
    model = EmmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float("norm" in name and name.endswith("weight")))
        _write_towers(model, processor)
        _write_adaptation(model)
        _write_language_model(model, tokenizer)
    return model, processor


def _write_towers(model: EmmaForConditionalGeneration, processor: EmmaProcessor) -> None:
    """V says what is in each cell, H which color or shape a token names. The layers themselves add nothing."""
    weights = dict(model.model.named_parameters())

    def weight(ending: str) -> torch.Tensor:
        (name,) = [name for name in weights if name.endswith(ending)]
        return weights[name]

    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    for channel in range(NAMED):
        rgb, pixel = divmod(channel, COUNT)
        weight("patch_embedding.weight")[channel, rgb, pixel // 4, pixel % 4] = std[rgb]
        weight("vision_model.embeddings.position_embedding.weight" if _nested(weights) else
               "vision_tower.embeddings.position_embedding.weight")[1:, channel] = mean[rgb]  # fmt: skip
    # Every cell has two channels at 1, so that the norm before the layers is undone by its own weight and bias.
    share = 2 / WIDTH
    weight("pre_layrnorm.weight").fill_((share * (1 - share) + model.config.vision_config.layer_norm_eps) ** 0.5)
    weight("pre_layrnorm.bias").fill_(share)
    for index, word in enumerate(COLORS + SHAPES):
        (token,) = processor.instruction_tokenizer(word, add_special_tokens=False)["input_ids"]
        weight("token_embedding.weight")[token, index] = 1


def _nested(weights: dict[str, torch.Tensor]) -> bool:
    return any("vision_model." in name for name in weights)


def _write_adaptation(model: EmmaForConditionalGeneration) -> None:
    """F has, beside what is in a cell, what is named; a hidden unit needs color, shape and name."""
    adaptation, projector = model.model.modality_adaptation, model.model.multi_modal_projector
    # So large that the GELU is its argument.
    adaptation.instruction_projection.weight[NAMED:] = 8 * torch.eye(2 * COUNT)
    alignment = adaptation.visual_alignment.weight
    alignment[:, : len(alignment)] = torch.eye(len(alignment))
    alignment[:, len(alignment) :] = 1 / 8
    for unit in range(UNITS):
        named, (color, shape) = unit // (COUNT * COUNT), divmod(unit % (COUNT * COUNT), COUNT)
        asked, told = (color, shape) if named == 0 else (shape, color)
        projector.linear_1.weight[unit, [color, COUNT + shape, NAMED + named * COUNT + asked]] = 16
        projector.linear_2.weight[told, unit] = 1
    projector.linear_1.bias.fill_(-2.5 * 16)
    projector.linear_2.bias[CONSTANT] = 100


def _write_language_model(model: EmmaForConditionalGeneration, tokenizer) -> None:
    """One layer takes the mean of the eight numbers over all tokens; the largest is said, and after it the end."""
    embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
    (layer,) = model.model.language_model.layers
    embeddings[:, CONSTANT] = 100
    numbers = torch.arange(COUNT)
    layer.self_attn.v_proj.weight[numbers, numbers] = 1
    layer.self_attn.o_proj.weight[MEAN + numbers, numbers] = 1000
    letters = tokenizer.convert_tokens_to_ids(list(LETTERS))
    embeddings[letters, GIVEN] = 100
    head[letters, MEAN + numbers] = 1
    # Without any number a letter is said, and not the token 0.
    head[letters, CONSTANT] = 0.01
    head[tokenizer.eos_token_id, GIVEN] = 1000


def constructed_rows(count: int, seed: int = 0) -> list[Row]:
    """Pictures and questions that have one answer; the kinds alternate."""
    rng, rows = random.Random(seed), []
    while len(rows) < count:
        cells = rng.sample(range(GRID * GRID), THINGS)
        things = [(rng.randrange(COUNT), rng.randrange(COUNT)) for _ in cells]
        kind = len(rows) % 2
        asked, told = rng.choice([thing if kind == 0 else thing[::-1] for thing in things])
        if sum(thing[kind] == asked for thing in things) > 1:
            continue
        pixels = np.zeros((GRID, 4, GRID, 4, 3), dtype=np.uint8)
        for cell in range(GRID * GRID):
            row, column = divmod(cell, GRID)
            channels = (EMPTY, EMPTY + 1)
            if cell in cells:
                color, shape = things[cells.index(cell)]
                channels = (color, COUNT + shape)
            for channel in channels:
                rgb, pixel = divmod(channel, COUNT)
                pixels[row, pixel // 4, column, pixel % 4, rgb] = 255
        image = Image.fromarray(pixels.reshape(4 * GRID, 4 * GRID, 3))
        word, other = (COLORS[asked], "shape") if kind == 0 else (SHAPES[asked], "color")
        question = f"Which {other} is {word}?"
        rows.append(Row(image, question, LETTERS[told], f"{other} of a thing"))
    return rows
