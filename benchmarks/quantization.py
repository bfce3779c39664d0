"""What 4-bit and 8-bit weights cost and save: memory by component, peak while loading, answers, speed of decoding.

Memory of the 7B geometry is computed from shapes, by a rule that is first compared with the bytes of a loaded
emma-tiny. The peak while loading is that of a process that reads random weights of a billion parameters, written in
shards. Answers are emma-tiny's, to the same fresh questions as in bfloat16; the runs of the speed follow each other in
turns.

    python benchmarks/quantization.py [--questions 2000] [--runs 7]
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from memory import anonymous, sampled_peak
from transformers import BitsAndBytesConfig

from emma_hf import EMMA_TINY, EmmaConfig, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.model.quantization_emma import bitsandbytes_config
from emma_hf.tiny.evaluation import answers, fresh_questions, is_right

FORMATS = ("bf16", "int8", "nf4")
COMPONENTS = {
    "language model, layers": "model.language_model.layers.",
    "language model, embeddings and head": ("model.language_model.", "lm_head."),
    "vision tower": "model.vision_tower.",
    "instruction encoder": "model.instruction_encoder.",
    "modality adaptation": "model.modality_adaptation.",
    "projector": "model.multi_modal_projector.",
}
# A language model of a billion parameters under the towers of 7B, and the size of its files.
LOADED = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 20, "num_attention_heads": 16}
SHARD = 200_000_000


def config_of(name: str) -> BitsAndBytesConfig | None:
    return {"bf16": None, "int8": bitsandbytes_config("8bit"), "nf4": bitsandbytes_config("4bit")}[name]


def load(folder: Path, name: str) -> EmmaForConditionalGeneration:
    config = config_of(name)
    options = {} if config is None else {"quantization_config": config}
    return EmmaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()


def component_of(name: str) -> str:
    return next(component for component, start in COMPONENTS.items() if name.startswith(start))


def computed(model: torch.nn.Module, name: str) -> dict[str, int]:
    """Bytes of the weights by component, from their shapes."""
    found = dict.fromkeys(COMPONENTS, 0)
    for key, weight in model.named_parameters():
        component, count = component_of(key), weight.numel()
        if component != "language model, layers" or weight.ndim != 2 or name == "bf16":
            found[component] += 2 * count
        elif name == "int8":
            # A scale in float32 for each row.
            found[component] += count + 4 * weight.shape[0]
        else:
            # A scale of one byte for 64 values; for 256 of these scales one in float32; and two tables.
            scales = count // 64
            found[component] += count // 2 + scales + 4 * math.ceil(scales / 256) + 4 * (16 + 256 + 1)
    return found


def measured(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of the tensors that a model holds, by component."""
    found = dict.fromkeys(COMPONENTS, 0)
    for key, weight in model.named_parameters():
        tensors = [weight.data, getattr(weight, "SCB", None)]
        state = getattr(weight, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        found[component_of(key)] += sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return found


def memory_table() -> str:
    """The 7B geometry, computed by a rule that is exact for emma-tiny."""
    for name in FORMATS:
        model = load(EMMA_TINY, name)
        held, rule = measured(model), computed(load(EMMA_TINY, "bf16"), name)
        if held != rule:
            raise SystemExit(f"The rule is wrong for {name}: {rule} by rule, {held} in memory.")
    with torch.device("meta"):
        model = EmmaForConditionalGeneration(EmmaConfig())
    columns = [computed(model, name) for name in FORMATS]
    lines = ["| 7B geometry, GB (computed) | bf16 | int8 | nf4, double |", "|---|---|---|---|"]
    for component in COMPONENTS:
        lines.append(f"| {component} | " + " | ".join(f"{column[component] / 1e9:.3f}" for column in columns) + " |")
    lines.append("| all | " + " | ".join(f"{sum(column.values()) / 1e9:.2f}" for column in columns) + " |")
    return "\n".join(lines)


def write_checkpoint(folder: Path) -> None:
    """Random weights, the towers and modality adaptation of 7B with a smaller language model."""
    torch.manual_seed(0)
    config = EmmaConfig(text_config={"model_type": "llama", "vocab_size": 32064, **LOADED})
    model = EmmaForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=SHARD)


def loading_peak(folder: Path, name: str) -> None:
    """Print, in a process of its own, bytes of the weights, of memory that is no file's afterwards, and of its peak."""
    load(EMMA_TINY, name)
    before = anonymous()
    with sampled_peak() as peak:
        model = load(folder, name)
    print(json.dumps([sum(measured(model).values()), anonymous() - before, peak[0]]))


def loading_table() -> str:
    lines = ["| loading | weights | memory after, mapped files apart | peak | peak less one shard, to weights |"]
    lines.append("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--write", folder], check=True)
        for name in FORMATS:
            command = [sys.executable, __file__, "--load", folder, "--format", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            weights, after, peak = json.loads(done.stdout.splitlines()[-1])
            columns = " | ".join(f"{value / 1e9:.2f} GB" for value in (weights, after, peak))
            lines.append(f"| {name} | {columns} | {max(0, peak - SHARD) / weights:.2f} |")
    return "\n".join(lines)


def answer_table(questions: int) -> str:
    processor = EmmaProcessor.from_pretrained(EMMA_TINY)
    asked = fresh_questions(questions, seed=1)
    said = {
        name: answers(load(EMMA_TINY, name), processor, [(scene, question.text) for scene, question in asked])
        for name in FORMATS
    }
    right = {
        name: [is_right(text, question.answer) for text, (_, question) in zip(texts, asked)]
        for name, texts in said.items()
    }
    head = f"| emma-tiny, {questions} questions | right | against bf16, points [95%] | same answer |"
    lines = [head, "|---|---|---|---|"]
    for name in FORMATS:
        pairs = [after - before for before, after in zip(right["bf16"], right[name])]
        change = 100 * statistics.fmean(pairs)
        spread = 100 * 1.96 * statistics.stdev(pairs) / math.sqrt(len(pairs))
        same = statistics.fmean(one == other for one, other in zip(said["bf16"], said[name]))
        share = statistics.fmean(right[name])
        lines.append(
            f"| {name} | {share:.1%} | {change:+.2f} [{change - spread:+.2f}, {change + spread:+.2f}] | {same:.1%} |"
        )
    return "\n".join(lines)


def speed_table(folder: Path, runs: int, tokens: int = 24) -> str:
    """Tokens a second of decoding, formats in turns."""
    models = {name: load(folder, name) for name in FORMATS}
    ids = torch.arange(100, 132)[None]

    def rate(model: EmmaForConditionalGeneration) -> float:
        options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}
        start = time.perf_counter()
        first = model.generate(input_ids=ids, **{**options, "min_new_tokens": 1, "max_new_tokens": 1})
        middle = time.perf_counter()
        whole = model.generate(input_ids=ids, **options)
        if first.shape[1] != 33 or whole.shape[1] != 32 + tokens or not torch.equal(first, whole[:, :33]):
            raise SystemExit("The first token depends on how many follow it.")
        return (tokens - 1) / (time.perf_counter() - middle - (middle - start))

    for model in models.values():
        rate(model)
    rates = [{name: rate(model) for name, model in models.items()} for _ in range(runs)]
    lines = ["| decoding, batch 1 | tokens a second | against bf16 [quartiles] |", "|---|---|---|"]
    for name in FORMATS:
        low, middle, high = statistics.quantiles([one[name] / one["bf16"] for one in rates], n=4)
        rate_of = statistics.median(one[name] for one in rates)
        lines.append(f"| {name} | {rate_of:.1f} | {middle:.2f} [{low:.2f}, {high:.2f}] |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--format", choices=FORMATS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write_checkpoint(args.write)
    elif args.load:
        loading_peak(args.load, args.format)
    else:
        print(memory_table(), loading_table(), answer_table(args.questions), sep="\n\n")
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, "--write", folder], check=True)
            print("", speed_table(Path(folder), args.runs), sep="\n")


if __name__ == "__main__":
    main()
