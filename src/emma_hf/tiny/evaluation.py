"""How often emma-tiny is right: questions about scenes it never saw, by family, and what its captions invent."""

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..inference import answer
from ..model.modeling_emma import EmmaForConditionalGeneration
from ..model.processing_emma import EmmaProcessor
from ..training.plots import figure_class
from .drawing import draw
from .questions import FAMILIES, Question, ask, caption_question
from .rows import TEST_SEEDS
from .scenes import COLOURS, SHAPES, SIZES, Chance, Scene

# Questions of one evaluation have seeds of their own, up to so many.
MOST_QUESTIONS = 10_000_000
YES_NO = ("existence", "position", "same")
_NAMED = re.compile(rf"({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")


def fresh_questions(count: int, seed: int = 0) -> list[tuple[Scene, Question]]:
    """Fresh scenes, a question each, as many of every family.

    A third of the scenes has a pair of colour and shape that training never showed; a third of the questions is worded
    as training never worded one.
    """
    found: list[tuple[Scene, Question]] = []
    place = TEST_SEEDS + seed * MOST_QUESTIONS
    while len(found) < count:
        place += 1
        # Not the scene's own: its first number decides how many things there are.
        chance = Chance(place << 32)
        scene = Scene.random(place, held_out=chance.maybe(1 / 3))
        question = ask(scene, chance, FAMILIES[len(found) % len(FAMILIES)], held_out_wording=chance.maybe(1 / 3))
        if question is not None:
            found.append((scene, question))
    return found


def answers(
    model: EmmaForConditionalGeneration,
    processor: EmmaProcessor,
    asked: list[tuple[Scene, str]],
    batch_size: int = 64,
    max_new_tokens: int = 8,
) -> list[str]:
    """What the model says to each question about a scene."""
    said: list[str] = []
    for start in tqdm(range(0, len(asked), batch_size), desc="answers", delay=2):
        batch = asked[start : start + batch_size]
        conversations = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for _, text in batch
        ]
        images = [[draw(scene)] for scene, _ in batch]
        said += answer(model, processor, conversations, images, max_new_tokens=max_new_tokens)
    return said


def evaluate_tiny(
    model: str | Path,
    questions: int = 5000,
    captions: int = 500,
    seed: int = 0,
    output: str | Path | None = None,
    **load: Any,
) -> dict[str, Any]:
    """Answer fresh questions, caption fresh scenes, and count.

    Args:
        model: folder of emma-tiny.
        questions: how many.
        captions: how many scenes to caption.
        seed: of the questions.
        output: folder for `evaluation.json`, `evaluation.md` (a table), `evaluation.png` and `answers.jsonl`.
        **load: of `from_pretrained`, such as `dtype` or `quantization_config`.

    Returns:
        `accuracy`, `yes_no` and `captions`: figures by name. A share is `{"right", "of", "share", "low", "high"}`, the
        last two its 95% interval.
    """
    if output is not None:
        figure_class()
    processor = EmmaProcessor.from_pretrained(model)
    loaded = EmmaForConditionalGeneration.from_pretrained(model, **load).eval()
    asked = fresh_questions(questions, seed)
    said = answers(loaded, processor, [(scene, question.text) for scene, question in asked])
    right = [is_right(text, question.answer) for text, (_, question) in zip(said, asked)]
    result = {"accuracy": accuracy(asked, right), "yes_no": yes_no(asked, said)}
    if captions:
        scenes = [Scene.random(TEST_SEEDS + seed * MOST_QUESTIONS + MOST_QUESTIONS - 1 - i) for i in range(captions)]
        wanted = [(scene, caption_question(Chance(scene.seed))) for scene in scenes]
        result["captions"] = hallucinations(scenes, answers(loaded, processor, wanted, max_new_tokens=96))
    if output is not None:
        _write(Path(output), result, asked, said, right)
    return result


def is_right(said: str, answer: str) -> bool:
    """Whether the words are those of the answer; capitals and a full stop do not matter."""
    return said.strip().rstrip(".").lower() == answer.lower()


def share(hits: Iterable[bool]) -> dict[str, float]:
    """A share and its 95% interval (Wilson 1927)."""
    hits = list(hits)
    count, z = len(hits), 1.959964
    if not count:
        return {"right": 0, "of": 0, "share": math.nan, "low": math.nan, "high": math.nan}
    found = sum(hits) / count
    middle = (found + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(found * (1 - found) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return {"right": sum(hits), "of": count, "share": found, "low": middle - half, "high": middle + half}


def accuracy(asked: list[tuple[Scene, Question]], right: list[bool]) -> dict[str, dict[str, float]]:
    """Share of right answers: of all, of each family, and of what training showed and never showed."""

    def of(chosen: Callable[[Question], bool]) -> dict[str, float]:
        return share(hit for hit, (_, question) in zip(right, asked) if chosen(question))

    groups: dict[str, Callable[[Question], bool]] = {"all": lambda question: True}
    for family in FAMILIES:
        groups[family] = lambda question, family=family: question.family == family  # type: ignore[misc]
    groups["seen pairs"] = lambda question: not question.held_out_pair
    groups["held-out pairs"] = lambda question: question.held_out_pair
    groups["seen wordings"] = lambda question: not question.held_out_wording
    groups["held-out wordings"] = lambda question: question.held_out_wording
    return {name: of(chosen) for name, chosen in groups.items()}


def yes_no(asked: list[tuple[Scene, Question]], said: list[str]) -> dict[str, float]:
    """Precision, recall and F1 of "yes", and its share among the predictions."""
    pairs = [
        (is_right(text, "yes"), is_right(question.answer, "yes"))
        for text, (_, question) in zip(said, asked)
        if question.family in YES_NO
    ]
    true = sum(predicted and actual for predicted, actual in pairs)
    predicted, actual = (sum(column) for column in zip(*pairs))
    precision, recall = true / max(predicted, 1), true / max(actual, 1)
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    return {"questions": len(pairs), "precision": precision, "recall": recall, "f1": f1, "yes": predicted / len(pairs)}


def hallucinations(scenes: list[Scene], captions: list[str]) -> dict[str, Any]:
    """What captions name: how much of it is not there, and how much of what is there they name.

    A thing is its colour and shape, as in "a small red star"; one named twice must be there twice.
    """
    invented, found, whole = [], [], []
    for scene, text in zip(scenes, captions):
        left = [thing.pair for thing in scene.things]
        misses = 0
        for _, colour, shape in _NAMED.findall(text.lower()):
            if (colour, shape) in left:
                left.remove((colour, shape))
                invented.append(False)
            else:
                misses += 1
                invented.append(True)
        found += [False] * len(left) + [True] * (len(scene.things) - len(left))
        whole.append(misses > 0)
    return {
        "named things that are not there": share(invented),
        "captions that name such a thing": share(whole),
        "things that are named": share(found),
    }


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
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
    """Draw the shares of right answers with their intervals.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figures = {name: row for name, row in result["accuracy"].items() if row["of"]}
    figure = figure_class()(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    places = range(len(figures))
    shares = [100 * row["share"] for row in figures.values()]
    spread = [[100 * abs(row["share"] - row[end]) for row in figures.values()] for end in ("low", "high")]
    colours = ["#444444" if name == "all" else "#4878a8" if name in FAMILIES else "#c87838" for name in figures]
    axes.barh(places, shares, xerr=spread, color=colours, ecolor="#222222", capsize=3)
    axes.set_yticks(places, list(figures))
    axes.invert_yaxis()
    axes.set(xlabel="right answers (%), with 95% intervals", xlim=(min(50.0, min(shares) - 5), 100))
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def _write(
    folder: Path, result: dict[str, Any], asked: list[tuple[Scene, Question]], said: list[str], right: list[bool]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "evaluation.md").write_text(table(result))
    plot(result, folder / "evaluation.png")
    with open(folder / "answers.jsonl", "w", encoding="utf-8") as file:
        for (scene, question), text, hit in zip(asked, said, right):
            row = {"seed": scene.seed, **vars(question), "said": text, "right": hit}
            # Of training alone.
            del row["unshown"]
            file.write(json.dumps(row) + "\n")


__all__ = ["evaluate_tiny", "fresh_questions", "table"]
