"""`emma-hf export` and `emma-hf push`: a model as a Hub repository."""

import argparse
import sys
from typing import Any

from ...model.errors_emma import EmmaError
from .loading_arguments import add_visual_tokens, check_visual_tokens


def add_commands(commands: Any) -> None:
    """Add `export` and `push`."""
    export = commands.add_parser("export", help="write a model's complete Hub repository to a folder, or check one")
    export.add_argument("model", metavar="MODEL", help="folder or Hub id, or emma-tiny; with --check what is checked")
    export.add_argument("folder", nargs="?", metavar="FOLDER", help="folder to write; it must not exist")
    export.add_argument("--check", action="store_true", help="write nothing: check every file of MODEL, ask it once")
    export.add_argument("--repo-id", metavar="ORG/NAME", help="name on the Hub, for the card")
    export.add_argument(
        "--example", nargs=2, action="append", default=[], metavar=("IMAGE", "QUESTION"), help="one for the widget"
    )
    export.add_argument("--evaluation", metavar="FILE", help="evaluation.json of `emma-hf tiny evaluate`, for the card")
    add_visual_tokens(export)
    export.add_argument("--max-shard-size", help="largest weight file, such as 2GB (default: files as they are)")
    export.add_argument("--revision", help="with --check: branch, tag or commit (default: the main branch)")
    export.add_argument("--trust-remote-code", action="store_true", help="with --check: also run code that is not ours")
    export.set_defaults(check_arguments=_check_export, run=_export)

    push = commands.add_parser("push", help="upload a model's complete Hub repository (the token is HF_TOKEN's)")
    push.add_argument("model", metavar="MODEL", help="folder of `emma-hf export`, folder or Hub id, or emma-tiny")
    push.add_argument("repo_id", metavar="ORG/NAME", help="repository; it is created if it does not exist")
    push.add_argument("--private", action="store_true", help="create it as private")
    push.add_argument("--revision", help="branch to push to; it must exist (default: the main branch)")
    push.add_argument("--force", action="store_true", help="replace another model, with all of its files")
    push.add_argument("--message", help="commit message")
    push.set_defaults(run=_push)


def _check_export(args: argparse.Namespace) -> None:
    if args.check:
        if args.folder is not None:
            raise EmmaError(f"`--check` takes MODEL alone and writes nothing: got {args.folder!r} besides. Drop it.")
    elif args.folder is None or args.revision is not None or args.trust_remote_code:
        raise EmmaError("`export` takes MODEL FOLDER; `--revision` and `--trust-remote-code` belong to `--check`.")
    check_visual_tokens(args)


def _export(args: argparse.Namespace) -> None:
    from ...hub import check, export

    if args.check:
        report = check(args.model, args.revision, trust_remote_code=args.trust_remote_code)
        print(report.table(), end="")
        if report.failures:
            raise EmmaError(f"{args.model}: {len(report.failures)} of {len(report.rows)} checks failed; see the table.")
    else:
        export(
            args.model,
            args.folder,
            args.repo_id,
            args.example,
            args.evaluation,
            args.max_shard_size,
            visual_tokens=args.visual_tokens,
        )
        print(f"wrote {args.folder}", file=sys.stderr)


def _push(args: argparse.Namespace) -> None:
    from ...hub import push

    print(push(args.model, args.repo_id, args.private, args.revision, args.force, args.message))
