"""emma-tiny's training from nothing, in small."""

import json
import math
import re

import numpy as np
import pytest
import torch
from transformers import CLIPModel, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from emma_hf import EmmaForConditionalGeneration
from emma_hf.cli import main
from emma_hf.model.instruction_emma import encode_instruction
from emma_hf.tiny.clip import Captioned, clip_model, collate_groups
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.questions import ENDING
from emma_hf.tiny.recipe import SMOKE, has_fast_bfloat16
from emma_hf.tiny.rows import Rows, SideBySide
from emma_hf.tiny.scenes import SHAPES, Scene
from emma_hf.tiny.training import InOrderEmma, loss_without, train_tiny


def losses(folder) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.slow
def test_every_phase_learns_and_none_is_done_twice(tmp_path):
    folder = train_tiny(tmp_path, SMOKE, disable_tqdm=True)
    for phase in ("clip", "pretrain", "finetune"):
        seen = losses(tmp_path / phase)
        assert np.mean(seen[-2:]) < 0.97 * seen[0], (phase, seen)
        assert (tmp_path / phase / "loss.png").is_file()
    model = EmmaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 12_000_000
    # The towers are CLIP's, unmoved.
    clip = CLIPModel.from_pretrained(tmp_path / "clip")
    ours = dict(model.named_parameters())
    for name, weight in clip.named_parameters():
        tower, _, rest = name.partition(".")
        if tower in ("vision_model", "text_model"):
            module = "vision_tower" if tower == "vision_model" else "instruction_encoder"
            (found,) = [key for key in ours if key.startswith(f"model.{module}.") and key.endswith(f".{rest}")]
            assert torch.equal(ours[found], weight.bfloat16()), name
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/model.safetensors") if path.parent != folder}
    train_tiny(tmp_path, SMOKE)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_the_tokenizers_know_the_words_of_the_world(untrained):
    processor, model = untrained
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_index == 600
    question = "How many red circles are there?" + ENDING
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert re.fullmatch(r"<s>A chat between .* USER: <image>\nHow .* ASSISTANT:", prompt, re.DOTALL)
    ids = processor(images=draw(Scene.random(0)), text=prompt)["input_ids"][0]
    assert ids.count(600) == 64 and len(ids) < 136
    text = "A small red star, the 3 hearts? Yes."
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    instruction = encode_instruction(processor.instruction_tokenizer, "What colour is the star?")
    assert processor.instruction_tokenizer.convert_ids_to_tokens(instruction)[:7] == [
        "<start_of_text>", "what</w>", "colour</w>", "is</w>", "the</w>", "star</w>", "?</w>",
    ]  # fmt: skip
    # Sizes that 4-bit loading can pack.
    for name, module in model.model.language_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 64 == 0 and module.out_features % 64 == 0, name


def test_captions_and_scenes_of_contrastive_learning(untrained):
    processor, _ = untrained
    dataset = Captioned(40, processor, seed=0)
    close, one, two = dataset.pairs(0), dataset.pairs(12), dataset.pairs(20)
    assert len({scene.seed for scene, _ in close}) == 4
    for scene, text in close:
        (thing,) = scene.things
        assert (thing.style, thing.size, scene.background, scene.noise) == ("filled", "large", "plain", 0)
        assert text == f"A {thing.colour} {thing.shape}."
    for shapes, most in ((one, 1), (two, 2)):
        assert len({scene.seed for scene, _ in shapes}) == 1 and len(shapes) == 4
        assert max(len(scene.things) for scene, _ in shapes) <= most
        assert len({re.sub("|".join(SHAPES), "", text) for _, text in shapes}) == 1
    assert any(len(scene.things) == 6 for index in range(24, 40) for scene, _ in dataset.pairs(index))
    for index in range(24, 40):
        alike = dataset.pairs(index)
        assert len({scene.seed for scene, _ in alike}) == 1 and 2 <= len(alike) <= 4
        # They differ, in the picture and in the words.
        assert len({text for _, text in alike}) == len(alike)
        assert len({draw(scene).tobytes() for scene, _ in alike}) == len(alike)
    batch = collate_groups([dataset[0], dataset[39]])
    ids = [encode_instruction(processor.instruction_tokenizer, text) for _, text in close + alike]
    longest = max(sum(token != 0 for token in row) for row in ids)
    assert torch.equal(batch["input_ids"], torch.tensor(ids)[:, :longest])
    assert batch["pixel_values"].shape == (len(ids), 3, 112, 112) and batch["return_loss"] is True


def test_clip_knows_places_from_the_start(untrained):
    processor, _ = untrained
    places = clip_model(processor, seed=0).vision_model
    places = getattr(places, "vision_model", places).embeddings.position_embedding.weight[1:].reshape(8, 8, 128)
    # Row and column by hand: the first quarter is the sine of pi times the row, the next its cosine.
    assert torch.allclose(places[3, 5, 32], torch.tensor(0.5 * math.cos(3 * math.pi)), atol=1e-5)
    assert torch.allclose(places[3, 5, 33], torch.tensor(0.5 * math.cos(3 * math.pi * 16 ** (-1 / 32))), atol=1e-5)
    assert torch.allclose(places[3, 5, 97], torch.tensor(0.5 * math.cos(5 * math.pi * 16 ** (-1 / 32))), atol=1e-5)
    assert places.reshape(64, 128).unique(dim=0).shape[0] == 64


def test_what_is_never_shown_is_not_learned_to_be_wrong(untrained, tmp_path):
    processor, model = untrained
    features = np.random.default_rng(0).normal(size=(5, 64, 128)).astype(np.float16)
    rows = Rows("finetune", features, processor, 80, batch_size=4, seed=0)
    batch = SideBySide(processor)([rows[index] for index in range(52, 56)])
    marked = batch["unshown"][:, 1:].flatten().tolist()
    assert sum(other >= 0 for other in marked) > 5
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False)
    trainer = InOrderEmma(model=model, args=args, train_dataset=rows, processing_class=processor)
    loss = trainer.compute_loss(model, dict(batch))
    rest = {name: values for name, values in batch.items() if name not in ("labels", "unshown")}
    logits = model(**rest).logits.detach().requires_grad_()
    expected = []
    for row, label, other in zip(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten().tolist(), marked):
        if label != -100:
            among = [token for token in range(len(row)) if token != other]
            expected.append(row[among].logsumexp(0) - row[label])
    assert torch.allclose(loss, torch.stack(expected).mean(), atol=1e-5)
    outputs = CausalLMOutput(logits=logits)
    whole = loss_without(batch["unshown"], outputs, batch["labels"], 7)
    assert torch.allclose(whole, torch.stack(expected).sum() / 7, atol=1e-4)
    # What takes no part gets no gradient; where nothing is marked it is the model's own loss.
    (gradient,) = torch.autograd.grad(whole, logits)
    for (row, place), other in zip(np.ndindex(4, logits.shape[1] - 1), marked):
        assert other < 0 or gradient[row, place, other] == 0 != gradient[row, place].abs().sum()
    nothing = torch.full_like(batch["unshown"], -1)
    assert torch.allclose(loss_without(nothing, outputs, batch["labels"]), model(**rest, labels=batch["labels"]).loss)


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"bf16": True}, True),
    ],
)
def test_bfloat16_is_for_processors_that_multiply_in_it(capabilities, fast):
    assert has_fast_bfloat16(capabilities) is fast


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["draw", "x.png", "--side", "2"], "`--side` must be at least 16 pixels: got 2."),
        (["evaluate", "--model", "m", "--questions", "0"], "`--questions` must be at least 1"),
        (["draw", "no/such/folder/x.png"], "no/such/folder"),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    assert main(["tiny", *arguments]) == 2
    assert message in capsys.readouterr().err
