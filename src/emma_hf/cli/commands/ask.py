"""`emma-hf ask` and `emma-hf chat`: questions about images."""

import argparse
import io
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ...model.errors_emma import EmmaError
from .loading_arguments import MODEL, add_loading_arguments, check_loading_arguments

if TYPE_CHECKING:
    from ...inference import Chat

IMAGE_HELP = "path, URL, data URL, or - for standard input"


def add_commands(commands: Any) -> None:
    """Add `ask` and `chat`."""
    ask = commands.add_parser(
        "ask",
        usage="%(prog)s [OPTION ...] IMAGE QUESTION",
        help="answer a question about one image or several",
    )
    _add_arguments(ask)
    ask.add_argument("--image", action="append", default=[], metavar="IMAGE", help=f"one more image: {IMAGE_HELP}")
    ask.add_argument(
        "--question", action="append", default=[], metavar="QUESTION", help="one more question about the same images"
    )
    ask.add_argument("inputs", nargs="+", metavar="IMAGE QUESTION", help=f"image ({IMAGE_HELP}) and question")
    ask.set_defaults(check_arguments=_check_ask, run=_ask)

    chat = commands.add_parser("chat", help="talk about one image or several; an empty line ends it")
    _add_arguments(chat)
    chat.add_argument("images", nargs="+", metavar="IMAGE", help="path, URL or data URL")
    chat.set_defaults(check_arguments=_check_chat, run=_chat)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", **MODEL)
    add_loading_arguments(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest answer in tokens (default: 512)"
    )
    parser.add_argument(
        "--instruction", metavar="TEXT", help="text that guides the visual tokens (default: from the question)"
    )


def _check_ask(args: argparse.Namespace) -> None:
    *first, question = args.inputs
    args.images, args.questions = [*first, *args.image], [decode(text) for text in (question, *args.question)]
    if len(first) > 1 or not args.images:
        raise EmmaError(
            f"`ask` takes IMAGE QUESTION, and one `--image` for each further picture: got {len(args.inputs)} words "
            f"and {len(args.image)} `--image`. Quote the question."
        )
    if args.images.count("-") > 1:
        raise EmmaError(f"Standard input holds one image: got `-` {args.images.count('-')} times. Name the files.")
    for text in args.questions:
        if not text.strip():
            raise EmmaError(f"A question must have words: got {text!r}.")
    _check(args)


def _check_chat(args: argparse.Namespace) -> None:
    if "-" in args.images:
        raise EmmaError("`chat` reads what you say from standard input, so no picture can come from there: got `-`.")
    _check(args)


def _check(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1:
        raise EmmaError(f"`--max-new-tokens` must be at least 1: got {args.max_new_tokens}.")
    if args.instruction is not None:
        args.instruction = decode(args.instruction)
    check_loading_arguments(args)


def _ask(args: argparse.Namespace) -> None:
    chat = _load_chat(args)
    if len(args.questions) > 1:
        chat.encode_images()
    for question in args.questions:
        chat.start_over()
        _stream(chat, question, args.max_new_tokens)


def _chat(args: argparse.Namespace) -> None:
    chat = _load_chat(args)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # `decode` says which text it is that the locale cannot read.
        sys.stdin.reconfigure(errors="surrogateescape")
    read_line = _line_reader()
    while line := decode(read_line()).strip():
        _stream(chat, line, args.max_new_tokens)


def _load_chat(args: argparse.Namespace) -> "Chat":
    from ...inference import Chat, load_model
    from ...model.image_processing_emma import EmmaImageProcessor

    # Before the weights, which take long: a wrong path is reported at once.
    images = EmmaImageProcessor().fetch_images(
        [sys.stdin.buffer.read() if each == "-" else each for each in args.images]
    )
    model, processor = load_model(
        args.model, args.device, args.dtype, args.quantization, visual_tokens=args.visual_tokens
    )
    return Chat(model, processor, images, args.instruction)


def _stream(chat: "Chat", question: str, max_new_tokens: int) -> None:
    """Print the answer while it grows."""
    from transformers import TextStreamer

    streamer = TextStreamer(chat.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    chat.answer(question, max_new_tokens=max_new_tokens, streamer=streamer)


def _line_reader() -> Any:
    """A function that reads the user's next line, "" at the end. On a terminal with line editing and history."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        # Once readline is imported, `input` edits lines and keeps their history; the console of Windows does so itself.
        with suppress(ImportError):
            import readline  # noqa: F401
        return _prompt

    def read_line() -> str:
        print("> ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline()

    return read_line


def _prompt() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


def decode(text: str) -> str:
    """Text of the user's, of which the locale's encoding may have left bytes undecoded, as UTF-8.

    Raises:
        EmmaError: it is not UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise EmmaError(f"Text must be encoded as UTF-8, or as the locale says: got {text!a} ({error}).") from error
