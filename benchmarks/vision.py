"""The vision path: EMMA's, with an instruction, against Transformers' LLaVA's; and many questions about one image.

Both have CLIP's ViT-L/14-336 and the projector of the 7B model, the same random weights. An untrained EMMA is exactly
LLaVA, so the visual tokens are compared first. The baseline is LLaVA's own `get_image_features`, unmodified.

    python benchmarks/vision.py [--runs 11] [--dtypes float32 bfloat16] [--images 1 4] [--questions 6] [--output FOLDER]
"""

from functools import partial
from statistics import median

import torch
from common import Report, argument_parser, build_pair, emma_config, in_turns, matmul_rate, ratio
from transformers import LlavaForConditionalGeneration

from emma_hf import EmmaForConditionalGeneration

# Rounding, in units of the dtype's epsilon and of the largest visual token.
TOLERANCE = 8


def llava_features(llava: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Visual tokens (images, 576, 4096) by LLaVA's own method, whose return value changed with Transformers 5."""
    found = llava.model.get_image_features(
        pixel_values=pixels, vision_feature_layer=-2, vision_feature_select_strategy="default"
    )
    return torch.stack(list(getattr(found, "pooler_output", found)))


def operations() -> tuple[int, int]:
    """Floating point operations of one image up to the projector's end, and of one instruction."""

    def tower(tokens: int, width: int, inner: int, layers: int) -> int:
        return layers * 2 * tokens * (4 * width**2 + 2 * width * inner + 2 * tokens * width)

    image = tower(577, 1024, 4096, 23) + 2 * 576 * (3 * 14 * 14 * 1024 + 1024 * 4096 + 4096 * 4096)
    return image, tower(77, 768, 3072, 11) + 2 * 77 * 768 * 1024 + 2 * 576 * (576 + 77) * 1024


def verify(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: int = TOLERANCE) -> None:
    """Exit unless the results are the same up to rounding."""
    difference = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    if not difference <= tolerance * torch.finfo(expected.dtype).eps:
        raise SystemExit(f"{name}: the results differ by {difference:.2e} of the largest; no time is worth printing.")


def encoded_once(emma: EmmaForConditionalGeneration, image: torch.Tensor, questions: torch.Tensor) -> torch.Tensor:
    """Visual tokens for each question, the image encoded once."""
    return emma.encode_image(image).image_features(questions)


def encoded_for_each(emma: EmmaForConditionalGeneration, image: torch.Tensor, questions: torch.Tensor) -> torch.Tensor:
    """Visual tokens for each question, the image encoded for each."""
    return torch.cat([emma.get_image_features(image, row[None]).pooler_output for row in questions])


@torch.no_grad()
def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--runs", type=int, default=11, help="rounds (default: 11)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--images", nargs="+", type=int, default=[1, 2, 4, 8], help="numbers of images")
    parser.add_argument("--questions", nargs="+", type=int, default=[1, 2, 4, 6, 8], help="numbers of questions")
    args = parser.parse_args()
    device = torch.device(args.device)
    report = Report("vision", args)
    for name in args.dtypes:
        dtype = getattr(torch, name)
        # As wide as the 7B model; what follows the projector is not run.
        emma, llava = build_pair(
            emma_config("7b", vocab_size=101, intermediate_size=64, num_hidden_layers=1), dtype, device
        )
        rate = matmul_rate(device, dtype)
        pixels = torch.randn(max(args.images), 3, 336, 336, device=device, dtype=dtype)
        ids = torch.randint(1, 49000, (max(*args.images, *args.questions), 77), device=device)
        for images in args.images:
            some, questions = pixels[:images], ids[:images]
            ours = partial(emma.get_image_features, some, questions)
            theirs = partial(llava_features, llava, some)
            verify(f"{name}, {images} images", ours().pooler_output, theirs())
            times = in_turns({"llava": theirs, "emma": ours}, args.runs, f"{name}, {images} images")
            report.add(
                "Vision path",
                dtype=name,
                images=images,
                **{"LLaVA, s": median(times["llava"]), "EMMA, s": median(times["emma"])},
                **{"EMMA / LLaVA": ratio(times["emma"], times["llava"])},
                **{"of the matmul rate": images * sum(operations()) / median(times["emma"]) / rate},
            )
        # The visual tokens must depend on the question, which an untrained alignment ignores.
        emma.model.modality_adaptation.visual_alignment.weight.normal_(0, 0.02)
        for count in args.questions:
            questions = ids[:count]
            once = partial(encoded_once, emma, pixels[:1], questions)
            for_each = partial(encoded_for_each, emma, pixels[:1], questions)
            verify(f"{name}, {count} questions", once(), for_each())
            one = partial(encoded_for_each, emma, pixels[:1], ids[:1])
            alternatives = {"one": one, "once": once, "for each": for_each}
            times = in_turns(alternatives, max(2, args.runs // 2), f"{name}, {count} questions")
            report.add(
                "Questions about one image",
                dtype=name,
                questions=count,
                **{"`encode_image`, s": median(times["once"])},
                **{"`encode_image` / one question": ratio(times["once"], times["one"])},
                **{"encoded for each / one question": ratio(times["for each"], times["one"])},
            )
    report.save()
    report.plot("Vision path", "images", "EMMA / LLaVA", "dtype")
    report.plot("Questions about one image", "questions", "`encode_image` / one question", "dtype")


if __name__ == "__main__":
    main()
