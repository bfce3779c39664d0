"""Runs a benchmark: asks every question once by each instruction rule, and goes on where a killed run ended."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from .. import __version__
from ..inference import load_model
from ..inference.answering import answer_by_instruction, user_messages
from ..inference.loading import FILES
from ..model.errors_emma import EmmaError
from ..model.image_processing_emma import EmmaImageProcessor
from ..model.modeling_emma import EmmaForConditionalGeneration
from ..model.processing_emma import EmmaProcessor
from ..storage.hub_access import resolve
from .answer_files import Answers, append_answers, merge_answers, read_answers, write_rows
from .instructions import columns_of, instructions_of
from .model_identity import model_hash
from .tasks.base import ImageSource, Sample, ScoredRow, Task

# The answers to a batch: the samples, the images of each, and a column of instructions for each rule, to a column of
# answers for each rule. The same image is the same object.
Answerer = Callable[[Sequence[Sample], Sequence[Sequence[Image.Image]], Sequence[Sequence[str]]], list[list[str]]]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        task: what was asked.
        header: what the answer files say about the run: task, model, instruction rules, version, settings.
        rows: for each instruction rule the scored answers, in the order of the task.
        unreadable: what is wrong with the images of a sample, by its id; such a sample was not asked and scores 0.
        notes: what the reader of the figures has to know.
    """

    task: Task
    header: Mapping[str, Any]
    rows: Mapping[str, Sequence[ScoredRow]]
    unreadable: Mapping[str, str]
    notes: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Processes:
    """The processes that share a run: this one's number, how many there are, and how to wait for the others."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


def evaluate(
    source: str | Path,
    task: Task,
    data: str | Path,
    output: str | Path,
    limit: int | None = None,
    rule: str | None = None,
    authors: bool = False,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str = "auto",
    quantization: str | None = None,
    revision: str | None = None,
    visual_tokens: int | None = None,
) -> Run | None:
    """Answer a benchmark's questions with a model. What an earlier run for the same folder answered is not asked again.

    Args:
        source: folder of a converted model, or Hub id.
        task: the benchmark.
        data: the folder of its official files.
        output: the folder of the answers. Another run's is refused.
        limit: the first questions alone. Default: all.
        rule: the instruction rule. Default: `own`, `swapped` and `empty`.
        authors: ask as the authors' script does.
        batch_size: questions at once.
        device: such as `cpu`. Default: the fastest; under `accelerate launch` one for each process.
        dtype: as in [`load_model`].
        quantization: as in [`load_model`].
        revision: of a Hub repository.
        visual_tokens: as in [`load_model`].

    Returns:
        The run; None in any process but the first.

    Raises:
        EmmaError: a wrong argument, a missing file, a question id twice, answers of another run, or see [`load_model`].
        FileNotFoundError: no such model.
    """
    columns = columns_of(rule, authors)
    samples = task.load(Path(data), authors)
    folder = resolve(source, FILES, revision)
    name = Path(source).resolve().name if Path(source).is_dir() else str(source)
    header = run_header(task, samples, columns, authors) | {
        "model": f"{name} {model_hash(folder)}",
        "dtype": dtype,
        "quantization": quantization,
        "visual_tokens": visual_tokens,
    }
    # A process may have much more to do than another: the default would end the run after ten minutes of waiting.
    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
    several = state.num_processes > 1

    def load() -> Answerer:
        chosen = state.device if several else device
        model, processor = load_model(folder, chosen, dtype, quantization, visual_tokens=visual_tokens)
        return model_answerer(model, processor, task.max_new_tokens)

    processes = Processes(state.process_index, state.num_processes, state.wait_for_everyone)
    return run_task(task, samples, columns, load, Path(output), header, limit, batch_size, processes)


def model_answerer(model: EmmaForConditionalGeneration, processor: EmmaProcessor, max_new_tokens: int) -> Answerer:
    """What answers with a model, greedily."""

    def answerer(
        batch: Sequence[Sample], images: Sequence[Sequence[Image.Image]], columns: Sequence[Sequence[str]]
    ) -> list[list[str]]:
        token = processor.image_token
        conversations = [user_messages(sample.prompt, len(row), token) for sample, row in zip(batch, images)]
        return answer_by_instruction(model, processor, conversations, images, columns, max_new_tokens=max_new_tokens)

    return answerer


def run_header(task: Task, samples: Sequence[Sample], columns: Sequence[str], authors: bool = False) -> dict[str, Any]:
    """What an answer file says about its run beside the model; `samples` is a hash of ids, prompts and truths."""
    contents = json.dumps([(each.id, each.prompt, str(each.target)) for each in samples])
    return {
        "task": task.name,
        "instruction": list(columns),
        "authors_rule": authors,
        "version": __version__,
        "samples": hashlib.sha256(contents.encode()).hexdigest()[:16],
        "max_new_tokens": task.max_new_tokens,
    }


def run_task(
    task: Task,
    samples: Sequence[Sample],
    columns: Sequence[str],
    load: Callable[[], Answerer],
    output: Path,
    header: Mapping[str, Any],
    limit: int | None = None,
    batch_size: int = 8,
    processes: Processes = Processes(),
) -> Run | None:
    """Answer the samples of a task that are not answered yet, and score them.

    Args:
        task: the benchmark.
        samples: all of its samples, also those beyond `limit`, whose instructions may be swapped in.
        columns: the instruction rules.
        load: makes what answers a batch; called if there is anything to answer, after everything was checked.
        output: the folder of the answers.
        header: the first line of each answer file.
        limit: the first samples alone.
        batch_size: samples at once.
        processes: those that share the run; each answers the samples that its number falls to.

    Returns:
        The run; None in any process but the first.

    Raises:
        EmmaError: no samples, an id twice, or answers of another run.
    """
    _check_samples(task, samples, limit, batch_size)
    texts, notes = _instructions(samples, columns)
    asked = samples[:limit]
    output.mkdir(parents=True, exist_ok=True)
    answers = read_answers(output, header)
    own = asked[processes.index :: processes.count]
    missing = {each.id: _missing(each, texts, answers) for each in own}
    pending = [sample for sample in own if missing[sample.id]]
    if pending:
        bar = tqdm(total=len(own), initial=len(own) - len(pending), desc=task.name, disable=processes.index > 0)
        with append_answers(output, header, processes.index) as file, bar:
            answerer = load()
            for batch in _batches(pending, missing, batch_size):
                write_rows(file, _answered(task, batch, missing[batch[0].id], texts, answerer))
                bar.update(len(batch))
    processes.wait()
    if processes.index:
        return None
    found = merge_answers(output, header, [(sample.id, rule) for sample in asked for rule in texts])
    rows = {rule: [_scored(sample, found[sample.id, rule]) for sample in asked] for rule in texts}
    first = [(sample.id, found[sample.id, next(iter(texts))]) for sample in asked]
    unreadable = {each: row["unreadable"] for each, row in first if "unreadable" in row}
    return Run(task, header, rows, unreadable, notes)


def _missing(sample: Sample, rules: Iterable[str], answers: Answers) -> list[str]:
    """The rules that a sample has no row of, or one that says that its images cannot be read where they now can."""
    rows = {rule: answers.get((sample.id, rule)) for rule in rules}
    broken = {rule for rule, row in rows.items() if row and "unreadable" in row}
    if broken and _read_images([sample])[1]:
        broken = set()
    return [rule for rule, row in rows.items() if row is None or rule in broken]


def _scored(sample: Sample, row: Mapping[str, Any]) -> ScoredRow:
    return ScoredRow(sample, row["answer"], row["parsed"], row["score"])


def _check_samples(task: Task, samples: Sequence[Sample], limit: int | None, batch_size: int) -> None:
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise EmmaError(f"`{name}` must be at least 1: got {value}.")
    if not samples:
        raise EmmaError(f"The task {task.name} needs one question at least: its files hold none.")
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise EmmaError(
                f"Each question of a task has an id of its own: {task.name} has {sample.id!r} twice. Is a file there "
                "twice, or are two of its versions mixed?"
            )
        seen.add(sample.id)


def _instructions(samples: Sequence[Sample], columns: Sequence[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The instructions of each rule, and notes: where nothing can be swapped, a run of several rules goes without."""
    texts, notes = {}, []
    for rule in columns:
        try:
            texts[rule] = instructions_of(samples, rule)
        except EmmaError as error:
            if rule != "swapped" or len(columns) == 1:
                raise
            notes.append(f"There is no column `swapped`: {error}")
    if not any(sample.images for sample in samples):
        notes.append("No question was shown an image, so the instruction had nothing to act on.")
    return texts, notes


def _batches(
    samples: Sequence[Sample], missing: Mapping[str, Sequence[str]], batch_size: int
) -> Iterator[list[Sample]]:
    """Samples in their order, at most `batch_size` at a time, all of which miss the same rules."""
    batch: list[Sample] = []
    for sample in samples:
        if len(batch) == batch_size or (batch and missing[batch[0].id] != missing[sample.id]):
            yield batch
            batch = []
        batch.append(sample)
    yield batch


def _answered(
    task: Task,
    batch: Sequence[Sample],
    rules: Sequence[str],
    texts: Mapping[str, Mapping[str, str]],
    answerer: Answerer,
) -> Iterator[dict[str, Any]]:
    """The rows of a batch for the answer file."""
    images, unreadable = _read_images(batch)
    readable = [sample for sample in batch if sample.id not in unreadable]
    answers: list[list[str]] = [[] for _ in rules]
    if readable:
        columns = [[texts[rule][sample.id] for sample in readable] for rule in rules]
        answers = answerer(readable, [images[sample.id] for sample in readable], columns)
    scored = [{row.sample.id: row for row in map(task.answered, readable, column)} for column in answers]
    for sample in batch:
        for rule, column in zip(rules, scored):
            row = column.get(sample.id) or ScoredRow(sample, "", None, 0.0)
            yield {
                "id": sample.id,
                "rule": rule,
                "prompt": sample.prompt,
                "instruction": texts[rule][sample.id],
                "answer": row.answer,
                "parsed": row.parsed,
                "score": row.score,
            } | ({"unreadable": unreadable[sample.id]} if sample.id in unreadable else {})


def _read_images(batch: Sequence[Sample]) -> tuple[dict[str, list[Image.Image]], dict[str, str]]:
    """The images of each sample, and by id what is wrong with those of the others. A file is read once."""
    read: dict[ImageSource, Image.Image] = {}
    images: dict[str, list[Image.Image]] = {}
    unreadable = {}
    for sample in batch:
        try:
            for source in sample.images:
                if source not in read:
                    read[source] = read_image(source)
            images[sample.id] = [read[source] for source in sample.images]
        # What decoders raise for broken bytes is not theirs alone: struct.error, SyntaxError, EOFError and others.
        except Exception as error:
            unreadable[sample.id] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return images, unreadable


def read_image(source: ImageSource) -> Image.Image:
    """An image, decoded.

    Raises:
        Exception: whatever broken bytes make a decoder raise.
    """
    if isinstance(source, Path):
        return EmmaImageProcessor().fetch_images(source)
    image = source()
    image.load()
    return image


__all__ = ["Answerer", "Processes", "Run", "evaluate", "model_answerer", "read_image", "run_header", "run_task"]
