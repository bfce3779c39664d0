"""Pictures a second: EMMA's image processor against Transformers' LLaVA image processor with padding.

The pixels of the two are compared first. Then both run in turn on the same pictures; a pair of neighbouring runs gives
one ratio, so that what else the machine does falls on both.

    python benchmarks/processor.py [--pairs 40]
"""

import argparse
import io
import statistics
import time
from pathlib import Path

import numpy as np
import transformers
from PIL import Image
from tqdm import tqdm

from emma_hf import EmmaImageProcessor

PHOTO = Path(__file__).parent.parent / "tests" / "fixtures" / "reference" / "images" / "photo.jpg"
# Width and height in pixels: 0.3 and 1.2 megapixels, each lying and standing.
SIZES = [(640, 480), (480, 640), (1280, 960), (960, 1280)]
TOLERANCE = 1e-5


def llava_processor():
    """Transformers' own, with its Pillow back end (the only one without torchvision)."""
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "do_pad": True}
    if int(transformers.__version__.split(".")[0]) >= 5:
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        return LlavaImageProcessorPil(**size)
    return transformers.LlavaImageProcessor(**size)


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=40, help="neighbouring runs per row (default: 40)")
    pairs = parser.parse_args().pairs
    ours, theirs = EmmaImageProcessor(), llava_processor()
    print(f"Transformers {transformers.__version__}, {pairs} pairs per row; ratio: median [lower, upper quartile]\n")
    print("| picture | input | LLaVA images/s | EMMA images/s | times faster |")
    print("|---|---|---|---|---|")
    rows = []
    for size in tqdm(SIZES, leave=False):
        picture = Image.open(PHOTO).convert("RGB").resize(size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=90)
        encoded = buffer.getvalue()
        for kind in ("decoded", "JPEG"):

            def run(processor, kind=kind, picture=picture, data=encoded):
                image = picture if kind == "decoded" else Image.open(io.BytesIO(data))
                return processor(image, return_tensors="pt")["pixel_values"]

            difference = np.abs(run(ours).numpy() - run(theirs).numpy()).max()
            if difference > TOLERANCE:
                raise SystemExit(f"{size}: the pixels differ by {difference}; no time is worth printing.")
            times = [(seconds(lambda: run(theirs)), seconds(lambda: run(ours))) for _ in range(pairs)]
            ratios = [slow / fast for slow, fast in times]
            low, middle, high = statistics.quantiles(ratios, n=4)
            slow, fast = (statistics.median(column) for column in zip(*times))
            megapixels = size[0] * size[1] / 1e6
            rows.append(
                f"| {size[0]}x{size[1]} ({megapixels:.1f} MP) | {kind} | {1 / slow:.0f} | {1 / fast:.0f} "
                f"| {middle:.2f} [{low:.2f}, {high:.2f}] |"
            )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
