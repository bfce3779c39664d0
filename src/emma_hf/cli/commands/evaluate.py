"""`emma-hf evaluate`: the paper's benchmarks."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...model.errors_emma import EmmaError
from .loading_arguments import MODEL, add_loading_arguments, check_loading_arguments

if TYPE_CHECKING:
    from ...evaluation.tasks.base import Task


def add_commands(commands: Any) -> None:
    """Add `evaluate`."""
    evaluate = commands.add_parser(
        "evaluate", help="a benchmark with the own, another question's and an empty instruction"
    )
    evaluate.add_argument("model", nargs="?", **MODEL)
    evaluate.add_argument("--task", required=True, metavar="T", help="the benchmark; a wrong name lists them")
    evaluate.add_argument(
        "--data", default=".", metavar="DIR", help="folder of the benchmark's official files (default: this folder)"
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="the first N questions (default: all)")
    evaluate.add_argument(
        "--instruction",
        metavar="RULE",
        help="which text the instruction encoder gets: own, first-line, question, whole, swapped, empty, constant or "
        "authors (default: own, swapped and empty, each in its column)",
    )
    evaluate.add_argument("--authors-rule", action="store_true", help="ask as the authors' script does, for comparison")
    evaluate.add_argument("--batch-size", type=int, default=8, metavar="N", help="questions at once (default: 8)")
    evaluate.add_argument(
        "--output",
        metavar="DIR",
        help="folder of answers and report; a run that was stopped goes on (default: evaluation/T)",
    )
    add_loading_arguments(evaluate)
    evaluate.set_defaults(check_arguments=_check, run=_run)


def _check(args: argparse.Namespace) -> None:
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise EmmaError(f"`--{name.replace('_', '-')}` must be at least 1: got {value}.")
    check_loading_arguments(args)


def _run(args: argparse.Namespace) -> None:
    from ...evaluation.report import markdown, write_report
    from ...evaluation.runner import evaluate
    from ...training.plots import figure_class

    task = _task(args.task)
    # Before the run, which takes long.
    figure_class("evaluation")
    output = Path(args.output or Path("evaluation") / args.task)
    run = evaluate(
        args.model,
        task,
        args.data,
        output,
        args.limit,
        args.instruction,
        args.authors_rule,
        args.batch_size,
        args.device,
        args.dtype,
        args.quantization,
        visual_tokens=args.visual_tokens,
    )
    if run is not None:
        print(markdown(write_report(run, output)), end="")
        print(f"wrote {output}", file=sys.stderr)


def _task(name: str) -> "Task":
    from ...evaluation.tasks import TASKS
    from ...tiny.evaluation import TinyQuestions

    tasks: dict[str, Task] = {**TASKS, TinyQuestions.name: TinyQuestions()}
    if name not in tasks:
        raise EmmaError(f"`--task` must be one of {', '.join(tasks)}: got {name!r}.")
    return tasks[name]
