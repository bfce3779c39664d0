"""The released model's real size: converting, loading, answering and exporting it, and fewer visual tokens.

A checkpoint of the released geometry with random weights (14.4 GB) is written in the authors' layout, shard by shard,
with a tokenizer of 32,000 pieces trained on Python's own source. Each part runs in a process of its own, whose time and
peak memory are read. Answers are compared before they are timed: all visual tokens kept, EMMA's own first token is that
of Transformers' LLaVA with the same weights, since an untrained alignment adds nothing; the reversed checkpoint has the
bytes of the one that was converted.

    python benchmarks/released_geometry.py [--size 7b] [--layers 32] [--visual-tokens 576 192 64] [--runs 3]
                                           [--folder FOLDER] [--output FOLDER]
"""

import hashlib
import json
import shutil
import statistics
import sysconfig
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import (
    LANGUAGE_MODELS,
    Report,
    argument_parser,
    edit_json,
    in_turns,
    linear,
    llava_of,
    random_tensors,
    ratio,
    run_python,
    seconds,
    shapes_of,
    write_language_model,
)
from memory import sampled_peak
from PIL import Image
from safetensors import safe_open
from transformers import CLIPConfig, CLIPModel, DynamicCache, LlamaConfig, LlamaForCausalLM
from vision import verify

from emma_hf import EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.conversion import convert, reverse
from emma_hf.hub import export
from emma_hf.model.compat_emma import CACHE_NAME
from emma_hf.model.quantization_emma import bitsandbytes_config
from emma_hf.storage.tensors import write_shards

SHARD = 5_000_000_000
# Vision and text tower of CLIP ViT-L/14 at 336 pixels, and small ones with fewer patches.
TOWERS = {
    "released": (
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        {"image_size": 336, "patch_size": 14},
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    ),
    "small": (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2},
        {"image_size": 28, "patch_size": 7},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2},
    ),
}
INSTRUCTION_LENGTH = 77
CLIP_ALONE = {"logit_scale", "text_projection.weight", "visual_projection.weight"}
# New tokens of the longer answers.
LONG = 9
QUESTION = "USER: <image>\nWhat is the person on the left of the picture doing, and with whom? ASSISTANT:"
PART = """
import json, sys
import released_geometry
print(json.dumps(getattr(released_geometry, sys.argv[1])(*sys.argv[2:])))
"""


def sizes(size: str, layers: int, towers: str, vocabulary: int) -> dict[str, object]:
    """Configurations of the three parts, and how many visual tokens an image has."""
    vision, image, text = TOWERS[towers]
    language = {**LANGUAGE_MODELS[size], "num_hidden_layers": layers, "vocab_size": vocabulary}
    return {
        "language": LlamaConfig(**language, max_position_embeddings=4096, rms_norm_eps=1e-5),
        "clip": CLIPConfig(vision_config={**vision, **image}, text_config=text, projection_dim=text["hidden_size"]),
        "visual_tokens": (image["image_size"] // image["patch_size"]) ** 2,
    }


def train_tokenizer(path: Path, vocabulary: int) -> None:
    """Write a SentencePiece model of byte pairs, in the form of Llama's, trained on Python's own source."""
    import sentencepiece

    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    lines = (line for source in sources for line in source.read_text("utf-8", "replace").splitlines() if line.strip())
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=file, model_type="bpe", vocab_size=vocabulary, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip


def write_checkpoint(folder: Path, size: str, layers: int, towers: str, vocabulary: int) -> int:
    """Write a random checkpoint in the authors' layout, CLIP in `clip/`. Returns the bytes of the language model."""
    parts = sizes(size, layers, towers, vocabulary)
    language, clip, tokens = parts["language"], parts["clip"], parts["visual_tokens"]
    vision_width, text_width = clip.vision_config.hidden_size, clip.text_config.hidden_size
    written = write_language_model(folder, language, vision_width, SHARD)
    edit_json(folder / "config.json", tokenizer_model_max_length=2048)
    train_tokenizer(folder / "tokenizer.model", vocabulary)
    write_shards(folder / "clip", random_tensors(shapes_of(CLIPModel, clip)), SHARD)
    # As an untrained EMMA: the visual part passes V on, the text part adds nothing.
    alignment = torch.eye(tokens, tokens + INSTRUCTION_LENGTH)
    projection = {kind: torch.zeros(shape) for kind, shape in linear(text_width, vision_width).items()}
    fusion = {
        **{f"model.vision_tower.text_projection.{kind}": value for kind, value in projection.items()},
        "model.vision_tower.image_text_infusion.weight": alignment,
        "model.vision_tower.image_text_infusion.bias": torch.zeros(tokens),
    }
    torch.save(fusion, folder / "vision_tower.bin")
    edit_json(
        folder / "clip" / "config.json",
        vision_config=clip.vision_config.to_dict(),
        text_config=clip.text_config.to_dict(),
    )
    edges = {"height": clip.vision_config.image_size, "width": clip.vision_config.image_size}
    edit_json(folder / "clip" / "preprocessor_config.json", crop_size=edges, size={"shortest_edge": edges["height"]})
    return written


def digests(folder: Path) -> dict[str, str]:
    """Digests of the tensors of a folder's language model and CLIP, without those of CLIP that EMMA does not have."""
    found = {}
    for path in folder.rglob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            names = set(file.keys()) - CLIP_ALONE
            found |= {name: hashlib.sha256(file.get_tensor(name).numpy()).hexdigest() for name in names}
    return found


def measured(function: Callable[[], object]) -> dict[str, float]:
    """Seconds of a call and the most memory that it took beyond what the process had, mapped files not counted."""
    with sampled_peak() as peak:
        taken = seconds(function)
    return {"seconds": taken, "peak": peak[0]}


# Each of the following runs in a process of its own. Arguments are words, results are JSON.


def conversion(source: str, output: str) -> dict[str, float]:
    return measured(lambda: convert(source, output, clip=f"{source}/clip", progress=False))


def reversal(source: str, output: str) -> dict[str, float]:
    return measured(lambda: reverse(source, output, progress=False))


def exporting(source: str, output: str) -> dict[str, float]:
    return measured(lambda: export(source, output, repo_id="org/emma"))


def load(folder: str, quantization: str | None = None) -> EmmaForConditionalGeneration:
    options = {} if quantization is None else {"quantization_config": bitsandbytes_config(quantization)}
    return EmmaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()


def loading(folder: str) -> dict[str, float]:
    return measured(lambda: load(folder))


def loading_quantized(folder: str) -> dict[str, float]:
    """Loading in 4 bits; `quantizing` is what bitsandbytes alone takes for all layers, by those of one."""
    from bitsandbytes.functional import quantize_4bit

    config = LlamaConfig(**json.loads((Path(folder) / "config.json").read_text())["text_config"])
    shapes = shapes_of(LlamaForCausalLM, config)
    first = [shape for name, shape in shapes.items() if ".layers.0." in name and len(shape) == 2]
    weights = [torch.randn(shape, dtype=torch.bfloat16) for shape in first]
    taken = [seconds(lambda: [quantize_4bit(weight, quant_type="nf4", compress_statistics=True) for weight in weights])
             for _ in range(3)]  # fmt: skip
    return {**measured(lambda: load(folder, "4bit")), "quantizing": config.num_hidden_layers * statistics.median(taken)}


@torch.no_grad()
def answering(folder: str, runs: str, *visual_tokens: str) -> dict[str, dict[str, object]]:
    """One token and several from each number of visual tokens, and from LLaVA with all of them, in turns.

    The language model's own part of the first token, its prefill, is timed with the image's features given.
    """
    emma = load(folder)
    models = {**dict.fromkeys(visual_tokens, emma), "LLaVA": llava_of(emma)}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    prompts = {}
    for kept in visual_tokens:
        processor = EmmaProcessor.from_pretrained(folder, visual_tokens=int(kept))
        prompts[kept] = processor(images=image, text=QUESTION, return_tensors="pt").to(torch.bfloat16)
    most = max(visual_tokens, key=int)
    prompts["LLaVA"] = {name: value for name, value in prompts[most].items() if name != "instruction_input_ids"}

    def forward(name: str, **inputs: torch.Tensor) -> object:
        if name != "LLaVA":
            emma.config.visual_tokens = int(name)
        return models[name](**(inputs or prompts[name]), logits_to_keep=1)

    def generate(name: str, count: int) -> None:
        if name != "LLaVA":
            emma.config.visual_tokens = int(name)
        models[name].generate(**prompts[name], max_new_tokens=count, do_sample=False)

    calls = {}
    for name, inputs in prompts.items():
        calls |= {(name, count): partial(generate, name, count) for count in (1, LONG)}
        if name != "LLaVA":
            emma.config.visual_tokens = int(name)
            features = emma.get_image_features(inputs["pixel_values"], inputs["instruction_input_ids"]).pooler_output
            text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
            calls[name, "prefill"] = partial(forward, name, **text, image_features=features)
    outputs = {name: forward(name) for name in prompts}
    verify("logits of EMMA and LLaVA", outputs[most].logits, outputs["LLaVA"].logits, tolerance=16)
    found = in_turns(calls, int(runs), "answers", measured)
    return {
        name: {
            "prompt": inputs["input_ids"].shape[1],
            "cache": cache_bytes(outputs[name][CACHE_NAME]),
            "peak": max(each["peak"] for each in found[name, 1]),
            "seconds": {str(what): [each["seconds"] for each in found[name, what]] for of, what in calls if of == name},
        }
        for name, inputs in prompts.items()
    }


def cache_bytes(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def run(part: str, *arguments: object) -> dict:
    return json.loads(run_python(PART, part, *arguments))


def report_answers(report: Report, answers: dict[str, dict]) -> None:
    most = max(answers, key=lambda name: answers[name]["prompt"] if name != "LLaVA" else 0)
    whole = {name: each["seconds"]["1"] for name, each in answers.items()}
    for name, each in answers.items():
        times = each["seconds"]
        steps = [(long - short) / (LONG - 1) for long, short in zip(times[str(LONG)], times["1"])]
        prefill, reference = times.get("prefill"), answers[most]["seconds"]["prefill"]
        report.add(
            "Visual tokens",
            **{"visual tokens": name, "prompt, tokens": each["prompt"], "cache, MB": each["cache"] / 1e6},
            **{"first token, s": statistics.median(whole[name]), "of LLaVA's": ratio(whole[name], whole["LLaVA"])},
            **{"prefill, s": prefill and statistics.median(prefill)},
            **{"prefill, of that with all": prefill and ratio(prefill, reference)},
            **{"memory of the first token, MB": each["peak"] / 1e6, "next tokens, per s": 1 / statistics.median(steps)},
        )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--size", choices=LANGUAGE_MODELS, default="7b", help="language model (default: 7b)")
    parser.add_argument("--layers", type=int, help="of the language model (default: all)")
    parser.add_argument("--towers", choices=TOWERS, default="released", help="CLIP's towers (default: released)")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="pieces of the tokenizer (default: 32000)")
    parser.add_argument("--visual-tokens", type=int, nargs="+", default=[576, 192, 64], help="the first is all of them")
    parser.add_argument("--runs", type=int, default=3, help="rounds of answers (default: 3)")
    parser.add_argument("--folder", type=Path, help="where 29 GB are written (default: the system's temporary folder)")
    args = parser.parse_args()
    layers = args.layers or LANGUAGE_MODELS[args.size]["num_hidden_layers"]
    report = Report("released_geometry", args)
    report.about["arguments"].pop("folder")
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        source, converted, copied = (Path(place) / name for name in ("source", "converted", "copied"))
        written = write_checkpoint(source, args.size, layers, args.towers, args.vocabulary)
        before = digests(source)
        parts = {"conversion": run("conversion", source, converted)}
        shutil.rmtree(source)
        parts["loading in bfloat16"] = run("loading", converted)
        parts["loading in 4 bits"] = run("loading_quantized", converted)
        parts["of it bitsandbytes alone"] = {"seconds": parts["loading in 4 bits"].pop("quantizing"), "peak": None}
        answers = run("answering", converted, args.runs, *args.visual_tokens)
        parts["export"] = run("exporting", converted, copied)
        shutil.rmtree(copied)
        parts["back to the authors' layout"] = run("reversal", converted, source)
        if digests(source) != before:
            raise SystemExit("The reversed checkpoint is another one; no figure is worth printing.")
    for name, each in parts.items():
        report.add(
            f"A checkpoint with a language model of {written / 1e9:.3g} GB",
            **{"part": name, "time, s": each["seconds"], "peak memory, MB": each["peak"] and each["peak"] / 1e6},
        )
    report_answers(report, answers)
    report.save()


if __name__ == "__main__":
    main()
