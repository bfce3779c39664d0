"""Training and measuring the rows of the replication, and the file that their results are appended to."""

import json
import math
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ... import EMMA_TINY, __version__
from ...analysis import VisionPath
from ...analysis.gates import TURN
from ...data.conversations import IGNORE_INDEX
from ...evaluation.model_identity import model_hash
from ...evaluation.statistics import share
from ...inference.instruction_rules import swap_instructions
from ...model.errors_emma import EmmaError
from ...model.modeling_emma import EmmaForConditionalGeneration
from ...model.processing_emma import EmmaProcessor
from ...storage.folders import read_json, write_json
from ..drawing import draw
from ..questions import Question
from ..recipe import has_fast_bfloat16
from ..rows import vision_features
from ..scenes import Scene, SeededRandom
from .arms import (
    ALL,
    ARMS,
    CONSTANT_INSTRUCTION,
    FEW,
    SECOND_RATE,
    SECOND_SEEDS,
    Arm,
    ReplicationModel,
    Row,
    Task,
)
from .questions import (
    SMALLEST,
    TEST_SCENES,
    Encoded,
    TrainingRows,
    collate,
    encode,
    end_tokens,
    instruction_ids,
    questions_of_test,
    training_question,
)

# A language model that begins as emma-tiny's goes on where that one's training ended: with fewer and smaller steps.
CONTINUED_ROWS, CONTINUED_RATE = 1 / 16, 0.1
# Questions that the gate index and the share of F are computed from.
MEASURED_QUESTIONS = 256


@dataclass(frozen=True)
class ReplicationBudget:
    """Length of the runs. A row of the table with the same budget and seed trains on the same questions in any arm.

    Args:
        images: images that all rows train on.
        rows: questions of a run whose language model begins at random; of others a share of [`CONTINUED_ROWS`].
        batch_size: questions of a step.
        learning_rate: highest learning rate of AdamW in such a run; in others [`CONTINUED_RATE`] times as high.
        scenes: test images, each with a question of every family that it allows.
        mean_questions: questions over which the text term is averaged for the start.
        families: families of questions in training and test.
    """

    images: int = 20_000
    rows: int = 160_000
    batch_size: int = 64
    learning_rate: float = 2e-3
    scenes: int = 700
    mean_questions: int = 512
    families: tuple[str, ...] = ("colour", "shape")

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return {**asdict(self), "families": list(self.families)}

    def steps(self, task: Task) -> int:
        """Steps of a run."""
        return round(self.rows * (CONTINUED_ROWS if task.width is None else 1)) // self.batch_size

    def rate(self, task: Task) -> float:
        """Highest learning rate of a run."""
        return self.learning_rate * (CONTINUED_RATE if task.width is None else 1)


@dataclass
class Towers:
    """emma-tiny, whose towers no arm trains, with its processor. H of an instruction is computed once.

    Args:
        tiny: emma-tiny. Its other modules become those of the model that is trained.
        processor: its processor.
    """

    tiny: EmmaForConditionalGeneration
    processor: EmmaProcessor
    _known: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls) -> "Towers":
        """emma-tiny as the package ships it, in float32."""
        tiny = EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, dtype=torch.float32)
        return cls(tiny.eval().requires_grad_(False), EmmaProcessor.from_pretrained(EMMA_TINY))

    def ids(self, texts: Iterable[str]) -> torch.Tensor:
        """Ids of instructions, (instructions, instruction length)."""
        return torch.tensor([instruction_ids(text, self.processor) for text in texts])

    @torch.no_grad()
    def read(self, arm: Arm, instructions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """H and the index of the end token of each row of ids; of no rows where the arm does not read them."""
        if not arm.reads:
            return torch.empty(0), torch.empty(0, dtype=torch.long)
        rows = [tuple(row) for row in instructions.tolist()]
        new = [row for row in dict.fromkeys(rows) if row not in self._known]
        if new:
            self._known |= dict(zip(new, self.tiny.model.get_instruction_features(torch.tensor(new))))
        return torch.stack([self._known[row] for row in rows]), end_tokens(instructions, self.processor)


SMOKE = ReplicationBudget(images=64, rows=2048, batch_size=32, scenes=16, mean_questions=64)


def replicate(
    rows: Sequence[Row], output: str | Path, work: str | Path, budget: ReplicationBudget | None = None
) -> list[dict[str, Any]]:
    """Train and measure rows, each appended to `output` when it is done; rows that are there already are left out.

    Args:
        rows: rows of the table.
        output: JSON lines, a line for each row.
        work: folder for what several rows need: features of the images, questions in tokens.
        budget: length of the runs.

    Returns:
        The new lines.

    Raises:
        EmmaError: `output` holds a row of another budget.
    """
    budget, output, work = budget or ReplicationBudget(), Path(output), Path(work)
    known = {line["row"]: line["budget"] for line in read_results(output)}
    for name, found in known.items():
        if found != budget.as_json():
            raise EmmaError(
                f"The lines of {output} must be of one budget: row {name} has {found}, asked for is "
                f"{budget.as_json()}. Write to another file."
            )
    # Features and tokens of another emma-tiny are others.
    work /= model_hash(EMMA_TINY)
    work.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in dict.fromkeys(rows):
        if row.name not in known:
            lines.append(run_row(row, work, budget))
            with open(output, "a", encoding="utf-8") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    return lines


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a results file, none where there is no file.

    Raises:
        EmmaError: a line that is not JSON; the text names it.
    """
    path = Path(path)
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else (), 1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise EmmaError(f"Each line of {path} must be JSON: line {number} is not ({error}). Remove it.") from error
    return lines


def run_row(row: Row, work: Path, budget: ReplicationBudget) -> dict[str, Any]:
    """Train one row and measure it. Returns its line."""
    start = time.time()
    torch.manual_seed(row.seed)
    towers = Towers.load()
    images = vision_features(
        towers.tiny, towers.processor, budget.images, work / f"vision_features-{budget.images}.f16"
    )
    model = ReplicationModel(towers.tiny, row, mean_text_term(towers, budget))
    if model.arm.film:
        features, ends = towers.read(model.arm, _some_instructions(towers, budget))
        model.standardize_end_tokens(features[torch.arange(len(ends)), ends])
    if row.width is not None:
        model.narrow_tokens(row.width, _features_at_the_start(model, towers, images), row.seed)
    training = _training_rows(row.seed, budget, towers.processor, work)
    losses = _train(model, towers, row, training, images, budget)
    trained = time.time()
    result = measure(model, towers, row, budget)
    return {
        "row": row.name,
        "title": ARMS[row.arm].title,
        **asdict(row),
        "budget": budget.as_json(),
        "command": f"emma-hf tiny replicate {row.name}",
        "versions": {"emma-hf": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        "machine": f"{_processor_name()}, {torch.get_num_threads()} threads",
        "seconds": {"training": round(trained - start), "test": round(time.time() - trained)},
        "loss": losses,
        **result,
    }


def _features_at_the_start(model: ReplicationModel, towers: Towers, images: np.ndarray) -> torch.Tensor:
    """Z of some training images, (images, K, text width). At the start no arm reads what an instruction says."""
    vision = torch.from_numpy(images[:MEASURED_QUESTIONS].astype(np.float32))
    ids = towers.ids([CONSTANT_INSTRUCTION] * len(vision))
    return model.image_features(vision, *towers.read(model.arm, ids)).detach()


def _some_instructions(towers: Towers, budget: ReplicationBudget) -> torch.Tensor:
    """Ids of training questions, (questions, instruction length)."""
    rng = SeededRandom(-1)
    asked = (training_question(budget.images, budget.families, rng) for _ in range(budget.mean_questions))
    return towers.ids(question.text for _, question in asked)


def mean_text_term(towers: Towers, budget: ReplicationBudget) -> torch.Tensor:
    """Mean of `Wt P` over training questions, (visual tokens, vision width): what the arms' offset begins with."""
    path = VisionPath(towers.tiny, towers.processor)
    return path.text_term(path.instruction_tokens(_some_instructions(towers, budget)).mean(0))


def _training_rows(seed: int, budget: ReplicationBudget, processor: EmmaProcessor, work: Path) -> TrainingRows:
    """The rows of a seed, from the file that the first run with it wrote."""
    path = work / f"questions-s{seed}-{budget.rows}-{budget.images}-{'-'.join(budget.families)}.json"
    if not path.is_file():
        made = TrainingRows.make(seed, budget.rows, budget.images, budget.families, processor)
        partial = path.with_suffix(".part")
        write_json(partial, asdict(made))
        partial.rename(path)
    values = read_json(path)
    return TrainingRows(**{**values, "encoded": [Encoded(**each) for each in values["encoded"]]})


def _train(
    model: ReplicationModel,
    towers: Towers,
    row: Row,
    training: TrainingRows,
    images: np.ndarray,
    budget: ReplicationBudget,
) -> list[float]:
    """Train, and return the mean loss of each twentieth of the steps, in nats per token."""
    arm, steps, size = ARMS[row.arm], budget.steps(row.task), budget.batch_size
    groups = model.parameter_groups(budget.rate(row.task), row.rate)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01)
    warm_up = max(1, round(0.03 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * max(0, step - warm_up) / steps))),
    )
    constant = instruction_ids(CONSTANT_INSTRUCTION, towers.processor)
    losses = []
    progress = tqdm(range(steps), desc=row.name)
    for step in progress:
        chosen = range(step * size, (step + 1) * size)
        encoded = training.questions(chosen)
        ids = {
            "own": [each.instruction for each in encoded],
            "shuffled": [each.instruction for each in training.questions(training.others[row] for row in chosen)],
            "constant": [constant] * size,
        }[arm.instruction]
        vision = torch.from_numpy(images[[training.images[index] for index in chosen]].astype(np.float32))
        with torch.autocast("cpu", torch.bfloat16, has_fast_bfloat16(torch.cpu.get_capabilities())):
            logits, labels, _ = _logits(model, towers, encoded, vision, torch.tensor(ids))
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_((p for group in groups for p in group["params"]), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}", refresh=False)
    parts = np.array_split(losses, min(20, len(losses)))
    return [round(float(part.mean()), 4) for part in parts]


def _logits(
    model: ReplicationModel,
    towers: Towers,
    encoded: Sequence[Encoded],
    vision: torch.Tensor,
    instructions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (labels, vocabulary) of the tokens of all answers, their labels, and the row of each."""
    # A language model that begins at random needs no system prompt: an image token among its tokens is read late.
    shared = len(encoded[0].before) if model.row.width is None else 1
    input_ids, attention_mask, is_image, labels = collate(encoded, model.arm, model.tokens, towers.processor, shared)
    features = model.image_features(vision, *towers.read(model.arm, instructions))
    states = model(input_ids, attention_mask, features, is_image, shared)
    labels = labels[:, shared + 1 :]
    learned = labels != IGNORE_INDEX
    return model.lm_head(states[:, :-1][learned]), labels[learned], learned.nonzero()[:, 0]


@torch.no_grad()
def measure(model: ReplicationModel, towers: Towers, row: Row, budget: ReplicationBudget) -> dict[str, Any]:
    """Accuracy by family under each instruction, and how much the instruction moves.

    An answer is right if every one of its tokens, the end of the sequence included, is the model's first choice after
    those before it: the answer that greedy decoding gives.

    Returns:
        `accuracy` (instruction to family to share), `hits` (instruction to one digit for each question, 1 where it is
        right), `images_right` (share of the images of which all questions are right), `smallest` (share of right
        answers about the smallest thing), `gate_index` and `question_share`.
    """
    questions = questions_of_test(budget.scenes, budget.families)
    encoded = [encode(question, towers.processor) for _, question in questions]
    vision = _test_images(towers, budget.scenes)
    instructions = _test_instructions([question for _, question in questions], row, towers)
    hits: dict[str, list[bool]] = {}
    for name, ids in instructions.items():
        hits[name] = []
        for begin in tqdm(range(0, len(encoded), budget.batch_size), desc=f"{row.name}, {name}", leave=False):
            part = slice(begin, begin + budget.batch_size)
            batch = vision[[scene for scene, _ in questions[part]]]
            logits, labels, rows = _logits(model, towers, encoded[part], batch, ids[part])
            wrong = set(rows[logits.argmax(-1) != labels].tolist())
            hits[name] += [index not in wrong for index in range(len(batch))]
    trained = hits["as trained"]
    whole = [
        all(hit for hit, (index, question) in zip(trained, questions) if index == scene and question.family != SMALLEST)
        for scene in range(budget.scenes)
    ]
    return {
        "accuracy": {name: _by_family(each, questions, budget.families) for name, each in hits.items()},
        "hits": {name: "".join(str(int(hit)) for hit in each) for name, each in hits.items()},
        "images_right": share(whole),
        "smallest": share(h for h, (_, question) in zip(trained, questions) if question.family == SMALLEST),
        **_moved(model, towers, vision[[scene for scene, _ in questions]], instructions),
    }


def _test_instructions(questions: list[Question], row: Row, towers: Towers) -> dict[str, torch.Tensor]:
    """Ids of the test's instructions (questions, instruction length), by the name of the condition."""
    own = [question.text for question in questions]
    order = SeededRandom(-2).sample(range(len(own)), len(own))
    texts = {
        "as trained": {
            "own": own,
            "shuffled": [own[index] for index in order],
            "constant": [CONSTANT_INSTRUCTION] * len(own),
        }[ARMS[row.arm].instruction]
    }
    if ARMS[row.arm].reads:
        others = swap_instructions({str(index): (each.family, each.text) for index, each in enumerate(questions)})
        swapped = [others[str(index)] for index in range(len(own))]
        texts |= {"own": own, "swapped": swapped, "empty": [""] * len(own)}
    return {name: towers.ids(each) for name, each in texts.items()}


def _by_family(
    hits: list[bool], questions: list[tuple[int, Question]], asked: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Share of right answers: of all families together, and of each."""
    groups = {"all": asked, **{family: (family,) for family in asked}}
    return {
        name: share(hit for hit, (_, question) in zip(hits, questions) if question.family in families)
        for name, families in groups.items()
    }


def _moved(
    model: ReplicationModel,
    towers: Towers,
    vision: torch.Tensor,
    instructions: dict[str, torch.Tensor],
) -> dict[str, float]:
    """How much another question of the same family moves.

    Returns:
        `gate_index`, the share of (token, hidden unit) pairs whose gate, the normal distribution function of what the
        activation is given, moves by more than [`TURN`]; and `question_share`, the mean of
        `|Wt (P - mean P)| / |F|` over questions.
    """
    if "own" not in instructions:
        return {"gate_index": 0.0, "question_share": 0.0}
    vision = vision[:MEASURED_QUESTIONS]
    own, other = (instructions[name][:MEASURED_QUESTIONS] for name in ("own", "swapped"))
    gates = [torch.special.ndtr(model.hidden(vision, *towers.read(model.arm, ids))) for ids in (own, other)]
    moved = {"gate_index": (gates[0] - gates[1]).abs().gt(TURN).float().mean().item(), "question_share": 0.0}
    if model.arm.text:
        features, _ = towers.read(model.arm, own)
        terms = model.text_term(features)
        ratio = (terms - terms.mean(0)).flatten(1).norm(dim=1) / model.fused(vision, features).flatten(1).norm(dim=1)
        moved["question_share"] = ratio.mean().item()
    return moved


def _test_images(towers: Towers, scenes: int) -> torch.Tensor:
    """V of the test images, (scenes, visual tokens, vision width), in the precision of the training images'."""
    features = []
    for begin in tqdm(range(0, scenes, 64), desc="test images", leave=False):
        images = [draw(Scene.random(TEST_SCENES + index)) for index in range(begin, min(scenes, begin + 64))]
        pixels = towers.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        features.append(towers.tiny.get_vision_features(pixels).half().float())
    return torch.cat(features)


def _processor_name() -> str:
    """Name of the CPU, where the system tells it."""
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def planned_rows(names: Iterable[str] | None = None) -> list[Row]:
    """The rows of the table, those of the primary comparison first; or the rows of names.

    With few tokens five seeds of A to E, two of F and G, and two of C, D and E with three times the rate of the text
    weights. With all tokens three seeds of A, B, C and E. Last the second experiment: six seeds more of C, D and E with
    the higher rate.
    """
    if names:
        return [Row.parse(name) for name in names]
    few = [Row.of(arm, FEW, seed) for seed in range(5) for arm in "BCDEA"]
    bounds = [Row.of(arm, FEW, seed, 3.0 if arm == "G" else 1.0) for seed in range(2) for arm in "FG"]
    rates = [Row.of(arm, FEW, seed, SECOND_RATE) for arm in "CDE" for seed in range(2)]
    many = [Row.of(arm, ALL, seed) for seed in range(3) for arm in "ABCE"]
    second = [Row.of(arm, FEW, seed, SECOND_RATE) for seed in SECOND_SEEDS for arm in "CDE"]
    return [*few, *bounds, *rates, *many, *second]


__all__ = ["SMOKE", "ReplicationBudget", "measure", "planned_rows", "read_results", "replicate", "run_row"]
