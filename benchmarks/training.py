"""A training step of EMMA against Transformers' LLaVA: time, peak memory, and the data path that feeds it.

Both models have CLIP's ViT-L/14-336 at random weights, the same small Llama and projector, and train the same parts
(language model and projector, EMMA its modality adaptation too). An untrained EMMA is exactly LLaVA, so loss and
gradients are compared first. Steps then alternate in one process; two neighbouring steps give one ratio. Peak memory
is read in processes of their own. Last comes what one worker needs for a row about the photo that the tests use.

    python benchmarks/training.py [--rows 4] [--pairs 12] [--dtype bfloat16]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

import emma_hf
from emma_hf import EmmaConfig, EmmaForConditionalGeneration, EmmaImageProcessor, EmmaProcessor
from emma_hf.conversion import convert
from emma_hf.data import ConversationDataset, DataCollator
from emma_hf.training import prepare

REFERENCE = Path(__file__).parent.parent / "tests" / "fixtures" / "reference"
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION |= {"image_size": 336, "patch_size": 14, "projection_dim": 768}
INSTRUCTION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
TEXT |= {"vocab_size": 32001, "model_type": "llama"}
IMAGE, SEQUENCE, WORDS = 32000, 576, 64
# Rounding of the losses' last bits, and of gradients summed over a thousand tokens, in units of the dtype's epsilon.
TOLERANCE = 50


def build(kind: str, dtype: torch.dtype) -> torch.nn.Module:
    """A model at random weights, its stage's weights free and the others frozen."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**VISION)
    if kind == "emma":
        instruction = CLIPTextConfig(**INSTRUCTION, vocab_size=49408, max_position_embeddings=77)
        config = EmmaConfig(
            vision_config=vision, instruction_config=instruction, text_config=dict(TEXT), image_token_index=IMAGE
        )
        return prepare(EmmaForConditionalGeneration(config).to(dtype), "finetune").train()
    # `llava+text` holds CLIP's text tower as well, unused: what a user has in memory who loads the same towers.
    config = LlavaConfig(vision_config=vision, text_config=dict(TEXT), image_token_index=IMAGE, image_seq_length=576)
    model = LlavaForConditionalGeneration(config).to(dtype).train()
    model.model.vision_tower.requires_grad_(False)
    if kind == "llava+text":
        instruction = CLIPTextConfig(**INSTRUCTION, vocab_size=49408, max_position_embeddings=77)
        model.text_tower = CLIPTextModel(instruction).to(dtype).requires_grad_(False)
    return model


def batch_of(kind: str, rows: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, IMAGE, (rows, WORDS), generator=generator)
    ids = torch.cat([words[:, :8], torch.full((rows, SEQUENCE), IMAGE), words[:, 8:]], dim=1)
    labels = ids.clone()
    labels[:, : SEQUENCE + WORDS // 2] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch["pixel_values"] = torch.randn(rows, 3, 336, 336, generator=generator).to(dtype)
    if kind == "emma":
        batch["instruction_input_ids"] = torch.randint(1, 49000, (rows, 77), generator=generator)
    return batch


class Step:
    """Forward, backward and AdamW on one batch."""

    def __init__(self, kind: str, rows: int, dtype: torch.dtype) -> None:
        self.model = build(kind, dtype)
        self.batch = batch_of(kind, rows, dtype)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def gradients(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.model(**self.batch).loss
        loss.backward()
        return loss.detach()

    def __call__(self) -> float:
        start = time.perf_counter()
        self.gradients()
        self.optimizer.step()
        return time.perf_counter() - start


def verify(llava: Step, emma: Step, dtype: torch.dtype) -> None:
    """Give both the same weights, and see that losses and gradients are the same."""
    theirs = llava.model.state_dict()
    missing = emma.model.load_state_dict(theirs, strict=False)
    foreign = [name for name in missing.missing_keys if "instruction" not in name and "modality" not in name]
    if foreign or missing.unexpected_keys:
        raise SystemExit(f"The models differ in {foreign + missing.unexpected_keys}.")
    bound = TOLERANCE * torch.finfo(dtype).eps
    losses = [step.gradients().double() for step in (llava, emma)]
    if abs(losses[0] - losses[1]) > bound * losses[0]:
        raise SystemExit(f"The losses differ: {losses}.")
    expected = dict(llava.model.named_parameters())
    for name, parameter in emma.model.named_parameters():
        if parameter.grad is not None and name in expected:
            gradient = expected[name].grad.double()
            difference = (parameter.grad.double() - gradient).norm() / gradient.norm()
            if difference > bound:
                raise SystemExit(f"The gradients of {name} differ by {difference:.2e} of their size.")
    print(f"Losses {losses[0]:.4f} and {losses[1]:.4f}, gradients alike.\n")


def peak_of(kind: str, rows: int, dtype: str) -> dict[str, int]:
    """Bytes: weights, resident before the first step, and at the peak of three steps, in a process of its own."""
    code = (
        "import json, sys, training\n"
        "from memory import peak_resident, resident\n"
        "step = training.Step(sys.argv[1], int(sys.argv[2]), getattr(training.torch, sys.argv[3]))\n"
        "weights = sum(parameter.nbytes for parameter in step.model.parameters())\n"
        "before = resident()\n"
        "for _ in range(3): step()\n"
        "print(json.dumps({'weights': weights, 'before': before, 'peak': peak_resident()}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    output = subprocess.run(
        [sys.executable, "-c", code, kind, str(rows), dtype], capture_output=True, text=True, env=environment
    )
    if output.returncode:
        raise SystemExit(output.stderr)
    return json.loads(output.stdout)


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


def data_path(rows: int) -> tuple[float, dict[str, float]]:
    """Seconds a row, and of these in each part, for one worker and a photo of 640 x 480."""
    from PIL import Image

    turns = [("human", "<image>\nWhat is the man in the photo wearing on his head?"), ("gpt", "He wears a hat. " * 8)]
    row = {"image": "photo.jpg", "conversations": [{"from": role, "value": text} for role, text in turns]}
    with tempfile.TemporaryDirectory() as folder:
        original, converted = REFERENCE / "original", Path(folder) / "model"
        convert(original, converted, clip=original / "clip", progress=False)
        tokenizers = EmmaProcessor.from_pretrained(converted)
        # The recorded tokenizers, and pictures of the real size.
        processor = EmmaProcessor(EmmaImageProcessor(), tokenizers.tokenizer, tokenizers.instruction_tokenizer)
        processor.tokenizer.model_max_length = 4096
        photo = Image.open(REFERENCE / "images" / "photo.jpg").convert("RGB").resize((640, 480))
        photo.save(Path(folder) / "photo.jpg", quality=90)
        path = Path(folder) / "rows.jsonl"
        path.write_text(f"{json.dumps(row)}\n" * rows)
        dataset, collate = ConversationDataset(path, processor), DataCollator(processor)
        spent = dict.fromkeys(("picture", "prompt and labels", "instruction", "collating"), 0.0)
        batch = [dataset[index] for index in range(8)]
        start = time.perf_counter()
        with (
            clock(processor, "image_processor", spent, "picture"),
            clock(emma_hf.data.datasets, "encode_conversation", spent, "prompt and labels"),
            clock(emma_hf.data.datasets, "training_instruction", spent, "instruction"),
            clock(emma_hf.data.datasets, "encode_instruction", spent, "instruction"),
        ):
            for index in range(rows):
                dataset[index]
        whole = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(rows // 8):
            collate(batch)
        spent["collating"] = time.perf_counter() - start
    whole += spent["collating"]
    return whole / rows, {label: seconds / whole for label, seconds in spent.items()}


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4, help="rows in the batch (default: 4)")
    parser.add_argument("--pairs", type=int, default=12, help="neighbouring steps (default: 12)")
    parser.add_argument("--processes", type=int, default=3, help="processes of each kind for the memory (default: 3)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: bfloat16")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    print(f"Transformers {transformers.__version__}, {args.dtype}, {args.rows} rows of {SEQUENCE + WORDS} tokens")
    print("Ratios are EMMA's over LLaVA's: median [lower, upper quartile].\n")

    llava, emma = Step("llava", args.rows, dtype), Step("emma", args.rows, dtype)
    verify(llava, emma, dtype)
    times = []
    for index in tqdm(range(args.pairs + 1), desc="steps", leave=False):
        # Which one goes first changes, so that no order is favoured; the first pair warms up.
        pair = [(step, step()) for step in ((llava, emma) if index % 2 else (emma, llava))]
        times.append((dict(pair)[llava], dict(pair)[emma]))
    times = times[1:]
    theirs, ours = (statistics.median(column) for column in zip(*times))
    step_ratio = quartiles([mine / base for base, mine in times])
    del llava, emma

    peaks = {kind: [] for kind in ("llava", "llava+text", "emma")}
    for _ in tqdm(range(args.processes), desc="memory", leave=False):
        for kind, seen in peaks.items():
            seen.append(peak_of(kind, args.rows, args.dtype))
    rows = [f"| step | {theirs:.2f} s | {ours:.2f} s | {step_ratio} |"]
    measures = {
        "weights": ("llava", lambda peak: peak["weights"]),
        "peak of the steps, above what was resident before": ("llava", lambda peak: peak["peak"] - peak["before"]),
        "peak of the process": ("llava", lambda peak: peak["peak"]),
        "peak of the process, both with CLIP's text tower": ("llava+text", lambda peak: peak["peak"]),
    }
    for label, (baseline, measure) in measures.items():
        base, mine = ([measure(peak) / 1e6 for peak in peaks[kind]] for kind in (baseline, "emma"))
        ratio = quartiles([one / other for one, other in zip(mine, base)])
        rows.append(f"| {label} | {statistics.median(base):.0f} MB | {statistics.median(mine):.0f} MB | {ratio} |")
    print("| measure | LLaVA | EMMA | ratio |\n|---|---|---|---|")
    print("\n".join(rows))

    seconds, shares = data_path(160)
    print(
        f"\nData path, one worker: {1 / seconds:.0f} rows/s; the step: {args.rows / ours:.2f} rows/s. Of a row's time:"
    )
    for label, share in shares.items():
        print(f"- {label}: {share:.0%}")
    print(f"- the rest (reading the row, tensors): {1 - sum(shares.values()):.0%}")


if __name__ == "__main__":
    main()
