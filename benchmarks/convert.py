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
from common import REFERENCE, Report, argument_parser, in_turns, ratio, run_python
from safetensors import safe_open

from emma_hf.storage.tensors import MemoryTensor, write_shards

WIDTH, INNER, VOCABULARY = 2048, 5504, 700
SHARD = 256_000_000

CONVERT = """
import sys
from memory import peak_resident
from emma_hf.conversion import convert
convert(sys.argv[1], sys.argv[2], clip=sys.argv[3], max_shard_size=int(sys.argv[4]), progress=False)
print(peak_resident())
"""


def layer_shapes(index: int) -> dict[str, tuple[int, ...]]:
    attention = {f"self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
    mlp = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
    norms = {"input_layernorm.weight": (WIDTH,), "post_attention_layernorm.weight": (WIDTH,)}
    shapes = {**attention, **{f"mlp.{name}.weight": shape for name, shape in mlp.items()}, **norms}
    return {f"model.layers.{index}.{name}": shape for name, shape in shapes.items()}


def write_checkpoint(folder: Path, size: int) -> int:
    """Write a checkpoint of about `size` bytes; returns how many it has."""
    shutil.copytree(REFERENCE / "original", folder)
    for path in folder.glob("model*"):
        path.unlink()
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCABULARY, WIDTH),
        "model.mm_projector.0.weight": (WIDTH, 32),
        "model.mm_projector.0.bias": (WIDTH,),
        "model.mm_projector.2.weight": (WIDTH, WIDTH),
        "model.mm_projector.2.bias": (WIDTH,),
    }
    bytes_of = lambda table: sum(2 * torch.Size(shape).numel() for shape in table.values())  # noqa: E731
    layers = round((size - bytes_of(shapes)) / bytes_of(layer_shapes(0)))
    for index in range(layers):
        shapes.update(layer_shapes(index))
    # One random block serves all tensors: what matters is their size.
    noise = torch.randn(INNER * WIDTH, generator=torch.Generator().manual_seed(0)).half()
    tensors = {name: MemoryTensor(noise[: torch.Size(shape).numel()].reshape(shape)) for name, shape in shapes.items()}
    write_shards(folder, tensors, SHARD)
    path = folder / "config.json"
    heads = WIDTH // 128
    values = {
        **json.loads(path.read_text()),
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    path.write_text(json.dumps(values))
    return bytes_of(shapes)


def verify(source: Path, output: Path) -> None:
    """Compare every hundredth tensor of the language model, bit for bit."""
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    theirs = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    for name in sorted(name for name in theirs if name.startswith("model.layers"))[::100]:
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
        written = {size: write_checkpoint(source, int(size * 1e9)) for size, source in sources.items()}
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
