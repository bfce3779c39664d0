"""What the benchmarks share: the models that are compared, measuring in turns, and the report of the results."""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

import emma_hf
from emma_hf import EmmaConfig, EmmaForConditionalGeneration
from emma_hf.storage.tensors import MemoryTensor, write_shards

HERE = Path(__file__).parent
REFERENCE = HERE.parent / "tests" / "fixtures" / "reference"

# Language models by their size. Every EMMA here has the released model's towers, which `EmmaConfig` has by default.
LANGUAGE_MODELS = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "1b": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 20, "num_attention_heads": 16},
    "160m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 8},
    "45m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8},
}
VOCABULARY, IMAGE, VISUAL_TOKENS = 32001, 32000, 576
# Places in a block of random numbers at which a tensor can begin.
PLACES = 4096

# What is measured of an alternative: a number, or several by name.
Measured = TypeVar("Measured")


def emma_config(size: str, **changes: object) -> EmmaConfig:
    """EMMA with a language model of `LANGUAGE_MODELS`, some of whose values may be changed."""
    text = {"model_type": "llama", "vocab_size": VOCABULARY, "max_position_embeddings": 4096}
    return EmmaConfig(text_config={**text, **LANGUAGE_MODELS[size], **changes})


def llava_config(config: EmmaConfig) -> LlavaConfig:
    """LLaVA with the vision tower, projector and language model of an EMMA."""
    return LlavaConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        image_token_index=config.image_token_index,
        image_seq_length=config.image_seq_length,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )


def build_pair(
    config: EmmaConfig, dtype: torch.dtype, device: torch.device
) -> tuple[EmmaForConditionalGeneration, LlavaForConditionalGeneration]:
    """EMMA at random weights, and Transformers' LLaVA that shares all modules that both have."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        emma = EmmaForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    return emma, llava_of(emma)


def llava_of(emma: EmmaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Transformers' LLaVA that shares all modules that it has in common with an EMMA; neither stops at a token."""
    # All of LLaVA's own weights are replaced: on the meta device they take no memory.
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(llava_config(emma.config)).eval()
    llava.model.vision_tower = emma.model.vision_tower
    llava.model.language_model, llava.lm_head = emma.model.language_model, emma.lm_head
    for name in ("linear_1", "linear_2"):
        setattr(llava.model.multi_modal_projector, name, getattr(emma.model.multi_modal_projector, name))
    for model in (emma, llava):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return llava


def shapes_of(model: type[nn.Module], config: object) -> dict[str, torch.Size]:
    """Names and shapes of a model's weights, without the weights."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in model(config).state_dict().items()}


def linear(inputs: int, outputs: int) -> dict[str, torch.Size]:
    """Shapes of a linear layer's weights."""
    return {"weight": torch.Size((outputs, inputs)), "bias": torch.Size((outputs,))}


def float16_bytes(shapes: dict[str, torch.Size]) -> int:
    return sum(2 * shape.numel() for shape in shapes.values())


def random_tensors(shapes: dict[str, torch.Size]) -> dict[str, MemoryTensor]:
    """Weights of small random numbers, norms near one.

    One block serves all tensors, each from a place of its own: one that stands for another would be noticed.
    """
    places = {name: zlib.crc32(name.encode()) % PLACES for name in shapes}
    largest = max(shape.numel() for shape in shapes.values())
    noise = (0.02 * torch.randn(largest + PLACES, generator=torch.Generator().manual_seed(0))).half()
    near_one = 1 + noise
    blocks = {name: near_one if "norm" in name and name.endswith("weight") else noise for name in shapes}
    return {
        name: MemoryTensor(blocks[name][places[name] :][: shape.numel()].reshape(shape))
        for name, shape in shapes.items()
    }


def write_language_model(folder: Path, config: LlamaConfig, vision_width: int, shard_size: int) -> int:
    """Write the recorded checkpoint of the authors' layout to `folder`, with a random language model of another size.

    Args:
        vision_width: inputs of the projector, which is random as well.
        shard_size: bytes of a file.

    Returns:
        Bytes of language model and projector.
    """
    shutil.copytree(REFERENCE / "original", folder)
    for path in folder.glob("model*"):
        path.unlink()
    shapes, width = shapes_of(LlamaForCausalLM, config), config.hidden_size
    for layer, inputs in (("0", vision_width), ("2", width)):
        shapes |= {f"model.mm_projector.{layer}.{name}": shape for name, shape in linear(inputs, width).items()}
    write_shards(folder, random_tensors(shapes), shard_size)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("vocab_size", "max_position_embeddings")
    edit_json(folder / "config.json", mm_hidden_size=vision_width, **{name: getattr(config, name) for name in names})
    return float16_bytes(shapes)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def random_batch(rows: int, words: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Random inputs of EMMA: `rows` prompts of one image and `words` text tokens, the second half of them learned."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, IMAGE, (rows, words), generator=generator)
    ids = torch.cat([text[:, :8], torch.full((rows, VISUAL_TOKENS), IMAGE), text[:, 8:]], dim=1)
    labels = ids.clone()
    labels[:, : VISUAL_TOKENS + words // 2] = -100
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": torch.randn(rows, 3, 336, 336, generator=generator).to(dtype),
        "instruction_input_ids": torch.randint(1, 49000, (rows, 77), generator=generator),
    }
    return {name: value.to(device) for name, value in batch.items()}


def for_llava(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs that LLaVA takes."""
    return {name: value for name, value in batch.items() if name != "instruction_input_ids"}


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, to the end of what it started on the GPU."""
    _finish()
    start = time.perf_counter()
    function()
    _finish()
    return time.perf_counter() - start


def in_turns(
    alternatives: dict[str, Callable[[], object]],
    runs: int,
    title: str,
    measure: Callable[..., Measured] = seconds,
    warmup: int = 1,
) -> dict[str, list[Measured]]:
    """What `measure` finds for each alternative in each round, after `warmup` rounds that are not counted.

    All run in each round, so that what else the machine does falls on all; every other round is in reverse order, so
    that no place in it is favored.
    """
    found: dict[str, list[Measured]] = {name: [] for name in alternatives}
    for turn in tqdm(range(runs + warmup), desc=title, leave=False):
        for name in list(alternatives)[:: -1 if turn % 2 else 1]:
            value = measure(alternatives[name])
            if turn >= warmup:
                found[name].append(value)
    return found


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def ratio(over: list[float], under: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the ratio within a round."""
    return quartiles([above / below for above, below in zip(over, under)])


def in_percent(figures: dict[str, float], middle: str = "share") -> tuple[float, float, float]:
    """Middle, low and high of a figure of `emma_hf.evaluation.statistics`, in percent."""
    return 100 * figures[middle], 100 * figures["low"], 100 * figures["high"]


def run_python(code: str, *arguments: object) -> str:
    """The last line that `code` prints in a process of its own, which can import the modules of this folder."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.splitlines()[-1]


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second of one large product, the best of ten."""
    side = 8192 if device.type == "cuda" else 2048
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds(lambda: one @ other)
    return 2 * side**3 / min(seconds(lambda: one @ other) for _ in range(10))


def bandwidth(device: torch.device) -> float:
    """Bytes a second that are read: a matrix far larger than the caches times one vector, the best of ten."""
    side = 32768 if device.type == "cuda" else 16384
    matrix = torch.ones(side, side, device=device, dtype=torch.bfloat16)
    vector = torch.ones(side, device=device, dtype=torch.bfloat16)
    seconds(lambda: matrix @ vector)
    return matrix.nbytes / min(seconds(lambda: matrix @ vector) for _ in range(10))


def argument_parser(documentation: str) -> argparse.ArgumentParser:
    """A benchmark's parser, with the argument that all have."""
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, help="folder for the results, PART.json, and plots")
    return parser


class Report:
    """The results of one part: tables on standard output and, with `--output`, `PART.json` and plots."""

    def __init__(self, part: str, args: argparse.Namespace) -> None:
        self.part, self.output = part, args.output
        self.about = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "versions": {
                "Python": platform.python_version(),
                "torch": torch.__version__,
                "Transformers": transformers.__version__,
                "emma-hf": emma_hf.__version__,
            },
            "arguments": {name: value for name, value in vars(args).items() if name != "output"},
        }
        self.tables: dict[str, list[dict]] = {}

    def add(self, table: str, **row: object) -> None:
        """Add a row to a table. Ratios are (median, lower quartile, upper quartile)."""
        self.tables.setdefault(table, []).append(row)

    def save(self) -> None:
        """Print the tables, and write them where a folder was given."""
        result = {"about": self.about, "tables": self.tables}
        print(f"\n{as_markdown(result)}")
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / f"{self.part}.json").write_text(json.dumps(result, indent=2) + "\n")

    def plot(self, table: str, across: str, plotted: str, group: str) -> None:
        """Where a folder was given, draw a column of ratios across another column, a line for each group."""
        if self.output is None:
            return
        from matplotlib.figure import Figure

        rows = self.tables[table]
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for name in dict.fromkeys(row[group] for row in rows):
            mine = [row for row in rows if row[group] == name]
            middles = [row[plotted][0] for row in mine]
            spread = [[abs(row[plotted][0] - row[plotted][side]) for row in mine] for side in (1, 2)]
            axes.errorbar([row[across] for row in mine], middles, yerr=spread, marker="o", capsize=3, label=str(name))
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xlabel=across, ylabel=plotted, title=table)
        axes.legend()
        self.output.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.output / f"{self.part}-{'-'.join(table.lower().split())}.png", dpi=150)


def as_markdown(result: dict) -> str:
    """The tables of a part's results, and a line about how they came to be."""
    about, lines = result["about"], []
    for title, rows in result["tables"].items():
        columns = list(rows[0])
        lines += [f"**{title}**", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
        lines.append("")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines.append(f"{about['machine']}; {versions}; {about['date']}{_as_options(about['arguments'])}.")
    if note := about.get("note"):
        lines[-1] += f" {note}"
    return "\n".join(lines)


def machine() -> str:
    """Models of GPU and processor, and the number of cores; never the host's name or a path."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{model}, {os.cpu_count()} cores (torch uses {torch.get_num_threads()})"


def _as_options(arguments: dict) -> str:
    """The arguments as they are typed; the default of an option that holds `None` or `False` is left out."""
    words = []
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
        words.append(" ".join([f"--{name.replace('_', '-')}", *map(str, values)]))
    return f"; `{' '.join(words)}`" if words else ""


def _cell(value: object) -> str:
    if value is None:
        return ""
    # JSON has lists for tuples.
    if isinstance(value, (tuple, list)):
        middle, low, high = (f"{round(number, 3):.4g}" for number in value)
        return f"{middle} [{low}, {high}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finish() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
