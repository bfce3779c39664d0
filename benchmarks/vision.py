"""The vision path: EMMA's, with an instruction, against Transformers' LLaVA's; and many questions about one picture.

Both have CLIP's ViT-L/14-336 and the projector of the 7B model, the same weights at random. An untrained EMMA is
exactly LLaVA, so the visual tokens are compared first. The baseline is LLaVA's own `get_image_features`, unmodified.

    python benchmarks/vision.py [--runs 11] [--dtypes float32 bfloat16] [--images 1 4] [--questions 6] [--output FOLDER]
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from measure import Report, in_turns, matmul_rate, ratio
from transformers import CLIPTextConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from emma_hf import EmmaConfig, EmmaForConditionalGeneration

VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION |= {"image_size": 336, "patch_size": 14, "projection_dim": 768}
INSTRUCTION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
# As wide as the 7B model; what follows the projector is not run.
TEXT = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 64, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 32, "vocab_size": 101}
IMAGES, QUESTIONS = (1, 2, 4, 8), (1, 2, 4, 6, 8)
# Rounding, in units of the dtype's epsilon and of the largest visual token.
TOLERANCE = 8


def build(dtype: torch.dtype, device: torch.device) -> tuple:
    """EMMA and LLaVA that share tower and projector."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**VISION)
    instruction = CLIPTextConfig(**INSTRUCTION, vocab_size=49408, max_position_embeddings=77)
    config = EmmaConfig(
        vision_config=vision, instruction_config=instruction, text_config=dict(TEXT), image_token_index=100
    )
    emma = EmmaForConditionalGeneration(config).to(device, dtype).eval()
    config = LlavaConfig(vision_config=vision, text_config=dict(TEXT), image_token_index=100, image_seq_length=576)
    llava = LlavaForConditionalGeneration(config).to(device, dtype).eval()
    llava.model.vision_tower = emma.model.vision_tower
    llava.model.multi_modal_projector.load_state_dict(emma.model.multi_modal_projector.state_dict())
    return emma, llava


def llava_features(llava: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Visual tokens (images, 576, 4096) by LLaVA's own method, whose return value changed with Transformers 5."""
    found = llava.model.get_image_features(
        pixel_values=pixels, vision_feature_layer=-2, vision_feature_select_strategy="default"
    )
    return torch.stack(list(getattr(found, "pooler_output", found)))


def operations() -> tuple[int, int]:
    """Floating point operations of one picture up to the projector's end, and of one instruction."""

    def tower(tokens: int, width: int, inner: int, layers: int) -> int:
        return layers * 2 * tokens * (4 * width**2 + 2 * width * inner + 2 * tokens * width)

    picture = tower(577, 1024, 4096, 23) + 2 * 576 * (3 * 14 * 14 * 1024 + 1024 * 4096 + 4096 * 4096)
    return picture, tower(77, 768, 3072, 11) + 2 * 77 * 768 * 1024 + 2 * 576 * (576 + 77) * 1024


def same(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    if not difference <= TOLERANCE * torch.finfo(expected.dtype).eps:
        raise SystemExit(
            f"{name}: the visual tokens differ by {difference:.2e} of the largest; no time is worth printing."
        )


def kept(emma: EmmaForConditionalGeneration, picture: torch.Tensor, questions: torch.Tensor) -> torch.Tensor:
    """Visual tokens for each question, the picture encoded once."""
    return emma.encode_image(picture).image_features(questions)


def anew(emma: EmmaForConditionalGeneration, picture: torch.Tensor, questions: torch.Tensor) -> torch.Tensor:
    """Visual tokens for each question, the picture encoded for each."""
    return torch.cat([emma.get_image_features(picture, row[None]).pooler_output for row in questions])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=11, help="rounds (default: 11)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--images", nargs="+", type=int, default=IMAGES, help="numbers of pictures (default: 1 2 4 8)")
    parser.add_argument("--questions", nargs="+", type=int, default=QUESTIONS, help="of questions (default: 1 2 4 6 8)")
    parser.add_argument("--output", type=Path, help="folder for JSON and plots")
    args = parser.parse_args()
    device = torch.device(args.device)
    path, asked = Report("vision-path", device), []
    for name in args.dtypes:
        dtype = getattr(torch, name)
        emma, llava = build(dtype, device)
        rate = matmul_rate(device, dtype)
        picture, words = operations()
        pixels = torch.randn(max(args.images), 3, 336, 336, device=device, dtype=dtype)
        ids = torch.randint(1, 49000, (max(*args.images, *args.questions), 77), device=device)
        for images in args.images:
            some, theirs = pixels[:images], ids[:images]
            same(f"{name}, {images}", emma.get_image_features(some, theirs).pooler_output, llava_features(llava, some))
            times = in_turns(
                {
                    "llava": partial(llava_features, llava, some),
                    "emma": partial(emma.get_image_features, some, theirs),
                },
                args.runs,
                device,
                f"{name}, {images} images",
            )
            middle = sorted(times["emma"])[args.runs // 2]
            path.add(
                dtype=name,
                images=images,
                **{"LLaVA s": sorted(times["llava"])[args.runs // 2], "EMMA s": middle},
                **{"EMMA / LLaVA": ratio(times["emma"], times["llava"])},
                **{"of matmul rate": images * (picture + words) / middle / rate},
            )
        # What makes a difference between questions must be there: an untrained alignment ignores them.
        emma.model.modality_adaptation.visual_alignment.weight.normal_(0, 0.02)
        for count in args.questions:
            some = pixels[:1], ids[:count]
            same(f"{name}, {count} questions", kept(emma, *some), anew(emma, *some))
            runs = max(2, args.runs // 2)
            times = in_turns(
                {
                    "one": partial(anew, emma, pixels[:1], ids[:1]),
                    "kept": partial(kept, emma, *some),
                    "again": partial(anew, emma, *some),
                },
                runs,
                device,
                f"{name}, {count} questions",
            )
            asked.append(
                {
                    "dtype": name,
                    "questions": count,
                    "encode_image s": sorted(times["kept"])[runs // 2],
                    "against one question": ratio(times["kept"], times["one"]),
                    "encoded anew for each": ratio(times["again"], times["one"]),
                }
            )
    path.save(args.output, "images", "EMMA / LLaVA", "dtype")
    questions = Report("questions-per-image", device)
    questions.rows = asked
    questions.save(args.output, "questions", "against one question", "dtype")


if __name__ == "__main__":
    main()
