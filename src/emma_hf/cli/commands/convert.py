"""`emma-hf convert`: between the authors' layout and a Hub folder."""

import argparse
import sys
from typing import Any

from ...model.errors_emma import EmmaError
from .loading_arguments import QUANTIZATIONS, add_visual_tokens, check_visual_tokens


def add_commands(commands: Any) -> None:
    """Add `convert`."""
    parser = commands.add_parser("convert", help="turn the authors' checkpoint into a Hub folder, or back")
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="folder or Hub id of the authors' checkpoint, or with --reverse of ours (default: the released one)",
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; it must not exist")
    parser.add_argument(
        "--clip",
        help="folder or Hub id of the CLIP checkpoint (default: `clip` in SOURCE, or the one that the config names)",
    )
    parser.add_argument(
        "--base",
        help="folder or Hub id of the language model that a stage-1 or LoRA folder was trained from",
    )
    parser.add_argument("--dtype", help="dtype of every tensor: float32, float16 or bfloat16 (default: as stored)")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file, such as 2GB (default: 5GB)")
    parser.add_argument(
        "--quantization", metavar=f"{{{','.join(QUANTIZATIONS)}}}", help="write a folder that loads quantized"
    )
    add_visual_tokens(parser)
    parser.add_argument("--reverse", action="store_true", help="write the authors' layout")
    parser.set_defaults(check_arguments=_check, run=_convert)


def _check(args: argparse.Namespace) -> None:
    check_visual_tokens(args)
    if not args.reverse:
        return
    if args.source is None:
        raise EmmaError("`--reverse` needs a SOURCE, a folder or Hub id of a converted model: got none.")
    if args.clip is not None:
        raise EmmaError("`--clip` names a source of weights; with `--reverse` CLIP is written, not read. Drop it.")
    if args.base is not None:
        raise EmmaError(
            "`--base` completes a stage-1 or LoRA folder; `--reverse` starts from a complete model. Drop it."
        )
    if args.quantization is not None:
        raise EmmaError("The authors' layout has no quantized form: drop `--quantization` or `--reverse`.")
    if args.visual_tokens is not None:
        raise EmmaError("The authors' code keeps all visual tokens: drop `--visual-tokens` or `--reverse`.")


def _convert(args: argparse.Namespace) -> None:
    from ...conversion.converter import DEFAULT_SOURCE, convert, reverse

    options: dict[str, Any] = {"dtype": args.dtype, "max_shard_size": args.max_shard_size}
    if args.reverse:
        reverse(args.source, args.output, **options)
    else:
        source = args.source or DEFAULT_SOURCE
        options |= {"quantization": args.quantization, "visual_tokens": args.visual_tokens}
        convert(source, args.output, clip=args.clip, base=args.base, **options)
    print(f"wrote {args.output}", file=sys.stderr)
