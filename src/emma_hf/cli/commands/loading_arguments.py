"""The arguments of commands that load a model."""

import argparse
from typing import Any

from ... import EMMA_TINY
from ...model.errors_emma import EmmaError

MODEL: dict[str, Any] = {
    "default": str(EMMA_TINY),
    "metavar": "MODEL",
    "help": "folder or Hub id (default: emma-tiny, which knows drawn shapes)",
}
DTYPES = ("auto", "float32", "float16", "bfloat16")
QUANTIZATIONS = ("4bit", "8bit")


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, `--dtype`, `--quantization` and `--visual-tokens`."""
    parser.add_argument("--device", help="such as cpu or cuda (default: cuda where there is one, else cpu)")
    parser.add_argument(
        "--dtype",
        default="auto",
        metavar=f"{{{','.join(DTYPES)}}}",
        help="dtype of the computation (default: auto, as stored)",
    )
    parser.add_argument(
        "--quantization",
        metavar=f"{{{','.join(QUANTIZATIONS)}}}",
        help="smaller weights of the language model (default: as stored)",
    )
    add_visual_tokens(parser)


def add_visual_tokens(parser: argparse.ArgumentParser) -> None:
    """Add `--visual-tokens`."""
    parser.add_argument(
        "--visual-tokens", type=int, metavar="K", help="visual tokens to keep of each image (default: as stored)"
    )


def check_loading_arguments(args: argparse.Namespace) -> None:
    """Refuse values that no machine has.

    Raises:
        EmmaError: another dtype or quantization, or no visual tokens.
    """
    if args.dtype not in DTYPES:
        raise EmmaError(f"`--dtype` must be auto, float32, float16 or bfloat16: got {args.dtype!r}.")
    if args.quantization not in (None, *QUANTIZATIONS):
        raise EmmaError(f"`quantization` must be 4bit or 8bit: got {args.quantization!r}.")
    check_visual_tokens(args)


def check_visual_tokens(args: argparse.Namespace) -> None:
    """Refuse fewer than one; how many there are, the model says.

    Raises:
        EmmaError: fewer than one.
    """
    if args.visual_tokens is not None and args.visual_tokens < 1:
        raise EmmaError(f"`--visual-tokens` must be at least 1: got {args.visual_tokens}. Leave it out to keep all.")
