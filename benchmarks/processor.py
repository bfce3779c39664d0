"""Images a second: EMMA's image processor against Transformers' LLaVA image processor with padding.

The pixels of the two are compared first. Then both run in turns on the same images; neighboring runs give one ratio.

    python benchmarks/processor.py [--runs 40] [--output FOLDER]
"""

import io
from functools import partial
from statistics import median

import torch
import transformers
from common import REFERENCE, Report, argument_parser, in_turns, ratio
from PIL import Image

from emma_hf import EmmaImageProcessor
from emma_hf.model.compat_emma import TRANSFORMERS_5

# Width and height in pixels: 0.3 and 1.2 megapixels, each in landscape and in portrait.
SIZES = [(640, 480), (480, 640), (1280, 960), (960, 1280)]
TOLERANCE = 1e-5


def llava_processor():
    """Transformers' own, with its Pillow back end (the only one without torchvision)."""
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "do_pad": True}
    if TRANSFORMERS_5:
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        return LlavaImageProcessorPil(**size)
    return transformers.LlavaImageProcessor(**size)


def pixels_of_image(processor, image: Image.Image) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"]


def pixels_of_jpeg(processor, data: bytes) -> torch.Tensor:
    return pixels_of_image(processor, Image.open(io.BytesIO(data)))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--runs", type=int, default=40, help="rounds (default: 40)")
    args = parser.parse_args()
    ours, theirs = EmmaImageProcessor(), llava_processor()
    report = Report("processor", args)
    photo = Image.open(REFERENCE / "images" / "photo.jpg").convert("RGB")
    for width, height in SIZES:
        image = photo.resize((width, height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=90)
        for kind, function, argument in (
            ("decoded", pixels_of_image, image),
            ("JPEG", pixels_of_jpeg, buffer.getvalue()),
        ):
            alternatives = {
                "llava": partial(function, theirs, argument),
                "emma": partial(function, ours, argument),
            }
            pixels = [run() for run in alternatives.values()]
            difference = (pixels[0] - pixels[1]).abs().max().item()
            if not difference <= TOLERANCE:
                raise SystemExit(f"{width}x{height}: the pixels differ by {difference}; no time is worth printing.")
            times = in_turns(alternatives, args.runs, f"{width}x{height}, {kind}")
            report.add(
                "Image processor",
                **{"image": f"{width}x{height}", "input": kind},
                **{"LLaVA, images/s": 1 / median(times["llava"]), "EMMA, images/s": 1 / median(times["emma"])},
                **{"times faster": ratio(times["llava"], times["emma"])},
            )
    report.save()


if __name__ == "__main__":
    main()
