"""The curve of a run: loss, accuracy and seconds by step, and how long the phase still takes."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from ..data.conversations import IGNORE_INDEX, encode_conversation
from ..evaluation.statistics import share
from ..model.instruction_emma import encode_instruction
from ..model.processing_emma import EmmaProcessor
from ..training.plots import figure_class
from .drawing import draw
from .evaluation import fresh_questions
from .learner import TinyLearner
from .questions import FAMILIES
from .rows import TinyEmmaCollator

# Seed of the questions of the curve, which no evaluation and no replication has.
CURVE_SEED, CURVE_QUESTIONS = 100, 256
# Accuracy is measured after so many steps. The remaining time is said after so many steps of this start.
MEASURED_STEPS, ESTIMATING_STEPS = 500, 25
# Ticks of a loss.
LOSSES = (0.1, 0.2, 0.5, 1, 2, 5)


class CurveCallback(TrainerCallback):
    """Writes a line of JSON for each loss that is logged: `phase`, `step`, `steps`, `loss`, `seconds` of the phase.

    Lines past the checkpoint that a stopped run goes on from are taken back. `seconds` are those of all starts.

    Args:
        path: file to append to.
        phase: name of the phase.
        measure: accuracy by family of the model, which lines of each [`MEASURED_STEPS`] and the last have too.
    """

    def __init__(self, path: Path, phase: str, measure: Callable[[Any], dict[str, float]] | None = None) -> None:
        self.path, self.phase, self.measure = path, phase, measure

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        lines = read_curve(self.path)
        kept = [line for line in lines if line["phase"] != self.phase or line["step"] <= state.global_step]
        partial = self.path.with_suffix(".part")
        partial.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
        partial.replace(self.path)
        earlier = [line["seconds"] for line in kept if line["phase"] == self.phase]
        self.first_step, self.begin, self.earlier = state.global_step, time.time(), max(earlier, default=0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        steps = state.global_step - self.first_step
        if steps == ESTIMATING_STEPS:
            seconds = (time.time() - self.begin) / steps
            minutes = round(seconds * (state.max_steps - state.global_step) / 60)
            tqdm.write(
                f"{self.phase}: step {state.global_step} of {state.max_steps}, {seconds:.2f} s each; this phase ends "
                f"in about {minutes // 60} h {minutes % 60:02} min",
                file=sys.stderr,
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs or not state.is_world_process_zero:
            return
        line = {"phase": self.phase, "step": state.global_step, "steps": state.max_steps, "loss": logs["loss"]}
        line["seconds"] = round(self.earlier + time.time() - self.begin)
        if self.measure and (state.global_step % MEASURED_STEPS == 0 or state.global_step == state.max_steps):
            line["accuracy"] = self.measure(model)
        with self.path.open("a") as file:
            file.write(f"{json.dumps(line)}\n")


class QuickAccuracy:
    """Accuracy on a few fresh questions, from one forward pass.

    An answer counts as right if each of its tokens, its end included, is the likeliest after those before it: what
    greedy decoding then says is this answer.

    Args:
        model: the model whose towers encode the images; they do not change.
        processor: its processor.
        count: number of questions.
    """

    def __init__(self, model: TinyLearner, processor: EmmaProcessor, count: int = CURVE_QUESTIONS) -> None:
        questions = fresh_questions(count, CURVE_SEED)
        items = []
        for scene, question in questions:
            asked = {"from": "human", "value": f"<image>\n{question.text}"}
            input_ids, labels = encode_conversation(processor, [asked, {"from": "gpt", "value": question.answer}])
            instruction = encode_instruction(processor.instruction_tokenizer, question.text)
            pixels = processor.image_processor(draw(scene), return_tensors="pt")["pixel_values"].to(model.device)
            with torch.no_grad():
                features = model.get_vision_features(pixels).cpu()
            items.append(
                {
                    "input_ids": torch.tensor(input_ids),
                    "labels": torch.tensor(labels),
                    "excluded_tokens": torch.full((len(labels),), -1),
                    "instruction_input_ids": torch.tensor([instruction]),
                    "vision_features": features,
                }
            )
        self.families = [question.family for _, question in questions]
        self.batch = TinyEmmaCollator(processor)(items)

    @torch.no_grad()
    def __call__(self, model: TinyLearner) -> dict[str, float]:
        """Share of right answers of all, and by family."""
        is_training = model.training
        logits = model.eval()(**{name: value.to(model.device) for name, value in self.batch.items()}).logits.cpu()
        model.train(is_training)
        # As in `generate`, no answer holds an image.
        logits[:, model.config.image_token_index] = -torch.inf
        rows, tokens = (self.batch["labels"] != IGNORE_INDEX).nonzero(as_tuple=True)
        wrong = set(rows[logits.argmax(-1) != self.batch["labels"][rows, tokens]].tolist())
        groups = {"all": self.families, **{name: [name] for name in FAMILIES}}
        return {
            name: share(row not in wrong for row, family in enumerate(self.families) if family in group)["share"]
            for name, group in groups.items()
        }


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The lines that [`CurveCallback`] wrote, but for a last one that was cut off; none where there is no file."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def plot_curve(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw the losses of CLIP and of the second stage, and the second stage's accuracy.

    Args:
        lines: what [`CurveCallback`] wrote.
        path: file to write; its suffix decides the format.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figure = figure_class()(figsize=(14, 4), layout="constrained")
    clip, finetune, accuracy = figure.subplots(1, 3)
    for axes, phase, unit in ((clip, "clip", "nats per image"), (finetune, "finetune", "nats per token")):
        points = [(line["step"], line["loss"]) for line in lines if line["phase"] == phase]
        axes.semilogy(*zip(*points), color="#0072B2")
        axes.set(title=f"{phase}: loss", ylabel=f"loss ({unit})")
        axes.set_yticks(LOSSES, LOSSES)
        axes.minorticks_off()
    measured = {line["step"]: line["accuracy"] for line in lines if "accuracy" in line}
    for family in FAMILIES:
        shares = [100 * found[family] for found in measured.values()]
        accuracy.plot(list(measured), shares, linewidth=0.8, alpha=0.7, label=family)
    rights = [round(CURVE_QUESTIONS * found["all"]) for found in measured.values()]
    figures = [share(number < right for number in range(CURVE_QUESTIONS)) for right in rights]
    low, middle, high = ([100 * row[name] for row in figures] for name in ("low", "share", "high"))
    accuracy.plot(list(measured), middle, "o-", color="black", label="all, with 95% interval")
    accuracy.fill_between(list(measured), low, high, color="black", alpha=0.15)
    accuracy.set(title=f"finetune: {CURVE_QUESTIONS} fresh questions", ylabel="right answers (%)", ylim=(0, 100))
    accuracy.legend(loc="upper left", bbox_to_anchor=(1, 1))
    for axes in (clip, finetune, accuracy):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


__all__ = ["CurveCallback", "QuickAccuracy", "plot_curve", "read_curve"]
