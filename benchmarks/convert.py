"""Peak memory of the converter, on a checkpoint of 1 GB and on one of 4 GB: it must not grow with the model.

Both are written first, in the authors' layout with shards of 256 MB, random weights, and real file formats. Each is
converted in processes of their own, in turns, whose peak resident memory and time are read, and a sample of its tensors
is compared.

    python benchmarks/convert.py [--gigabytes 1 4] [--runs 3] [--output FOLDER]
"""

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import (
    LANGUAGE_MODELS,
    Report,
    argument_parser,
    float16_bytes,
    in_turns,
    ratio,
    run_python,
    shapes_of,
    write_language_model,
)
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

# Of the recorded checkpoint's CLIP, which is converted as it is.
VISION_WIDTH = 32
SHARD = 256_000_000

CONVERT = """
import sys
from memory import peak_resident
from emma_hf.conversion import convert
convert(sys.argv[1], sys.argv[2], clip=sys.argv[3], max_shard_size=int(sys.argv[4]), progress=False)
print(peak_resident())
"""


def language_model(size: int) -> LlamaConfig:
    """A language model of width 2048 with as many layers as have about `size` bytes."""
    config = LlamaConfig(**LANGUAGE_MODELS["1b"], vocab_size=700)
    shapes = shapes_of(LlamaForCausalLM, config)
    layer = float16_bytes({name: shape for name, shape in shapes.items() if ".layers.0." in name})
    config.num_hidden_layers += round((size - float16_bytes(shapes)) / layer)
    return config


def verify(source: Path, output: Path) -> None:
    """Compare every seventh tensor of the language model, bit for bit."""
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    theirs = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    for name in sorted(name for name in theirs if name.startswith("model.layers"))[::7]:
        ours = name.replace("model.", "model.language_model.", 1)
        with safe_open(source / theirs[name], "pt") as first, safe_open(output / index[ours], "pt") as second:
            if not torch.equal(first.get_tensor(name), second.get_tensor(ours)):
                raise SystemExit(f"{name} was not converted exactly; no figure is worth printing.")


def convert(source: Path) -> dict[str, float]:
    """Peak memory in bytes and seconds of one conversion, imports included, whose result is compared."""
    output = source.with_name(f"{source.name}-converted")
    start = time.perf_counter()
    peak = int(run_python(CONVERT, source, output, source / "clip", SHARD))
    seconds = time.perf_counter() - start
    verify(source, output)
    shutil.rmtree(output)
    return {"peak": peak, "seconds": seconds}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 4], help="sizes of the checkpoints")
    parser.add_argument("--runs", type=int, default=3, help="conversions of each (default: 3)")
    args = parser.parse_args()
    report = Report("convert", args)
    with tempfile.TemporaryDirectory() as folder:
        sources = {size: Path(folder) / str(size) for size in sorted(args.gigabytes)}
        written = {
            size: write_language_model(source, language_model(int(size * 1e9)), VISION_WIDTH, SHARD)
            for size, source in sources.items()
        }
        found = in_turns(sources, args.runs, "conversions", convert, warmup=0)
    idle = int(run_python("import emma_hf.conversion.converter, memory; print(memory.peak_resident())"))
    peaks = {size: [each["peak"] for each in runs] for size, runs in found.items()}
    for size, runs in found.items():
        report.add(
            "Conversion, in shards of 256 MB",
            **{"checkpoint, GB": written[size] / 1e9, "peak memory, MB": statistics.median(peaks[size]) / 1e6},
            **{"of the smallest checkpoint's peak": ratio(peaks[size], peaks[min(peaks)])},
            **{"imports alone, MB": idle / 1e6, "time, s": statistics.median(each["seconds"] for each in runs)},
        )
    report.save()


if __name__ == "__main__":
    main()
