"""Prefill and decoding: EMMA against Transformers' LLaVA, plain and with a static cache and compiled decoding.

Both share towers, projector and language model, the same random weights; an untrained EMMA is exactly LLaVA, so the
tokens of all are compared first. `--size 7b` is the released model's, the default on CUDA; `160m` keeps the towers and
has a language model of 160 million weights. The lower limit of a step is measured in the same run: reading the weights
for decoding, the products for prefill.

    python benchmarks/language_model.py [--size 160m] [--dtype float32] [--words 64 256] [--rows 1 4] [--runs 7]
        [--compile] [--output FOLDER]
"""

import argparse
from functools import partial
from statistics import median

import torch
from common import (
    LANGUAGE_MODELS,
    VISUAL_TOKENS,
    Report,
    argument_parser,
    bandwidth,
    build_pair,
    emma_config,
    for_llava,
    in_turns,
    matmul_rate,
    random_batch,
    ratio,
)
from vision import operations, verify

# New tokens of two generations, whose difference in time is that of the tokens between.
SHORT, LONG = 4, 36


def same_rows(rows: int, words: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """The same prompt and image in each row."""
    batch = random_batch(1, words, dtype, device)
    return {name: value.repeat(rows, *[1] * (value.ndim - 1)) for name, value in batch.items() if name != "labels"}


def new_tokens(model: torch.nn.Module, inputs: dict, count: int, **options: object) -> torch.Tensor:
    start = inputs["input_ids"].shape[1]
    return model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, **options)[:, start:]


def measure_prefill(report: Report, emma: torch.nn.Module, llava: torch.nn.Module, args: argparse.Namespace) -> None:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    rate = matmul_rate(device, dtype)
    decoder = emma.model.language_model.layers
    weights = sum(weight.numel() for weight in decoder.parameters())
    for words in args.words:
        inputs = same_rows(1, words, dtype, device)
        alternatives = {
            "emma": partial(emma, **inputs, logits_to_keep=1),
            "llava": partial(llava, **for_llava(inputs), logits_to_keep=1),
        }
        ours, theirs = (run().logits for run in alternatives.values())
        verify(f"{words} words, logits", ours, theirs, tolerance=16)
        times = in_turns(alternatives, args.runs, f"prefill, {words} words")
        attention = 4 * (VISUAL_TOKENS + words) ** 2 * emma.config.text_config.hidden_size * len(decoder)
        total = 2 * weights * (VISUAL_TOKENS + words) + attention + sum(operations())
        report.add(
            "Prefill",
            **{"language model": args.size, "text tokens": words},
            **{"LLaVA, s": median(times["llava"]), "EMMA, s": median(times["emma"])},
            **{"EMMA / LLaVA": ratio(times["emma"], times["llava"])},
            **{"of the matmul rate": total / median(times["emma"]) / rate},
        )


def measure_decoding(report: Report, emma: torch.nn.Module, llava: torch.nn.Module, args: argparse.Namespace) -> None:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    limit = bandwidth(device)
    read = sum(weight.nbytes for weight in emma.model.language_model.layers.parameters()) + emma.lm_head.weight.nbytes
    for rows in args.rows:
        inputs = same_rows(rows, args.words[0], dtype, device)
        generations = {
            "LLaVA": partial(new_tokens, llava, for_llava(inputs)),
            "EMMA": partial(new_tokens, emma, inputs),
        }
        if args.compile:
            generations["EMMA, static cache, compiled"] = partial(
                new_tokens, emma, inputs, cache_implementation="static"
            )
        expected = generations["LLaVA"](LONG)
        for name, generate in generations.items():
            # Rounding may turn one nearly equal choice; a wrong model agrees in hardly any.
            agreement = (generate(LONG) == expected).float().mean().item()
            if agreement < 0.5:
                raise SystemExit(f"{name}: {agreement:.0%} of the tokens are LLaVA's; no time is worth printing.")
        calls = {
            (name, count): partial(generate, count) for name, generate in generations.items() for count in (SHORT, LONG)
        }
        times = in_turns(calls, args.runs, f"decoding, {rows} rows")
        steps = {
            name: [(long - short) / (LONG - SHORT) for short, long in zip(times[name, SHORT], times[name, LONG])]
            for name in generations
        }
        for name, taken in steps.items():
            report.add(
                "Decoding",
                **{"language model": args.size, "model": name, "rows": rows},
                **{"tokens/s": rows / median(taken), "times faster than LLaVA": ratio(steps["LLaVA"], taken)},
                **{"of the bandwidth": read / median(taken) / limit},
            )


@torch.no_grad()
def main() -> None:
    parser = argument_parser(__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--runs", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--size", choices=LANGUAGE_MODELS, default="7b" if cuda else "160m", help="language model")
    parser.add_argument("--words", type=int, nargs="+", default=[64, 256, 1024], help="text tokens of the prompts")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4], help="rows of the batches that are decoded")
    parser.add_argument("--compile", action="store_true", help="static cache and compiled decoding too")
    args = parser.parse_args()
    report = Report("language_model", args)
    emma, llava = build_pair(emma_config(args.size), getattr(torch, args.dtype), torch.device(args.device))
    measure_prefill(report, emma, llava, args)
    measure_decoding(report, emma, llava, args)
    report.save()
    report.plot("Prefill", "text tokens", "EMMA / LLaVA", "language model")
    report.plot("Decoding", "rows", "times faster than LLaVA", "model")


if __name__ == "__main__":
    main()
