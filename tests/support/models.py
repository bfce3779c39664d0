"""Small models, their inputs, and folders of them."""

from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPVisionConfig

from emma_hf import EMMA_TINY, EmmaConfig, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.model.token_selection_emma import select_diverse
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.scenes import Scene

# The linear layers that a quantizer quantizes.
LANGUAGE_LINEARS = r"model\.language_model\.layers\.\d+\.(?:self_attn\.[qkvo]|mlp\.(?:gate|up|down))_proj"

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
INSTRUCTION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}


def tiny_config(text: dict | None = None, **kwargs) -> EmmaConfig:
    """A small config: 16 visual tokens, 77 instruction tokens, 120 words of which the last is `<image>`."""
    return EmmaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=28, patch_size=7),
        instruction_config=CLIPTextConfig(**INSTRUCTION, vocab_size=99, max_position_embeddings=77),
        text_config={"model_type": "llama", **TEXT, "vocab_size": 120, **(text or {})},
        **kwargs,
    )


def tiny_model(seed: int = 0, text: dict | None = None, **kwargs) -> EmmaForConditionalGeneration:
    """A small model with random weights everywhere, the visual alignment included."""
    torch.manual_seed(seed)
    model = EmmaForConditionalGeneration(tiny_config(text, **kwargs)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "visual" in name:
                parameter.normal_(0, 0.15)
    return model


def tiny_inputs(model: EmmaForConditionalGeneration, images: tuple[int, ...] = (1,), seed: int = 0, words: int = 8):
    """A batch with one row per entry of `images`, that many pictures in it; all rows have the same length."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    length = max(images) * config.image_seq_length + words
    rows = []
    for count in images:
        holes = count * config.image_seq_length
        ids = torch.randint(3, 110, (length - holes,), generator=generator)
        picture = torch.full((holes,), config.image_token_index)
        rows.append(torch.cat([ids[:2], picture, ids[2:]]))
    total = sum(images)
    inputs = {"input_ids": torch.stack(rows), "attention_mask": torch.ones(len(rows), length, dtype=torch.long)}
    if total:
        side, vocab_size = config.vision_config.image_size, config.instruction_config.vocab_size
        inputs["pixel_values"] = torch.randn(total, 3, side, side, generator=generator)
        inputs["instruction_input_ids"] = torch.randint(
            0, vocab_size, (total, config.instruction_length), generator=generator
        )
    return inputs


def kept_features(whole: EmmaForConditionalGeneration, inputs: dict[str, torch.Tensor], kept: int) -> torch.Tensor:
    """Z of the visual tokens that `kept` chooses, taken from those of a model that keeps and computes all."""
    v = inputs["vision_features"] if "vision_features" in inputs else whole.get_vision_features(inputs["pixel_values"])
    z = whole.get_image_features(vision_features=v, instruction_input_ids=inputs["instruction_input_ids"]).pooler_output
    return z.gather(1, select_diverse(v, kept)[..., None].expand(-1, -1, z.shape[-1]))


def logits_around(
    model: EmmaForConditionalGeneration, inputs: dict[str, torch.Tensor], features: torch.Tensor
) -> torch.Tensor:
    """Logits of the language model alone, at the positions of a prompt whose placeholders are Z (images, K, width)."""
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).clone()
    embeddings[inputs["input_ids"] == model.config.image_token_index] = features.flatten(0, 1).to(embeddings)
    language_model = model.model.language_model
    hidden = language_model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).last_hidden_state
    return model.lm_head(hidden)


def save_trainable(folder: Path, processor, seed: int = 0) -> Path:
    """A model of width 64 with random weights that can learn, with the processor of the recorded checkpoint.

    Its head is larger than an untrained one is, so that stages that freeze it can still say any word.
    """
    torch.manual_seed(seed)
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = EmmaConfig(
        vision_config=CLIPVisionConfig(**clip, image_size=28, patch_size=7),
        instruction_config=CLIPTextConfig(**INSTRUCTION, vocab_size=49408, max_position_embeddings=77),
        text_config={"model_type": "llama", **text, "vocab_size": 701, "max_position_embeddings": 400},
        image_token_index=700,
    )
    model = EmmaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in (model.lm_head.weight, model.get_input_embeddings().weight):
            parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_attentive(model: EmmaForConditionalGeneration) -> EmmaForConditionalGeneration:
    """The model with weights so large that its answers depend on images, instructions and questions."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "visual" in name:
                parameter.normal_(0, 0.3, generator=generator)
    return model


def save_listening(folder: Path, visual_tokens: int | None = None) -> Path:
    """emma-tiny with random weights between instruction and visual tokens, so large that the instruction decides words.

    The answers of the trained one hardly depend on it: they cannot tell whether an engine gave it the right one.
    """
    processor = EmmaProcessor.from_pretrained(EMMA_TINY, visual_tokens=visual_tokens)
    model = EmmaForConditionalGeneration.from_pretrained(
        EMMA_TINY, visual_tokens=visual_tokens, dtype=torch.float32
    ).eval()
    weight = model.model.modality_adaptation.visual_alignment.weight
    content = [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def answer(seed: int, instruction: str) -> tuple[int, ...]:
        image = draw(Scene.random(seed), 96)
        inputs = processor(images=image, text=prompt, instructions=instruction, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        return tuple(tokens[0, inputs["input_ids"].shape[1] :].tolist())

    torch.manual_seed(0)
    for scale in (3, 10, 30, 100):
        with torch.no_grad():
            weight[:, len(weight) :].normal_(0, scale)
        if all(len({answer(seed, text) for text in ("Describe the picture.", "", "red")}) == 3 for seed in (1, 2)):
            break
    else:
        raise AssertionError("The answers must depend on the instruction.")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def answer(model, processor, image: Path, question: str, max_new_tokens: int = 256) -> str:
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    ).to(dtype=model.dtype)  # fmt: skip
    new = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()
