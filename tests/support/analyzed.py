"""A small model that takes emma-tiny's words, and questions about noise."""

import numpy as np
import torch
from PIL import Image
from support.models import INSTRUCTION, TEXT, VISION
from transformers import CLIPTextConfig, CLIPVisionConfig

from emma_hf import EMMA_TINY, EmmaConfig, EmmaForConditionalGeneration, EmmaImageProcessor, EmmaProcessor
from emma_hf.analysis import Row

QUESTIONS = (
    ("What colour is the star?", "Red", "colour"),
    ("Which colour does the large circle have?\nAnswer the question using a single word or phrase.", "Blue", "colour"),
    ("Is there a heart?", "Yes", "existence"),
    ("Can you see a small cross?", "No", "existence"),
    ("How many red things are there?", "2", "count"),
    ("Count the squares.", "1", "count"),
)


def small(class_token: bool = False, **kwargs) -> tuple[EmmaForConditionalGeneration, EmmaProcessor]:
    """A small model with random weights everywhere that takes emma-tiny's words, and its processor."""
    tokens = 16 + class_token
    config = EmmaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=28, patch_size=7),
        instruction_config=CLIPTextConfig(**INSTRUCTION, vocab_size=711, max_position_embeddings=77),
        text_config={"model_type": "llama", **TEXT, "vocab_size": 601},
        image_token_index=600,
        image_seq_length=tokens,
        vision_feature_select_strategy="full" if class_token else "default",
        **kwargs,
    )
    torch.manual_seed(0)
    model = EmmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "visual" in name or "projector" in name:
                parameter.normal_(0, 0.15)
    parts = EmmaProcessor.from_pretrained(EMMA_TINY)
    processor = EmmaProcessor(
        EmmaImageProcessor(size=28, crop_size=28),
        parts.tokenizer,
        parts.instruction_tokenizer,
        chat_template=parts.chat_template,
        image_seq_length=tokens,
    )
    return model, processor


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8))


def small_rows() -> list[Row]:
    return [Row(noise(seed), *question) for seed, question in enumerate(QUESTIONS)]
