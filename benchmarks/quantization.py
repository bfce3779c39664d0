"""4-bit and 8-bit weights against bfloat16: memory by component, peak while loading, answers, speed of decoding.

Memory of the 7B geometry is computed from shapes, by a rule that is first compared with the bytes of a loaded
emma-tiny. The peak while loading is that of a process that reads random weights of a billion parameters, written in
shards. Answers are emma-tiny's, to the same fresh questions as in bfloat16. Formats are loaded and decode in turns.

    python benchmarks/quantization.py [--questions 2000] [--loads 3] [--runs 7] [--output FOLDER]
"""

import json
import math
import statistics
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from common import Report, argument_parser, emma_config, in_turns, quartiles, ratio, run_python
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
# Bytes of the files of the checkpoint that is loaded: the towers of 7B and a language model of a billion parameters.
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


def report_memory(report: Report) -> None:
    """The 7B geometry, computed by a rule that is exact for emma-tiny."""
    for name in FORMATS:
        held, rule = measured(load(EMMA_TINY, name)), computed(load(EMMA_TINY, "bf16"), name)
        if held != rule:
            raise SystemExit(f"The rule is wrong for {name}: {rule} by rule, {held} in memory.")
    with torch.device("meta"):
        model = EmmaForConditionalGeneration(EmmaConfig())
    found = {name: computed(model, name) for name in FORMATS}
    for component in COMPONENTS:
        sizes = {f"{name}, GB": found[name][component] / 1e9 for name in FORMATS}
        report.add("Memory of the 7B geometry, computed", component=component, **sizes)
    sizes = {name: sum(found[name].values()) for name in FORMATS}
    report.add(
        "Memory of the 7B geometry, computed",
        component="all",
        **{f"{name}, GB": size / 1e9 for name, size in sizes.items()},
    )


def write_checkpoint(folder: Path) -> None:
    torch.manual_seed(0)
    model = EmmaForConditionalGeneration(emma_config("1b", vocab_size=32064)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=SHARD)


def loading_memory(folder: Path, name: str) -> dict[str, int]:
    """Bytes of the weights, of the memory that belongs to no file after loading, and of its peak in this process."""
    load(EMMA_TINY, name)
    before = anonymous()
    with sampled_peak() as peak:
        model = load(folder, name)
    return {"weights": sum(measured(model).values()), "after": anonymous() - before, "peak": peak[0]}


# In processes of their own: this one must not hold the memory.
WRITE = """
import sys
from quantization import Path, write_checkpoint
write_checkpoint(Path(sys.argv[1]))
print("written")
"""
LOAD = """
import json, sys
from pathlib import Path
from quantization import loading_memory
print(json.dumps(loading_memory(Path(sys.argv[1]), sys.argv[2])))
"""


def report_loading(report: Report, folder: Path, loads: int) -> None:
    found = in_turns(
        {name: name for name in FORMATS},
        loads,
        "loading",
        lambda name: json.loads(run_python(LOAD, folder, name)),
        warmup=0,
    )
    for name, runs in found.items():
        sizes = {f"{what}, GB": statistics.median(run[what] for run in runs) / 1e9 for what in runs[0]}
        above_a_shard = [max(0, run["peak"] - SHARD) / run["weights"] for run in runs]
        report.add(
            "Loading, pages that are mapped from files apart",
            **{"format": name, **sizes, "peak less one shard / weights": quartiles(above_a_shard)},
        )


def report_answers(report: Report, questions: int) -> None:
    processor = EmmaProcessor.from_pretrained(EMMA_TINY)
    asked = fresh_questions(questions, seed=1)
    said = {
        name: answers(load(EMMA_TINY, name), processor, [(scene, question.text) for scene, question in asked])
        for name in FORMATS
    }
    correct = {
        name: [is_right(text, question.answer) for text, (_, question) in zip(texts, asked)]
        for name, texts in said.items()
    }
    for name in FORMATS:
        pairs = [after - before for before, after in zip(correct["bf16"], correct[name])]
        change = 100 * statistics.fmean(pairs)
        spread = 100 * 1.96 * statistics.stdev(pairs) / math.sqrt(len(pairs))
        report.add(
            f"Answers of emma-tiny to {questions} questions",
            **{"format": name, "correct, %": 100 * statistics.fmean(correct[name])},
            **{"against bf16, points [95%]": (change, change - spread, change + spread)},
            **{"same answer, %": 100 * statistics.fmean(a == b for a, b in zip(said["bf16"], said[name]))},
        )


def tokens_a_second(model: EmmaForConditionalGeneration, tokens: int = 24) -> float:
    """Of decoding in batch 1, the first token apart."""
    ids = torch.arange(100, 132)[None]
    generate = partial(model.generate, input_ids=ids, do_sample=False)
    start = time.perf_counter()
    first = generate(min_new_tokens=1, max_new_tokens=1)
    middle = time.perf_counter()
    whole = generate(min_new_tokens=tokens, max_new_tokens=tokens)
    end = time.perf_counter()
    if first.shape[1] != 33 or whole.shape[1] != 32 + tokens or not torch.equal(first, whole[:, :33]):
        raise SystemExit("The first token depends on how many follow it.")
    return (tokens - 1) / (end - middle - (middle - start))


def report_speed(report: Report, folder: Path, runs: int) -> None:
    models = {name: load(folder, name) for name in FORMATS}
    rates = in_turns(models, runs, "decoding", tokens_a_second)
    for name, rate in rates.items():
        report.add(
            "Decoding, batch 1",
            **{
                "format": name,
                "tokens/s": statistics.median(rate),
                "times faster than bf16": ratio(rate, rates["bf16"]),
            },
        )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--questions", type=int, default=2000, help="questions to emma-tiny (default: 2000)")
    parser.add_argument("--loads", type=int, default=3, help="processes that load each format (default: 3)")
    parser.add_argument("--runs", type=int, default=7, help="rounds of decoding (default: 7)")
    args = parser.parse_args()
    report = Report("quantization", args)
    report.about["versions"]["bitsandbytes"] = version("bitsandbytes")
    report_memory(report)
    report_answers(report, args.questions)
    with tempfile.TemporaryDirectory() as folder:
        run_python(WRITE, folder)
        report_loading(report, Path(folder), args.loads)
        report_speed(report, Path(folder), args.runs)
    report.save()


if __name__ == "__main__":
    main()
