"""Peak memory of the converter, on a checkpoint of 1 GB and on one of 4 GB: it must not grow with the model.

Both are written first, in the authors' layout with shards of 256 MB, random weights, and real file formats. Each is
converted in a process of its own, whose peak resident memory is read, and a sample of its tensors is compared.

    python benchmarks/convert.py [--gigabytes 1 4]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm

from emma_hf.storage.tensors import MemoryTensor, write_shards

REFERENCE = Path(__file__).parent.parent / "tests" / "fixtures" / "reference" / "original"
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
    shutil.copytree(REFERENCE, folder)
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


def run(code: str, *arguments: str | Path) -> str:
    """The last word that `code` prints in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.split()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 4])
    sizes = parser.parse_args().gigabytes
    peaks = []
    print("| checkpoint | largest shard | peak resident memory |\n|---|---|---|")
    for size in tqdm(sizes, leave=False):
        with tempfile.TemporaryDirectory() as folder:
            source, output = Path(folder) / "source", Path(folder) / "output"
            written = write_checkpoint(source, int(size * 1e9))
            arguments = [source, output, source / "clip", str(SHARD)]
            peaks.append(int(run(CONVERT, *arguments)))
            verify(source, output)
            largest = max(path.stat().st_size for path in output.glob("*.safetensors"))
            print(f"| {written / 1e9:.2f} GB | {largest / 1e6:.0f} MB | {peaks[-1] / 1e6:.0f} MB |", flush=True)
    idle = int(run("import emma_hf.conversion.converter, memory; print(memory.peak_resident())"))
    print(f"\nimports alone: {idle / 1e6:.0f} MB")
    print(f"largest peak over smallest: {max(peaks) / min(peaks):.3f} (target: under 1.10)")


if __name__ == "__main__":
    main()
