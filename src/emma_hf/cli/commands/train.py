"""`emma-hf train`: fine-tuning. `training/finetune.py` parses its arguments."""

import argparse
from typing import Any


def add_commands(commands: Any) -> None:
    """Add `train`."""
    parser = commands.add_parser(
        "train", help="fine-tune on rows in LLaVA's format (`train --help` lists every argument)", add_help=False
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Hand on everything after `train`."""
    from ...training.finetune import main

    main(args.remainder)
