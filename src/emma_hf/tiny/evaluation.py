"""Evaluation of emma-tiny: accuracy on unseen scenes by family of questions, and hallucinations in captions."""

import json
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..evaluation.runner import model_answerer, run_header, run_task
from ..evaluation.statistics import share
from ..evaluation.tasks.answers import is_right
from ..evaluation.tasks.base import Sample, ScoredRow, Task
from ..inference import answer
from ..model.modeling_emma import EmmaForConditionalGeneration
from ..model.processing_emma import EmmaProcessor
from ..training.plots import figure_class
from .drawing import draw
from .questions import FAMILIES, Question, ask, caption_question
from .rows import TEST_SEEDS
from .scenes import COLORS, SHAPES, SIZES, Scene, SeededRandom

# Number of seeds that an evaluation has for itself.
SEEDS_PER_EVALUATION = 10_000_000
YES_NO = ("existence", "position", "same")
_NAMED = re.compile(rf"({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")


def fresh_questions(count: int, seed: int = 0) -> list[tuple[Scene, Question]]:
    """`count` unseen scenes with a question each, equally many of every family.

    A third of the scenes has a pair of color and shape that training never showed, and a third of the questions has a
    wording that training never used.
    """
    questions: list[tuple[Scene, Question]] = []
    scene_seed = TEST_SEEDS + seed * SEEDS_PER_EVALUATION
    while len(questions) < count:
        scene_seed += 1
        # Not the scene's own seed, whose first number decides how many things there are.
        rng = SeededRandom(scene_seed << 32)
        scene = Scene.random(scene_seed, held_out=rng.bernoulli(1 / 3))
        family = FAMILIES[len(questions) % len(FAMILIES)]
        question = ask(scene, rng, family, held_out_wording=rng.bernoulli(1 / 3))
        if question is not None:
            questions.append((scene, question))
    return questions


def answers(
    model: EmmaForConditionalGeneration,
    processor: EmmaProcessor,
    questions: list[tuple[Scene, str]],
    batch_size: int = 64,
    max_new_tokens: int = 8,
) -> list[str]:
    """The model's answer to each question about a scene."""
    predictions: list[str] = []
    for start in tqdm(range(0, len(questions), batch_size), desc="answers", delay=2):
        batch = questions[start : start + batch_size]
        conversations = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for _, text in batch
        ]
        images = [[draw(scene)] for scene, _ in batch]
        predictions += answer(model, processor, conversations, images, max_new_tokens=max_new_tokens)
    return predictions


class TinyQuestions(Task):
    """Fresh questions about drawn scenes, as a benchmark whose files are drawn.

    Args:
        count: number of questions.
        seed: seed of scenes and questions.
    """

    name, title, files, max_new_tokens = "emma-tiny", "emma-tiny's fresh questions", {}, 8

    def __init__(self, count: int = 5000, seed: int = 0) -> None:
        self.count, self.seed = count, seed

    def read(self, folder: Path) -> list[Sample]:
        return [
            _sample(scene, question.text, question.answer, question.family)
            for scene, question in fresh_questions(self.count, self.seed)
        ]

    def parse(self, answer: str, sample: Sample) -> str | None:
        return answer or None

    def score(self, parsed: str | None, sample: Sample) -> float:
        return float(parsed is not None and is_right(parsed, sample.target))


class TinyCaptions(Task):
    """Captions of drawn scenes; one that names nothing that is not there scores 1.

    Args:
        count: number of captions.
        seed: seed of the scenes.
    """

    name, title, files, max_new_tokens = "emma-tiny-captions", "emma-tiny's captions", {}, 96

    def __init__(self, count: int = 500, seed: int = 0) -> None:
        self.count, self.seed = count, seed

    def read(self, folder: Path) -> list[Sample]:
        last_seed = TEST_SEEDS + (self.seed + 1) * SEEDS_PER_EVALUATION - 1
        scenes = [Scene.random(last_seed - index) for index in range(self.count)]
        return [_sample(scene, caption_question(SeededRandom(scene.seed)), scene, "caption") for scene in scenes]

    def parse(self, answer: str, sample: Sample) -> str | None:
        return answer or None

    def score(self, parsed: str | None, sample: Sample) -> float:
        return float(parsed is not None and not _invented(sample.target, parsed)[0].count(True))


def _sample(scene: Scene, prompt: str, target: Any, family: str) -> Sample:
    return Sample(str(scene.seed), (partial(draw, scene),), prompt, prompt, prompt, target, family)


def evaluate_tiny(
    model: str | Path,
    questions: int = 5000,
    captions: int = 500,
    seed: int = 0,
    output: str | Path | None = None,
    **load: Any,
) -> dict[str, Any]:
    """Measure emma-tiny on unseen scenes.

    Args:
        model: folder of an emma-tiny.
        questions: number of questions.
        captions: number of scenes to caption.
        seed: seed of scenes and questions.
        output: folder for `evaluation.json`, `evaluation.md` (a table), `evaluation.png` and `answers.jsonl`.
        **load: arguments of `from_pretrained`, such as `dtype`, `quantization_config` or `visual_tokens`.

    Returns:
        Figures by name in `accuracy`, `yes_no` and `captions`. A share is `{"right", "of", "share", "low", "high"}`, of
        which the last two are its 95% interval.

    Raises:
        MissingPackageError: `output` is given and matplotlib is not installed.
    """
    if output is not None:
        figure_class()
        Path(output).mkdir(parents=True, exist_ok=True)
    tokens = {name: value for name, value in load.items() if name == "visual_tokens"}
    processor = EmmaProcessor.from_pretrained(model, **tokens)
    loaded = EmmaForConditionalGeneration.from_pretrained(model, **load).eval()

    def ask_all(task: Task) -> list[ScoredRow]:
        answerer = model_answerer(loaded, processor, task.max_new_tokens)
        samples, columns = task.load(Path()), ("own",)
        header = run_header(task, samples, columns)
        with tempfile.TemporaryDirectory() as folder:
            run = run_task(task, samples, columns, lambda: answerer, Path(folder), header, batch_size=64)
        return list(run.rows["own"]) if run else []

    sample = fresh_questions(questions, seed)
    predictions = [row.answer for row in ask_all(TinyQuestions(questions, seed))]
    right = [is_right(prediction, question.answer) for prediction, (_, question) in zip(predictions, sample)]
    result = {"accuracy": accuracy(sample, right), "yes_no": yes_no(sample, predictions)}
    if captions:
        rows = ask_all(TinyCaptions(captions, seed))
        result["captions"] = hallucinations([row.sample.target for row in rows], [row.answer for row in rows])
    if output is not None:
        _write(Path(output), result, sample, predictions, right)
    return result


def accuracy(questions: list[tuple[Scene, Question]], right: list[bool]) -> dict[str, dict[str, float]]:
    """Share of right answers: overall, by family, and with and without what training never showed."""

    def share_where(condition: Callable[[Question], bool]) -> dict[str, float]:
        return share(hit for hit, (_, question) in zip(right, questions) if condition(question))

    groups: dict[str, Callable[[Question], bool]] = {"all": lambda question: True}
    for family in FAMILIES:
        groups[family] = lambda question, family=family: question.family == family  # type: ignore[misc]
    groups["seen pairs"] = lambda question: not question.held_out_pair
    groups["held-out pairs"] = lambda question: question.held_out_pair
    groups["seen wordings"] = lambda question: not question.held_out_wording
    groups["held-out wordings"] = lambda question: question.held_out_wording
    return {name: share_where(condition) for name, condition in groups.items()}


def yes_no(questions: list[tuple[Scene, Question]], predictions: list[str]) -> dict[str, float]:
    """Precision, recall and F1 of "yes", and its share among the predictions."""
    pairs = [
        (is_right(prediction, "yes"), is_right(question.answer, "yes"))
        for prediction, (_, question) in zip(predictions, questions)
        if question.family in YES_NO
    ]
    true = sum(predicted and actual for predicted, actual in pairs)
    predicted, actual = (sum(pair[column] for pair in pairs) for column in (0, 1))
    precision, recall = true / max(predicted, 1), true / max(actual, 1)
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    return {
        "questions": len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes": predicted / max(len(pairs), 1),
    }


def hallucinations(scenes: list[Scene], captions: list[str]) -> dict[str, Any]:
    """Share of the named things that are not in the scene, and of the scene's things that are named.

    A thing is its color and shape, as in "a small red star"; one that is named twice must be there twice.
    """
    found = [_invented(scene, text) for scene, text in zip(scenes, captions)]
    hallucinated = [each for invented, _ in found for each in invented]
    any_hallucinated = [any(invented) for invented, _ in found]
    named = [each for _, named in found for each in named]
    return {
        "named things that are not there": share(hallucinated),
        "captions that name such a thing": share(any_hallucinated),
        "things that are named": share(named),
    }


def _invented(scene: Scene, text: str) -> tuple[list[bool], list[bool]]:
    """Of each thing that a caption names whether it is not there, and of each thing there whether it is named."""
    unnamed = [thing.pair for thing in scene.things]
    invented: list[bool] = []
    for _, color, shape in _NAMED.findall(text.lower()):
        invented.append((color, shape) not in unnamed)
        if not invented[-1]:
            unnamed.remove((color, shape))
    return invented, [False] * len(unnamed) + [True] * (len(scene.things) - len(unnamed))


def table(result: dict[str, Any]) -> str:
    """The result of [`evaluate_tiny`] as Markdown tables."""
    lines = ["| questions | right | of | share | 95% interval |", "|---|---|---|---|---|"]

    def row(name: str, figures: dict[str, float]) -> str:
        interval = f"{figures['low']:.1%} to {figures['high']:.1%}"
        return f"| {name} | {figures['right']} | {figures['of']} | {figures['share']:.1%} | {interval} |"

    lines += [row(name, figures) for name, figures in result["accuracy"].items()]
    figures = result["yes_no"]
    lines += [
        "",
        f"Of {figures['questions']} yes/no questions: precision {figures['precision']:.3f}, recall "
        f"{figures['recall']:.3f}, F1 {figures['f1']:.3f}; {figures['yes']:.1%} of the answers are yes.",
    ]
    if "captions" in result:
        lines += ["", "| captions | count | of | share | 95% interval |", "|---|---|---|---|---|"]
        lines += [row(name, figures) for name, figures in result["captions"].items()]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the accuracy of [`evaluate_tiny`] with its intervals.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figures = {name: row for name, row in result["accuracy"].items() if row["of"]}
    figure = figure_class()(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = range(len(figures))
    shares = [100 * row["share"] for row in figures.values()]
    errors = [[100 * abs(row["share"] - row[end]) for row in figures.values()] for end in ("low", "high")]
    colors = ["#444444" if name == "all" else "#4878a8" if name in FAMILIES else "#c87838" for name in figures]
    axes.barh(rows, shares, xerr=errors, color=colors, ecolor="#222222", capsize=3)
    axes.set_yticks(rows, list(figures))
    axes.invert_yaxis()
    axes.set(xlabel="right answers (%), with 95% intervals", xlim=(min(50.0, min(shares) - 5), 100))
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def _write(
    folder: Path,
    result: dict[str, Any],
    questions: list[tuple[Scene, Question]],
    predictions: list[str],
    right: list[bool],
) -> None:
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "evaluation.md").write_text(table(result))
    plot(result, folder / "evaluation.png")
    with open(folder / "answers.jsonl", "w", encoding="utf-8") as file:
        for (scene, question), prediction, hit in zip(questions, predictions, right):
            row = {"seed": scene.seed, **vars(question), "said": prediction, "right": hit}
            # These matter in training alone.
            del row["excluded_answers"]
            file.write(json.dumps(row) + "\n")


__all__ = ["evaluate_tiny", "fresh_questions", "table"]
