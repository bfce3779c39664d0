"""`emma-hf serve`: an OpenAI-compatible server."""

import argparse
import math
from pathlib import Path
from typing import Any

from ...model.errors_emma import EmmaError
from .loading_arguments import MODEL, add_loading_arguments, check_loading_arguments


def add_commands(commands: Any) -> None:
    """Add `serve`."""
    parser = commands.add_parser("serve", help="answer OpenAI-style chat requests over HTTP (Transformers 5)")
    parser.add_argument("model", nargs="?", **MODEL)
    add_loading_arguments(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one (default: 8000)")
    parser.add_argument("--name", help="model name that clients request (default: MODEL, of a path its last part)")
    parser.add_argument("--max-megabytes", type=float, default=32, metavar="N", help="largest request (default: 32)")
    parser.add_argument(
        "--max-waiting-megabytes",
        type=float,
        metavar="N",
        help="all requests that wait at once (default: 256, or --max-megabytes where that is more)",
    )
    parser.add_argument("--max-megapixels", type=float, default=36, metavar="N", help="largest image (default: 36)")
    parser.add_argument(
        "--max-request-megapixels",
        type=float,
        metavar="N",
        help="all images of a request together (default: 72, or --max-megapixels where that is more)",
    )
    parser.add_argument(
        "--remote-pictures",
        action="store_true",
        help="fetch http(s) URLs of clients; only where no host behind the firewall must be protected",
    )
    parser.set_defaults(check_arguments=_check, run=_serve)


def _check(args: argparse.Namespace) -> None:
    for name in ("max_megabytes", "max_megapixels", "max_request_megapixels", "max_waiting_megabytes"):
        value = getattr(args, name)
        if value is not None and not math.isfinite(value):
            raise EmmaError(f"`--{name.replace('_', '-')}` must be a finite number: got {value:g}.")
    if args.max_megabytes <= 0 or args.max_megapixels <= 0:
        raise EmmaError(
            f"`--max-megabytes` and `--max-megapixels` must be above 0: got {args.max_megabytes:g} and "
            f"{args.max_megapixels:g}."
        )
    for whole, part in (("max_request_megapixels", "max_megapixels"), ("max_waiting_megabytes", "max_megabytes")):
        most, least = getattr(args, whole), getattr(args, part)
        if most is not None and most < least:
            option, other = (f"`--{name.replace('_', '-')}`" for name in (whole, part))
            raise EmmaError(f"{option} must be at least {other}, {least:g}: got {most:g}.")
    check_loading_arguments(args)


def _serve(args: argparse.Namespace) -> None:
    from ...inference import load_model
    from ...serving import Limits, listen, serve

    image_pixels = int(args.max_megapixels * 1e6)
    request_bytes = int(args.max_megabytes * 2**20)
    limits = Limits(
        request_bytes=request_bytes,
        picture_pixels=image_pixels,
        remote_pictures=args.remote_pictures,
        request_pixels=int((args.max_request_megapixels or 0) * 1e6) or max(Limits.request_pixels, image_pixels),
        waiting_bytes=int((args.max_waiting_megabytes or 0) * 2**20) or max(Limits.waiting_bytes, request_bytes),
    )
    name = args.name or (Path(args.model).resolve().name if Path(args.model).exists() else args.model)
    # Before the weights, which take long: a port in use is reported at once.
    with listen(args.host, args.port) as listener:
        model, processor = load_model(
            args.model, args.device, args.dtype, args.quantization, visual_tokens=args.visual_tokens
        )
        serve(model, processor, name, listener, limits)
