"""Small things that several tests need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPVisionConfig

from emma_hf import EMMA_TINY, EmmaConfig, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.tiny.scenes import Scene, draw

IMAGE_TOKENS = 16
AUTHORS_VOCABULARY = 700

# The authors' names of the weights whose gradients are recorded, and ours.
GRADIENTS = {
    "lm_head.weight": "lm_head.weight",
    "model.layers.0.self_attn.q_proj.weight": "model.language_model.layers.0.self_attn.q_proj.weight",
    "model.mm_projector.0.weight": "model.multi_modal_projector.linear_1.weight",
    "model.mm_projector.2.bias": "model.multi_modal_projector.linear_2.bias",
    "model.vision_tower.image_text_infusion.bias": "model.modality_adaptation.visual_alignment.bias",
    "model.vision_tower.image_text_infusion.weight": "model.modality_adaptation.visual_alignment.weight",
    "model.vision_tower.text_projection.bias": "model.modality_adaptation.instruction_projection.bias",
    "model.vision_tower.text_projection.weight": "model.modality_adaptation.instruction_projection.weight",
}

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


def recorded_inputs(cases: dict[str, torch.Tensor], name: str, image_id: int = 700) -> dict[str, torch.Tensor]:
    """Inputs of a recorded case, each -200 expanded to the placeholders of one image; padding is 0."""
    rows, masks = [], []
    ids = cases[f"{name}.input_ids"]
    mask = cases.get(f"{name}.attention_mask", torch.ones_like(ids))
    for row, kept in zip(ids.tolist(), mask.tolist()):
        expanded = []
        for token, keep in zip(row, kept):
            if keep:
                expanded += [image_id] * IMAGE_TOKENS if token == -200 else [token]
        rows.append(torch.tensor(expanded))
        masks.append(torch.ones(len(expanded), dtype=torch.long))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True),
        "attention_mask": pad(masks, batch_first=True),
        "pixel_values": cases[f"{name}.pixel_values"],
        "instruction_input_ids": cases[f"{name}.instruction_input_ids"],
    }


def authors_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy over the authors' vocabulary, which has no row for `<image>`."""
    logits = logits[:, :-1, :AUTHORS_VOCABULARY].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def recorded_labels(cases: dict[str, torch.Tensor]) -> torch.Tensor:
    """The recorded labels, with no loss on the placeholders that stand for an image."""
    rows = []
    masks = cases["train.attention_mask"]
    for ids, labels, mask in zip(cases["train.input_ids"], cases["train.labels"], masks):
        row = []
        for token, label, keep in zip(ids.tolist(), labels.tolist(), mask.tolist()):
            if keep:
                row += [-100] * 16 if token == -200 else [label]
        rows.append(torch.tensor(row))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}


def run_python(code: str, *arguments: str | Path, cwd: Path | None = None, importable: bool = True, **environment: str):
    """Run `code` in a fresh process, offline; with `importable=False` the package cannot be imported there."""
    hide = "import sys; sys.modules['emma_hf'] = None\n"
    return subprocess.run(
        [sys.executable, "-c", ("" if importable else hide) + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**OFFLINE, **environment},
        timeout=300,
    )


def run_processes(script: Path, *arguments: str | Path, processes: int = 2, timeout: int = 240, **environment: str):
    """Run `script` in several processes that share the steps of a training (torchrun, gloo)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**OFFLINE, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
        timeout=timeout,
    )


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


def save_listening(folder: Path) -> Path:
    """emma-tiny with random weights between instruction and visual tokens, so large that the instruction decides words.

    The answers of the trained one hardly depend on it: they cannot tell whether an engine gave it the right one.
    """
    processor = EmmaProcessor.from_pretrained(EMMA_TINY)
    model = EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, dtype=torch.float32).eval()
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


def save_rows(path: Path, plain: bool = False) -> Path:
    """Eight rows in LLaVA's format about the recorded pictures; one has none unless `plain`."""
    pictures = ["photo.jpg", "palette.png", "rgba.png", "tall_gray.png", "tiny.png", "wide.png", "cmyk.jpg"]
    rows = []
    for number, picture in enumerate(pictures):
        question = "<image>" if plain else f"<image>\nWhat is picture {number}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is {picture.split('.')[0]}."}]
        rows.append({"id": str(number), "image": picture, "conversations": turns})
    if plain:
        rows.append({**rows[0], "id": "7"})
    else:
        turns = [{"from": "human", "value": "Hello there"}, {"from": "gpt", "value": "Good morning."}]
        rows.append({"id": "7", "conversations": turns})
    path.write_text(json.dumps(rows))
    return path
