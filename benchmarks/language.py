"""Prefill and decoding: EMMA against Transformers' LLaVA, plain and with a static cache and compiled decoding.

Both share towers, projector and language model, the same weights at random; an untrained EMMA is exactly LLaVA, so the
tokens of all are compared first. `--geometry 7b` is the released model's size, the default on CUDA; `small` keeps the
towers and has a language model of 160 million weights. What a step cannot be faster than is measured in the same run:
reading the weights for decoding, the products for prefill.

    python benchmarks/language.py [--geometry small] [--dtype float32] [--words 64 256] [--rows 1 4] [--runs 7]
        [--compile] [--output FOLDER]
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from measure import Report, bandwidth, in_turns, matmul_rate, ratio
from transformers import CLIPTextConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from vision import INSTRUCTION, VISION, operations

from emma_hf import EmmaConfig, EmmaForConditionalGeneration

GEOMETRIES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 8},
}
VOCABULARY, IMAGE, TOKENS = 32001, 32000, 576
WORDS, ROWS = (64, 256, 1024), (1, 4)
SHORT, LONG = 4, 36


def build(geometry: str, dtype: torch.dtype, device: torch.device) -> tuple:
    """EMMA and LLaVA that share everything both have."""
    torch.manual_seed(0)
    text = {"model_type": "llama", **GEOMETRIES[geometry], "vocab_size": VOCABULARY, "max_position_embeddings": 4096}
    vision = CLIPVisionConfig(**VISION)
    instruction = CLIPTextConfig(**INSTRUCTION, vocab_size=49408, max_position_embeddings=77)
    config = EmmaConfig(vision_config=vision, instruction_config=instruction, text_config=text, image_token_index=IMAGE)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        emma = EmmaForConditionalGeneration(config).eval()
    # What LLaVA has of its own is never used: it takes no memory.
    with torch.device("meta"):
        config = LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=TOKENS,
            vision_feature_layer=-2, vision_feature_select_strategy="default",
        )  # fmt: skip
        llava = LlavaForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    llava.model.vision_tower = emma.model.vision_tower
    llava.model.language_model, llava.lm_head = emma.model.language_model, emma.lm_head
    projector = llava.model.multi_modal_projector
    projector.linear_1, projector.linear_2 = (
        getattr(emma.model.multi_modal_projector, name) for name in ("linear_1", "linear_2")
    )
    for model in (emma, llava):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return emma, llava


def inputs_of(rows: int, words: int, dtype: torch.dtype, device: torch.device) -> tuple[dict, dict]:
    """The same prompt and picture in each row, for EMMA and for LLaVA."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(3, IMAGE, (1, words), generator=generator)
    ids = torch.cat([some[:, :8], torch.full((1, TOKENS), IMAGE), some[:, 8:]], dim=1).expand(rows, -1)
    pixels = torch.randn(1, 3, 336, 336, generator=generator).expand(rows, -1, -1, -1)
    theirs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(dtype)}
    theirs = {name: value.contiguous().to(device) for name, value in theirs.items()}
    question = torch.randint(1, 49000, (1, 77), generator=generator).expand(rows, -1)
    return {**theirs, "instruction_input_ids": question.contiguous().to(device)}, theirs


def tokens_of(model: torch.nn.Module, inputs: dict, count: int, **options: object) -> torch.Tensor:
    start = inputs["input_ids"].shape[1]
    return model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, **options)[:, start:]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--runs", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="7b" if cuda else "small")
    parser.add_argument("--words", type=int, nargs="+", default=WORDS, help="of the prompts, beside the picture")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of the batches that are decoded")
    parser.add_argument("--compile", action="store_true", help="static cache and compiled decoding too")
    parser.add_argument("--output", type=Path, help="folder for JSON and plots")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    emma, llava = build(args.geometry, dtype, device)
    layers = sum(weight.numel() for weight in emma.model.language_model.layers.parameters())
    decoded = layers + emma.lm_head.weight.numel()

    prefill, rate = Report("prefill", device), matmul_rate(device, dtype)
    for words in args.words:
        ours, theirs = inputs_of(1, words, dtype, device)
        logits = [model(**inputs, logits_to_keep=1).logits for model, inputs in ((emma, ours), (llava, theirs))]
        difference = (logits[0] - logits[1]).float().abs().max() / logits[1].float().abs().max()
        if not difference <= 16 * torch.finfo(dtype).eps:
            raise SystemExit(f"The logits differ by {difference:.2e} of the largest; no time is worth printing.")
        times = in_turns(
            {
                "emma": partial(emma, **ours, logits_to_keep=1),
                "llava": partial(llava, **theirs, logits_to_keep=1),
            },
            args.runs,
            device,
            f"prefill, {words} words",
        )
        middle = statistics.median(times["emma"])
        attention = 4 * (TOKENS + words) ** 2 * emma.config.text_config.hidden_size
        total = 2 * layers * (TOKENS + words) + attention * len(emma.model.language_model.layers) + sum(operations())
        prefill.add(
            geometry=args.geometry,
            **{"text tokens": words, "LLaVA s": statistics.median(times["llava"]), "EMMA s": middle},
            **{"EMMA / LLaVA": ratio(times["emma"], times["llava"]), "of matmul rate": total / middle / rate},
        )
    prefill.save(args.output, "text tokens", "EMMA / LLaVA", "geometry")

    decoding, read = Report("decoding", device), bandwidth(device)
    for rows in args.rows:
        ours, theirs = inputs_of(rows, args.words[0], dtype, device)
        ways = {"LLaVA": (llava, theirs, {}), "EMMA": (emma, ours, {})}
        if args.compile:
            ways["EMMA, static cache, compiled"] = (emma, ours, {"cache_implementation": "static"})
        expected = tokens_of(*ways["LLaVA"][:2], LONG)
        for name, (model, inputs, options) in ways.items():
            # Rounding may turn one nearly equal choice; a wrong model agrees in hardly any.
            agreement = (tokens_of(model, inputs, LONG, **options) == expected).float().mean().item()
            if agreement < 0.5:
                raise SystemExit(f"{name}: {agreement:.0%} of the tokens are LLaVA's; no time is worth printing.")
        calls = {
            (name, count): partial(tokens_of, model, inputs, count, **options)
            for name, (model, inputs, options) in ways.items()
            for count in (SHORT, LONG)
        }
        times = in_turns(calls, args.runs, device, f"decoding, {rows} rows")
        steps = {
            name: [(long - short) / (LONG - SHORT) for short, long in zip(times[name, SHORT], times[name, LONG])]
            for name in ways
        }
        for name in ways:
            middle = statistics.median(steps[name])
            decoding.add(
                way=name,
                rows=rows,
                **{"tokens/s": rows / middle, "LLaVA / it": ratio(steps["LLaVA"], steps[name])},
                **{"of bandwidth": decoded * dtype.itemsize / middle / read},
            )
    decoding.save(args.output, "rows", "LLaVA / it", "way")


if __name__ == "__main__":
    main()
