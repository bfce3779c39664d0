"""The `emma-hf` command: answers go to standard output, everything else to standard error."""

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..model.errors_emma import EmmaError
from .commands import analyze, ask, convert, evaluate, hub, serve, tiny, train


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0, 2 after an error that the user can fix, 130 after Ctrl-C, 141 where the reader of standard
        output has closed it.

    Raises:
        SystemExit: `--help` and `--version` (status 0), or arguments that the parser refuses (status 2).
        Exception: an error of this package, or with `--debug` any error, so that its traceback is shown.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An answer can hold characters that the locale's encoding lacks.
        sys.stdout.reconfigure(errors="replace")
    report, sys.unraisablehook = sys.unraisablehook, _interrupt_again
    try:
        try:
            return _run(argv)
        finally:
            # At the end of the process nobody could catch the error of a closed pipe.
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    finally:
        sys.unraisablehook = report


def _run(argv: Sequence[str] | None) -> int:
    args = _parse(argv)
    try:
        # Mistakes are found before torch and Transformers are imported, which takes seconds.
        args.check_arguments(args)
        _import_models()
        args.run(args)
    except BrokenPipeError:
        raise
    except Exception as error:
        if args.debug or not _is_fixable(error):
            raise
        print(f"emma-hf: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _import_models() -> None:
    """Import torch, Transformers and EMMA's classes. Ctrl-C ends the process without an exception until that is done.

    In an import, torch and others abort at that exception, or catch it and go on.
    """
    handler = signal.getsignal(signal.SIGINT)
    is_replaced = handler is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if is_replaced:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from .. import auto_classes  # noqa: F401
    finally:
        if is_replaced:
            signal.signal(signal.SIGINT, handler)


def _interrupt_again(lost: "sys.UnraisableHookArgs") -> None:
    """Raise an interrupt again that came in a destructor: Python reports and ignores what is raised there."""
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(0.01, signal.raise_signal, [signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(lost)


def _is_fixable(error: Exception) -> bool:
    """Whether the text of an error is enough for a user."""
    if isinstance(error, (EmmaError, OSError)):
        return True
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from safetensors import SafetensorError

    return isinstance(error, (HfHubHTTPError, HFValidationError, SafetensorError))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="emma-hf", description="EMMA: questions about images.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions that run, and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of any error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_CommandParser)
    for module in (ask, serve, convert, hub, train, evaluate, analyze, tiny):
        module.add_commands(commands)
    args, remainder = parser.parse_known_args(argv)
    if args.run is train.run:
        args.remainder = remainder
    elif remainder:
        args.parser.error(f"unrecognized arguments: {' '.join(remainder)}")
    return args


class _CommandParser(argparse.ArgumentParser):
    """Parser of one command. What it parses says which parser it was, and what checks and runs the arguments."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.set_defaults(parser=self, check_arguments=lambda args: None)
        if self.add_help:
            # After the command too; suppressed, so that its absence does not undo the one before the command.
            self.add_argument(
                "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of any error"
            )


class _Version(argparse.Action):
    """Prints the versions from the installed packages' metadata, without importing torch, which takes seconds."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        from importlib import metadata

        from packaging.requirements import Requirement

        transformers = metadata.version("transformers")
        wanted = [Requirement(line) for line in metadata.requires("emma-hf") or ()]
        (limits,) = [each.specifier for each in wanted if each.name == "transformers" and not each.marker]
        (cap,) = [limit for limit in limits if limit.operator == "<"]
        newer = not cap.contains(transformers, prereleases=True)
        print(f"emma-hf {__version__}")
        print(f"transformers {transformers}{f' (newer than emma-hf is tested on, {cap}: update emma-hf)' * newer}")
        print(f"torch {metadata.version('torch')}")
        parser.exit()
