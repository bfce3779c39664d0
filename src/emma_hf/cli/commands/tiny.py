"""`emma-hf tiny`: the drawn scenes of emma-tiny, its training and its evaluation."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ... import EMMA_TINY
from ...model.errors_emma import EmmaError
from .loading_arguments import add_visual_tokens, check_visual_tokens

# Pixels. Drawing takes about 20 bytes for each of the pixels: 0.3 GB for the largest.
SMALLEST_SIDE, LARGEST_SIDE = 16, 4096
# CLIP's scenes of a later training are those of the next phase, and scenes of a later evaluation those of the
# replication, and then of training's curve.
LAST_TRAINING_SEED, LAST_EVALUATION_SEED = 3471, 49
REPLICATION = "docs/replication"


def add_commands(commands: Any) -> None:
    """Add `tiny` and its parts."""
    tiny = commands.add_parser("tiny", help="emma-tiny: draw its scenes, train it, measure it")
    parts = tiny.add_subparsers(required=True, metavar="PART")

    draw = parts.add_parser("draw", help="draw a scene that emma-tiny can answer questions about")
    draw.add_argument("output", metavar="IMAGE", help="file to write; its ending decides the format")
    draw.add_argument("--seed", type=int, default=0, help="number of the scene, at least 0 (default: 0)")
    draw.add_argument(
        "--side",
        type=int,
        default=336,
        help=f"width and height in pixels, {SMALLEST_SIDE} to {LARGEST_SIDE} (default: 336)",
    )
    draw.set_defaults(check_arguments=_check_draw, run=_draw)

    train = parts.add_parser("train", help="train it from random weights; a run that was stopped continues")
    train.add_argument("output", metavar="OUTPUT", help="folder of all phases")
    train.add_argument(
        "--seed", type=int, default=0, help=f"seed of the weights and the data, 0 to {LAST_TRAINING_SEED} (default: 0)"
    )
    train.add_argument("--smoke", action="store_true", help="a few steps of each phase")
    train.set_defaults(check_arguments=lambda args: _check_seed(args, LAST_TRAINING_SEED), run=_train)

    evaluate = parts.add_parser("evaluate", help="ask new questions and count the right answers")
    evaluate.add_argument(
        "--model", default=str(EMMA_TINY), help="folder of an emma-tiny (default: the one that ships)"
    )
    evaluate.add_argument("--questions", type=int, default=5000, help="number of questions (default: 5000)")
    evaluate.add_argument("--captions", type=int, default=500, help="number of captions (default: 500)")
    evaluate.add_argument(
        "--seed", type=int, default=0, help=f"seed of the questions, 0 to {LAST_EVALUATION_SEED} (default: 0)"
    )
    evaluate.add_argument("--output", help="folder for the table, the figure and every answer")
    add_visual_tokens(evaluate)
    evaluate.set_defaults(check_arguments=_check_evaluate, run=_evaluate)

    replicate = parts.add_parser(
        "replicate", help="train it with and without its instruction, and compare; rows that are done are left out"
    )
    replicate.add_argument(
        "rows", nargs="*", metavar="ROW", help="ARM-kTOKENS-dDEPTH-sSEED-rRATE[-wWIDTH]: C-k1-d2-s0-r1-w3"
    )
    replicate.add_argument("--all", action="store_true", help="every row of the table")
    replicate.add_argument("--report", action="store_true", help="tables and figures of the rows that are done")
    replicate.add_argument(
        "--output", default=REPLICATION, metavar="FOLDER", help=f"folder of results.jsonl (default: {REPLICATION})"
    )
    replicate.add_argument(
        "--work", default="build/replication", metavar="FOLDER", help="features and questions (default: %(default)s)"
    )
    replicate.add_argument("--smoke", action="store_true", help="a few steps for each row")
    replicate.set_defaults(check_arguments=_check_replicate, run=_replicate)


def _check_seed(args: argparse.Namespace, last: int | None = None) -> None:
    if args.seed < 0 or (last is not None and args.seed > last):
        raise EmmaError(f"`--seed` must be {'at least 0' if last is None else f'0 to {last}'}: got {args.seed}.")


def _check_draw(args: argparse.Namespace) -> None:
    _check_seed(args)
    if args.side < SMALLEST_SIDE:
        raise EmmaError(f"`--side` must be at least {SMALLEST_SIDE} pixels: got {args.side}.")
    if args.side > LARGEST_SIDE:
        raise EmmaError(f"`--side` must be at most {LARGEST_SIDE} pixels: got {args.side}.")
    folder = Path(args.output).parent
    if not folder.is_dir():
        raise EmmaError(f"IMAGE must be in a folder that exists: there is none at {folder}. Create it first.")


def _draw(args: argparse.Namespace) -> None:
    from PIL import Image

    from ...tiny import Scene, caption, draw

    if Image.registered_extensions().get(Path(args.output).suffix.lower()) not in Image.SAVE:
        raise EmmaError(f"IMAGE must end in the name of a format, such as .png or .jpg: got {args.output!r}.")
    scene = Scene.random(args.seed)
    draw(scene, args.side).save(args.output)
    print(f"wrote {args.output}: {caption(scene)}", file=sys.stderr)


def _train(args: argparse.Namespace) -> None:
    from ...tiny import train_tiny
    from ...tiny.recipe import SMOKE, Budget

    folder = train_tiny(args.output, SMOKE if args.smoke else Budget(), args.seed)
    print(f"wrote {folder}", file=sys.stderr)


def _check_evaluate(args: argparse.Namespace) -> None:
    if args.questions < 1 or args.captions < 0:
        raise EmmaError(
            f"`--questions` must be at least 1 and `--captions` at least 0: got {args.questions} and {args.captions}."
        )
    _check_seed(args, LAST_EVALUATION_SEED)
    check_visual_tokens(args)


def _evaluate(args: argparse.Namespace) -> None:
    from ...tiny.evaluation import evaluate_tiny, table

    load = {} if args.visual_tokens is None else {"visual_tokens": args.visual_tokens}
    result = evaluate_tiny(args.model, args.questions, args.captions, args.seed, args.output, **load)
    print(table(result), end="")


def _check_replicate(args: argparse.Namespace) -> None:
    if bool(args.rows) + args.all + args.report != 1:
        raise EmmaError("`tiny replicate` takes one of ROW ..., `--all` and `--report`.")


def _replicate(args: argparse.Namespace) -> None:
    from ...tiny.replication.report import write_report
    from ...tiny.replication.running import SMOKE, ReplicationBudget, planned_rows, replicate

    results = Path(args.output) / "results.jsonl"
    if args.report:
        print(write_report(results, args.output), end="")
        return
    for line in replicate(planned_rows(args.rows), results, args.work, SMOKE if args.smoke else ReplicationBudget()):
        print(f"{line['row']}: {line['accuracy']['as trained']['all']['share']:.1%} right")
