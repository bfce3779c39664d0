"""emma-tiny with fewer visual tokens, by how they are chosen: right answers, invented things, time to the first token.

`diversity` is what `visual_tokens` does. The others are here to be compared with it: `random` tokens of each image;
`attention`, those that the class token attends to most in the layer behind V; `both`, the determinantal point process
with that attention as quality; `relevance`, CDPruner's rule (arXiv 2506.10967), that process with the cosine of each
token to the question in CLIP's space. The sign is minus, as in CDPruner's code for LLaVA: tokens on a thing point away
from its name, in emma-tiny, too. `+cos` is the other sign. The checkpoint has no projections into CLIP's space, so
`clip_projections` fits them. All are asked the same questions. The choice of the package is verified against the
definition before anything is asked.

    python benchmarks/token_selection.py [--questions 2000] [--captions 500] [--tokens 32 16 8] [--output FOLDER]
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from clip_projections import check, cosine_to_text, fit_projections
from common import Report, argument_parser, in_percent, in_turns, quartiles, ratio
from torch import nn
from tqdm import tqdm
from transformers import CLIPModel

from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.evaluation.statistics import paired_difference, share
from emma_hf.model.compat_emma import unwrap_clip_model
from emma_hf.model.token_selection_emma import select_diverse
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.evaluation import fresh_questions, hallucinations
from emma_hf.tiny.questions import caption_question
from emma_hf.tiny.rows import TEST_SEEDS
from emma_hf.tiny.scenes import Scene, SeededRandom

BATCH = 64
# Not those of emma-tiny's own evaluation.
SEED = 7


def load(kept: int | None) -> EmmaForConditionalGeneration:
    return EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, visual_tokens=kept, dtype=torch.float32).eval()


@dataclass
class Encoded:
    """What tokens are chosen by.

    Args:
        features: V (images, N, width).
        attention: the class token's attention to V in the next layer, mean over heads (images, N).
        cosine: that of V to the question about the image in CLIP's space (images, N).
    """

    features: torch.Tensor
    attention: torch.Tensor
    cosine: torch.Tensor


@torch.no_grad()
def encode(
    model: EmmaForConditionalGeneration,
    clip: CLIPModel,
    processor: EmmaProcessor,
    scenes: Sequence[Scene],
    questions: Sequence[str],
) -> Encoded:
    tower = unwrap_clip_model(model.model.vision_tower)
    layer = tower.encoder.layers[model.config.vision_feature_layer % (len(tower.encoder.layers) + 1)]
    parts = []
    for start in tqdm(range(0, len(scenes), BATCH), desc="images", leave=False):
        part = slice(start, start + BATCH)
        images = [draw(scene) for scene in scenes[part]]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(model.dtype)
        states = model.model.vision_tower(pixels).last_hidden_state
        tokens = layer.layer_norm1(states)
        heads = [
            each.unflatten(-1, (layer.self_attn.num_heads, -1))
            for each in (layer.self_attn.q_proj(tokens[:, :1]), layer.self_attn.k_proj(tokens))
        ]
        scores = torch.einsum("iqhd,ikhd->ihk", *heads) * layer.self_attn.scale
        features = states[:, 1:]
        # The instruction of a question is its first line.
        texts = [text.partition("\n")[0] for text in questions[part]]
        parts.append((features, scores.softmax(-1).mean(1)[:, 1:], cosine_to_text(clip, processor, features, texts)))
    return Encoded(*map(torch.cat, zip(*parts)))


def select_random(encoded: Encoded, kept: int) -> torch.Tensor:
    order = torch.rand(encoded.features.shape[:2], generator=torch.Generator().manual_seed(kept)).argsort(-1)
    return order[:, :kept].sort(-1).values


def select_weighted(features: torch.Tensor, quality: torch.Tensor, kept: int) -> torch.Tensor:
    """Greedy maximum of the determinant of diag(q) cos diag(q), q the quality from 0 to 1 in each image."""
    low, high = quality.aminmax(dim=-1, keepdim=True)
    quality = ((quality - low) / (high - low)).clamp(min=1e-6).double()
    unit = nn.functional.normalize(features.double(), dim=-1)
    kernel = quality[:, :, None] * (unit @ unit.mT) * quality[:, None]
    images = torch.arange(len(features))
    left = kernel.diagonal(dim1=1, dim2=2).clone()
    rows = kernel.new_zeros(len(features), kept, features.shape[1])
    chosen = torch.empty(len(features), kept, dtype=torch.long)
    for step in range(kept):
        best = left.argmax(-1)
        known = torch.einsum("is,isn->in", rows[images, :, best], rows)
        row = (kernel[images, best] - known) / left[images, best, None].clamp(min=1e-12).sqrt()
        rows[:, step], chosen[:, step] = row, best
        left = (left - row.square()).scatter(1, best[:, None], -torch.inf)
    return chosen.sort(-1).values


SELECTIONS: dict[str, Callable[[Encoded, int], torch.Tensor]] = {
    "diversity": lambda encoded, kept: select_diverse(encoded.features, kept),
    "random": select_random,
    "attention": lambda encoded, kept: encoded.attention.topk(kept).indices.sort(-1).values,
    "both": lambda encoded, kept: select_weighted(encoded.features, encoded.attention, kept),
    "relevance": lambda encoded, kept: select_weighted(encoded.features, -encoded.cosine, kept),
    "+cos": lambda encoded, kept: select_weighted(encoded.features, encoded.cosine, kept),
}


def verify(features: torch.Tensor, kept: int) -> None:
    """Stop unless the package chooses what max-min is by its definition."""
    distances = 1 - nn.functional.cosine_similarity(features[:, :, None].double(), features[:, None].double(), dim=-1)
    tokens = features.shape[1]
    for matrix, indices in zip(distances, select_diverse(features, kept).tolist()):
        chosen = [int((matrix + 9 * torch.eye(tokens)).amin(1).argmax())]
        while len(chosen) < kept:
            nearest = matrix[chosen].amin(0)
            nearest[chosen] = -1
            chosen.append(int(nearest.argmax()))
        if sorted(chosen) != indices:
            raise SystemExit(f"The choice {indices} is not {sorted(chosen)}, so what is measured of it means nothing.")


@torch.no_grad()
def ask(
    kept: int, rows: torch.Tensor | None, features: torch.Tensor, questions: Sequence[str], max_new_tokens: int
) -> list[str]:
    """The answers of emma-tiny to a question about each image, of which it gets the visual tokens `rows`."""
    model = load(kept)
    processor = EmmaProcessor.from_pretrained(EMMA_TINY, visual_tokens=kept)
    blank = draw(Scene.random(0))
    answers: list[str] = []
    for start in tqdm(range(0, len(questions), BATCH), desc=f"{kept} tokens", leave=False):
        part = slice(start, start + BATCH)
        content = [[{"type": "image"}, {"type": "text", "text": text}] for text in questions[part]]
        messages = [[{"role": "user", "content": each}] for each in content]
        inputs = processor(
            images=[[blank]] * len(messages),
            text=processor.apply_chat_template(messages, add_generation_prompt=True),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        del inputs["pixel_values"]
        if rows is not None:
            model.model.modality_adaptation.select_rows = lambda features, part=part: rows[part]
        tokens = model.generate(
            **inputs, vision_features=features[part], max_new_tokens=max_new_tokens, do_sample=False
        )
        texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.strip() for text in texts]
    return answers


def measure_answers(report: Report, encoded: Encoded, questions, kept: Sequence[int], all_tokens: int) -> None:
    """Right answers by selection, and the paired difference to `diversity`."""

    def right(count: int, rows: torch.Tensor | None) -> list[bool]:
        answers = ask(count, rows, encoded.features, [question.text for _, question in questions], 8)
        said = [answer.rstrip(".").strip().lower() for answer in answers]
        return [text == question.answer.rstrip(".").strip().lower() for text, (_, question) in zip(said, questions)]

    name = "Right answers, %"
    whole = in_percent(share(right(all_tokens, None)))
    report.add(name, tokens=all_tokens, selection="all", right=whole, **{"more than diversity": None})
    for count in kept:
        hits = {each: right(count, select(encoded, count)) for each, select in SELECTIONS.items()}
        for each, found in hits.items():
            difference = in_percent(paired_difference(found, hits["diversity"]), "difference")
            report.add(
                name,
                tokens=count,
                selection=each,
                right=in_percent(share(found)),
                **{"more than diversity": None if each == "diversity" else difference},
            )


def measure_captions(
    report: Report, encoded: Encoded, scenes, prompts: Sequence[str], kept: Sequence[int], all_tokens: int
) -> None:
    """Things that captions name and that are not there, and things there that they name."""

    def add(count: int, selection: str, rows: torch.Tensor | None) -> None:
        found = hallucinations(list(scenes), ask(count, rows, encoded.features, prompts, 96))
        names = ("named things that are not there", "things that are named")
        report.add(
            "Captions, %", tokens=count, selection=selection, **{name: in_percent(found[name]) for name in names}
        )

    add(all_tokens, "all", None)
    for count in kept:
        for each, select in SELECTIONS.items():
            add(count, each, select(encoded, count))


def measure_time(report: Report, kept: Sequence[int], all_tokens: int, runs: int) -> None:
    """Time to the first token of one question about one image, the choice included."""
    calls = {}
    for count in (all_tokens, *kept):
        model = load(count)
        processor = EmmaProcessor.from_pretrained(EMMA_TINY, visual_tokens=count)
        prompt = "USER: <image>\nHow many things are there? ASSISTANT:"
        inputs = processor(images=draw(Scene.random(4)), text=prompt, return_tensors="pt")
        calls[count] = (
            lambda model=model, inputs=inputs: model.generate(**inputs, max_new_tokens=1, do_sample=False),
            inputs["input_ids"].shape[1],
        )
    found = in_turns({str(count): call for count, (call, _) in calls.items()}, runs, "first token")
    for count, (_, length) in calls.items():
        report.add(
            "Time to the first token",
            tokens=count,
            **{"tokens of the prompt": length, "s": quartiles(found[str(count)])},
            **{"of all tokens": ratio(found[str(count)], found[str(all_tokens)])},
        )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--questions", type=int, default=2000, help="paired questions (default: 2000)")
    parser.add_argument("--captions", type=int, default=500, help="captions (default: 500)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 16, 8], help="kept (default: 32 16 8)")
    parser.add_argument("--runs", type=int, default=20, help="rounds of the measurement of time (default: 20)")
    parser.add_argument(
        "--groups", type=int, default=4000, help="groups of scenes for CLIP's projections (default: 4000)"
    )
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    report = Report("token_selection", args)
    model = load(None)
    processor, all_tokens = EmmaProcessor.from_pretrained(EMMA_TINY), model.config.vision_seq_length
    questions = fresh_questions(args.questions, SEED)
    scenes = [Scene.random(TEST_SEEDS + SEED * 10_000_000 + 9_000_000 + index) for index in range(args.captions)]
    clip = fit_projections(model, processor, args.groups)
    encoded = encode(model, clip, processor, *zip(*((scene, question.text) for scene, question in questions)))
    verify(encoded.features[:16], min(args.tokens))
    measure_answers(report, encoded, questions, args.tokens, all_tokens)
    if scenes:
        prompts = [caption_question(SeededRandom(scene.seed)) for scene in scenes]
        encoded = encode(model, clip, processor, scenes, prompts)
        measure_captions(report, encoded, scenes, prompts, args.tokens, all_tokens)
    check(report, model, clip, processor, min(500, args.questions))
    measure_time(report, args.tokens, all_tokens, args.runs)
    report.save()


if __name__ == "__main__":
    main()
