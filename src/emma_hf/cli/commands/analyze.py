"""`emma-hf analyze`: what the instruction does in a model."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import EMMA_TINY
from ...model.errors_emma import EmmaError
from .ask import decode
from .loading_arguments import add_loading_arguments, check_loading_arguments
from .tiny import LAST_EVALUATION_SEED

if TYPE_CHECKING:
    from ...analysis import Row

# Images that are shown one by one.
MOST_EXAMPLES = 4


def add_commands(commands: Any) -> None:
    """Add `analyze`."""
    analyze = commands.add_parser(
        "analyze",
        usage="%(prog)s [OPTION ...] [MODEL] [IMAGE QUESTION ...]",
        help="what the instruction does in a model: weights, gates, answers with other instructions",
    )
    analyze.add_argument(
        "words",
        nargs="*",
        metavar="MODEL, IMAGE QUESTION",
        help="folder or Hub id (default: emma-tiny), then images with a question each to show one by one",
    )
    analyze.add_argument(
        "--questions",
        metavar="FILE",
        help="JSON lines with `image`, `question` and, if known, `answer` and `kind` (default: the images and "
        "questions named, or with emma-tiny scenes that it draws)",
    )
    analyze.add_argument(
        "--count", type=int, metavar="N", help="questions of the file, or scenes (default: all, or 200 scenes)"
    )
    analyze.add_argument("--seed", type=int, default=0, help="seed of scenes and of other questions (default: 0)")
    analyze.add_argument(
        "--max-new-tokens", type=int, default=16, metavar="N", help="longest answer in tokens (default: 16)"
    )
    analyze.add_argument("--output", metavar="DIR", help="new folder for the report, its figures and its numbers")
    add_loading_arguments(analyze)
    analyze.set_defaults(check_arguments=_check, run=_run)


def _check(args: argparse.Namespace) -> None:
    words = [decode(word) for word in args.words]
    args.model = words.pop(0) if len(words) % 2 else str(EMMA_TINY)
    if args.model == EMMA_TINY.name and not Path(args.model).is_dir():
        args.model = str(EMMA_TINY)
    args.pairs = list(zip(words[::2], words[1::2]))
    if len(args.pairs) > MOST_EXAMPLES:
        raise EmmaError(
            f"`analyze` shows {MOST_EXAMPLES} images with a question at most: got {len(args.pairs)}. Put more "
            "questions into a file, and name it by `--questions`."
        )
    for _, question in args.pairs:
        if not question.strip():
            raise EmmaError(f"A question must have words: got {question!r}.")
    if args.max_new_tokens < 1:
        raise EmmaError(f"`--max-new-tokens` must be at least 1: got {args.max_new_tokens}.")
    draws_scenes = args.questions is None and args.model == str(EMMA_TINY)
    if draws_scenes and not 0 <= args.seed <= LAST_EVALUATION_SEED:
        raise EmmaError(f"`--seed` of scenes must be 0 to {LAST_EVALUATION_SEED}: got {args.seed}.")
    if args.count is not None and args.count < 2:
        raise EmmaError(f"`--count` must be at least 2, as questions are compared: got {args.count}.")
    check_loading_arguments(args)


def _run(args: argparse.Namespace) -> None:
    from ...analysis import Row, analyze, write_report
    from ...analysis.mutual_information import estimator
    from ...inference import load_model
    from ...model.image_processing_emma import EmmaImageProcessor
    from ...storage.folders import refuse_existing
    from ...training.plots import figure_class

    # Before the answers, which take long: what is missing or in the way is reported at once.
    estimator()
    if args.output is not None:
        refuse_existing(args.output)
        figure_class("analysis")
    EmmaImageProcessor().fetch_images([image for image, _ in args.pairs])
    examples = [Row(*pair) for pair in args.pairs]
    rows = _rows(args) or examples
    model, processor = load_model(
        args.model, args.device, args.dtype, args.quantization, visual_tokens=args.visual_tokens
    )
    result = analyze(model, processor, rows, examples, args.seed, args.max_new_tokens, progress=True)
    print("\n".join(result["verdict"]))
    if args.output is not None:
        shown = examples or rows[: len(result["examples"])]
        images = processor.image_processor.fetch_images([row.image for row in shown])
        print(f"wrote {write_report(result, images, args.output) / 'report.html'}", file=sys.stderr)


def _rows(args: argparse.Namespace) -> "list[Row]":
    """The questions of the file, or emma-tiny's own, or none."""
    from ...analysis import Row, read_rows

    if args.questions is not None:
        return read_rows(args.questions)[: args.count]
    if args.model == str(EMMA_TINY):
        from ...tiny.drawing import draw
        from ...tiny.evaluation import fresh_questions

        questions = fresh_questions(args.count or 200, args.seed)
        return [Row(draw(scene), question.text, question.answer, question.family) for scene, question in questions]
    if not args.pairs:
        raise EmmaError(
            "The questions of a model are named: got none. Pass `--questions FILE`, or IMAGE QUESTION pairs; emma-tiny "
            "alone draws its own."
        )
    return []
