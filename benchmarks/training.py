"""A training step of EMMA against Transformers' LLaVA: time, peak memory, and the data path that feeds it.

Both models have CLIP's ViT-L/14-336 at random weights, the same small Llama and projector, and train the same parts
(language model and projector, EMMA its modality adaptation too). An untrained EMMA is exactly LLaVA, so loss and
gradients are compared first. Steps then alternate in one process; two neighboring steps give one ratio. Peak memory
is read in processes of their own. Last comes what one worker needs for a row about the photo that the tests use.

    python benchmarks/training.py [--rows 4] [--runs 12] [--dtype bfloat16] [--output FOLDER]
"""

import json
import statistics
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from common import (
    REFERENCE,
    VISUAL_TOKENS,
    Report,
    argument_parser,
    emma_config,
    for_llava,
    in_turns,
    llava_config,
    quartiles,
    random_batch,
    ratio,
    run_python,
)
from PIL import Image
from transformers import CLIPTextModel, LlavaForConditionalGeneration

import emma_hf
from emma_hf import EmmaForConditionalGeneration, EmmaImageProcessor, EmmaProcessor
from emma_hf.conversion import convert
from emma_hf.data import ConversationDataset, DataCollator
from emma_hf.training import prepare

WORDS = 64
# Rounding of the losses' last bits, and of gradients summed over a thousand tokens, in units of the dtype's epsilon.
TOLERANCE = 50


def build(kind: str, dtype: torch.dtype) -> torch.nn.Module:
    """A model at random weights, its stage's weights free and the others frozen.

    `llava+text` holds CLIP's text tower as well, unused: what a user has in memory who loads the same towers.
    """
    torch.manual_seed(0)
    config = emma_config("45m")
    if kind == "emma":
        return prepare(EmmaForConditionalGeneration(config).to(dtype), "finetune").train()
    model = LlavaForConditionalGeneration(llava_config(config)).to(dtype).train()
    model.model.vision_tower.requires_grad_(False)
    if kind == "llava+text":
        model.text_tower = CLIPTextModel(config.instruction_config).to(dtype).requires_grad_(False)
    return model


class Step:
    """Forward, backward and AdamW on one batch."""

    def __init__(self, kind: str, rows: int, dtype: torch.dtype) -> None:
        self.model = build(kind, dtype)
        batch = random_batch(rows, WORDS, dtype, torch.device("cpu"))
        self.batch = batch if kind == "emma" else for_llava(batch)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def gradients(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.model(**self.batch).loss
        loss.backward()
        return loss.detach()

    def __call__(self) -> None:
        self.gradients()
        self.optimizer.step()


def verify(llava: Step, emma: Step, dtype: torch.dtype) -> None:
    """Give both the same weights, and see that losses and gradients are the same."""
    theirs = llava.model.state_dict()
    missing = emma.model.load_state_dict(theirs, strict=False)
    foreign = [name for name in missing.missing_keys if "instruction" not in name and "modality" not in name]
    if foreign or missing.unexpected_keys:
        raise SystemExit(f"The models differ in {foreign + missing.unexpected_keys}.")
    bound = TOLERANCE * torch.finfo(dtype).eps
    losses = [step.gradients().double() for step in (llava, emma)]
    if not abs(losses[0] - losses[1]) <= bound * losses[0]:
        raise SystemExit(f"The losses differ: {losses}.")
    expected = dict(llava.model.named_parameters())
    for name, parameter in emma.model.named_parameters():
        if parameter.grad is not None and name in expected:
            gradient = expected[name].grad.double()
            difference = (parameter.grad.double() - gradient).norm() / gradient.norm()
            if not difference <= bound:
                raise SystemExit(f"The gradients of {name} differ by {difference:.2e} of their size.")


PEAK = """
import json, sys
from memory import peak_resident, resident
from training import Step, torch
step = Step(sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3]))
weights = sum(parameter.nbytes for parameter in step.model.parameters())
before = resident()
for _ in range(3): step()
print(json.dumps({"weights": weights, "before": before, "peak": peak_resident()}))
"""


def peak_memory(kind: str, rows: int, dtype: str) -> dict[str, int]:
    """Bytes: weights, resident before the first step, and at the peak of three steps, in a process of its own."""
    return json.loads(run_python(PEAK, kind, rows, dtype))


@contextmanager
def clock(owner: object, name: str, spent: dict[str, float], label: str):
    """Add up the time spent in a function."""
    function = getattr(owner, name)

    def timed(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[label] += time.perf_counter() - start

    setattr(owner, name, timed)
    yield
    setattr(owner, name, function)


def data_path(batches: int, size: int = 8) -> dict[str, list[float]]:
    """Seconds a row of one worker in each part, for each batch of rows about a photo of 640 x 480."""
    turns = [("human", "<image>\nWhat is the man in the photo wearing on his head?"), ("gpt", "He wears a hat. " * 8)]
    row = {"image": "photo.jpg", "conversations": [{"from": role, "value": text} for role, text in turns]}
    with tempfile.TemporaryDirectory() as folder:
        original, converted = REFERENCE / "original", Path(folder) / "model"
        convert(original, converted, clip=original / "clip", progress=False)
        tokenizers = EmmaProcessor.from_pretrained(converted)
        # The recorded tokenizers, and images of the real size.
        processor = EmmaProcessor(EmmaImageProcessor(), tokenizers.tokenizer, tokenizers.instruction_tokenizer)
        processor.tokenizer.model_max_length = 4096
        photo = Image.open(REFERENCE / "images" / "photo.jpg").convert("RGB").resize((640, 480))
        photo.save(Path(folder) / "photo.jpg", quality=90)
        path = Path(folder) / "rows.jsonl"
        path.write_text(f"{json.dumps(row)}\n" * size)
        dataset, collate = ConversationDataset(path, processor), DataCollator(processor)
        collate([dataset[index] for index in range(size)])
        found: dict[str, list[float]] = {}
        for _ in range(batches):
            spent = dict.fromkeys(("image", "prompt and labels", "instruction", "collating", "all"), 0.0)
            start = time.perf_counter()
            with (
                clock(processor.image_processor, "encode_each", spent, "image"),
                clock(emma_hf.data.datasets, "encode_conversation", spent, "prompt and labels"),
                clock(emma_hf.data.datasets, "training_instruction", spent, "instruction"),
                clock(emma_hf.data.datasets, "encode_instruction", spent, "instruction"),
            ):
                rows = [dataset[index] for index in range(size)]
            collating = time.perf_counter()
            collate(rows)
            end = time.perf_counter()
            spent |= {"collating": end - collating, "all": end - start}
            for part, seconds in spent.items():
                found.setdefault(part, []).append(seconds / size)
    return found


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=4, help="rows in the batch (default: 4)")
    parser.add_argument("--runs", type=int, default=12, help="rounds of steps (default: 12)")
    parser.add_argument("--processes", type=int, default=3, help="processes of each kind for the memory (default: 3)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: bfloat16")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    report = Report("training", args)

    llava, emma = Step("llava", args.rows, dtype), Step("emma", args.rows, dtype)
    verify(llava, emma, dtype)
    times = in_turns({"llava": llava, "emma": emma}, args.runs, "steps")
    step = statistics.median(times["emma"])
    report.add(
        f"Training step of {args.rows} rows of {VISUAL_TOKENS + WORDS} tokens",
        **{"LLaVA, s": statistics.median(times["llava"]), "EMMA, s": step},
        **{"EMMA / LLaVA": ratio(times["emma"], times["llava"])},
    )
    del llava, emma

    kinds = {kind: kind for kind in ("llava", "llava+text", "emma")}
    measure = partial(peak_memory, rows=args.rows, dtype=args.dtype)
    peaks = in_turns(kinds, args.processes, "memory", measure, warmup=0)
    measures = {
        "weights": ("llava", lambda peak: peak["weights"]),
        "peak of the steps, above what was resident before": ("llava", lambda peak: peak["peak"] - peak["before"]),
        "peak of the process": ("llava", lambda peak: peak["peak"]),
        "peak of the process, both with CLIP's text tower": ("llava+text", lambda peak: peak["peak"]),
    }
    for label, (baseline, measure) in measures.items():
        base, mine = ([measure(peak) / 1e6 for peak in peaks[kind]] for kind in (baseline, "emma"))
        report.add(
            "Memory of training",
            **{"memory": label, "LLaVA, MB": statistics.median(base), "EMMA, MB": statistics.median(mine)},
            **{"EMMA / LLaVA": ratio(mine, base)},
        )

    parts = data_path(20)
    for part, seconds in parts.items():
        report.add(
            "Data path, one worker",
            **{"part": part, "ms a row": quartiles([1e3 * each for each in seconds])},
            **{
                "of all": ratio(seconds, parts["all"]),
                "times faster than the step": quartiles([step / args.rows / each for each in seconds]),
            },
        )
    report.save()


if __name__ == "__main__":
    main()
