"""Draw the images of emma-tiny's widget, and write them with the model's answers into its card.

python scripts/write_emma_tiny_widget.py
"""

import argparse
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard

from emma_hf import EMMA_TINY
from emma_hf.hub import export
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.scenes import Scene

# Seed of each scene, and the question about it.
QUESTIONS = (
    (0, "How many things are there?"),
    (1, "Describe the picture."),
    (2, "Is there a star?\nAnswer the question using a single word or phrase."),
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EMMA_TINY, help="folder of an emma-tiny with its card")
    args = parser.parse_args(argv)

    (args.model / "widget").mkdir(exist_ok=True)
    images = [args.model / "widget" / f"scene-{seed}.png" for seed, _ in QUESTIONS]
    for image, (seed, _) in zip(images, QUESTIONS):
        draw(Scene.random(seed), 224).save(image)
    examples = [(image, question) for image, (_, question) in zip(images, QUESTIONS)]
    with tempfile.TemporaryDirectory() as place:
        exported = ModelCard.load(export(args.model, Path(place) / "emma-tiny", examples=examples) / "README.md")
    card = ModelCard.load(args.model / "README.md")
    card.data["widget"] = [
        {**example, "src": f"widget/{image.name}"} for image, example in zip(images, exported.data["widget"])
    ]
    card.save(args.model / "README.md")


if __name__ == "__main__":
    main()
