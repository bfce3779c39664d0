"""Render MODEL_CARD.md: the template of the model cards, for the released model.

python scripts/render_model_card.py MODEL_CARD.md
"""

import argparse
import tempfile
from pathlib import Path

from emma_hf import EmmaConfig
from emma_hf.hub.model_card import render_card


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="file to write")
    args = parser.parse_args(argv)
    # A folder without a card of its own, so that the template is rendered.
    with tempfile.TemporaryDirectory() as empty:
        card, _ = render_card(Path(empty), EmmaConfig(), "org/emma-7b")
    card.save(args.output)


if __name__ == "__main__":
    main()
