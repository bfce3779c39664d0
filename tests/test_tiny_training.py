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
from emma_hf.data import encode_conversation
from emma_hf.instruction_emma import encode_instruction
from emma_hf.scenes import ENDING, EXERCISES, FAMILIES, SHAPES, Scene, caption, draw
from emma_hf.tiny_training import (
    SMOKE,
    TRAINED_FAMILIES,
    Captioned,
    InOrderEmma,
    Rows,
    SideBySide,
    clip_model,
    collate_groups,
    has_fast_bfloat16,
    loss_without,
    tiny_processor,
    train_tiny,
    training_scene,
    untrained_tiny,
    vision_features,
)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The processor with the tokenizers that the scenes teach, and EMMA around towers at random."""
    folder = tmp_path_factory.mktemp("tiny")
    processor = tiny_processor(folder / "tokenizers")
    clip_model(processor, seed=0).save_pretrained(folder / "clip")
    return processor, untrained_tiny(folder / "clip", processor, seed=0).eval()


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


def check_unshown(item, turns, tokenizer) -> int:
    """Tokens beside those of the answers are where wrong answers part from right ones; how many these are."""
    learned = item["labels"] != -100
    assert (item["unshown"][~learned] == -1).all()
    said, others = item["labels"][learned].tolist(), item["unshown"][learned].tolist()
    for turn in turns:
        end = said.index(tokenizer.eos_token_id) + 1 if turn.text else len(said)
        marked = [(place, other) for place, other in enumerate(others[:end]) if other >= 0]
        assert len(marked) == len(turn.unshown)
        for place, other in marked:
            begun = "".join(tokenizer.convert_ids_to_tokens([*said[:place], other])).replace("▁", " ")
            assert other != said[place] and any(f" {answer}".startswith(begun) for answer in turn.unshown)
        said, others = said[end:], others[end:]
    assert not said
    return sum(len(turn.unshown) for turn in turns)


def test_rows_of_both_stages(untrained, tmp_path):
    processor, model = untrained
    features = vision_features(model, processor, 5, tmp_path / "features")
    for index in (0, 4):
        picture = draw(training_scene(index, 5))
        pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        expected = model.get_vision_features(pixels)[0]
        assert np.abs(features[index] - expected.detach().numpy()).max() < 5e-3 * expected.abs().max()
    # A file of another size was cut off and is made anew.
    (tmp_path / "cut").write_bytes(b"half")
    assert np.array_equal(vision_features(model, processor, 5, tmp_path / "cut"), features)

    rows = Rows("finetune", features, processor, 80, batch_size=4, seed=0)
    decode, lengths, chats, endings, unshown = processor.tokenizer.decode, [], [], [], {}
    for index in range(len(rows)):
        picture = rows.picture(index)
        scene = training_scene(picture, 5)
        # The first rows are about the first pictures, which are easy.
        assert picture < (2 if index < 20 else 5)
        assert len(scene.things) <= (2 if picture < 2 else 6)
        item, turns = rows[index], rows.turns(index)
        unshown[index // 4 % 6] = unshown.get(index // 4 % 6, 0) + check_unshown(item, turns, processor.tokenizer)
        assert torch.equal(item["vision_features"][0], torch.from_numpy(features[picture].astype(np.float32)))
        (instruction,) = item["instruction_input_ids"].tolist()
        # As the authors train: in a row of one question all of it, else what stands after its colon.
        words = [turn.text.split(":")[-1].lstrip() if len(turns) > 1 else turn.text for turn in turns]
        ids = [encode_instruction(processor.instruction_tokenizer, text) for text in words]
        assert (item["labels"][item["segments"] == 0] == -100).all()
        # In the rows of every sixth step the questions follow each other, and the shortest is the instruction.
        if index // 4 % 6 == 0:
            said = " USER: ".join(f"{turn.text} ASSISTANT: {turn.answer}</s>" for turn in turns)
            assert decode(item["input_ids"][item["segments"] == 1]).strip().replace("</s>USER", "</s> USER") == said
            learned = decode(item["labels"][item["labels"] != -100]).split("</s>")
            assert [text.strip() for text in learned] == [*(turn.answer for turn in turns), ""]
            assert item["position_ids"].tolist() == list(range(len(item["input_ids"])))
            assert instruction in ids and instruction.count(0) == max(row.count(0) for row in ids)
            assert len(item["input_ids"]) <= 256
            chats.append(len(turns))
            continue
        assert instruction == encode_instruction(processor.instruction_tokenizer, turns[0].text)
        for number, turn in enumerate(turns, 1):
            mine = item["segments"] == number
            assert decode(item["input_ids"][mine]).strip() == f"{turn.text} ASSISTANT: {turn.answer}</s>"
            assert decode(item["labels"][mine & (item["labels"] != -100)]) == f"{turn.answer}</s>"
        # The rows of every sixth step ask one question.
        if index // 4 % 6 == 5:
            assert len(turns) == 1
        else:
            lengths.append(len(item["input_ids"]))
        endings += [ENDING in turn.text for turn in turns]
    assert np.mean(lengths) > 220 and max(lengths) <= 256 and np.mean(chats) > 4
    assert unshown[0] > 10 and sum(unshown.values()) > 50
    # Half of the questions have the ending, and a quarter of these keep it.
    assert 0.05 < np.mean(endings) < 0.2
    assert {rows.picture(index) for index in range(20)} == {0, 1}
    many = Rows("finetune", np.zeros((40_000, 1, 1)), processor, 100_000, batch_size=32, seed=0)
    taken = np.array([many.picture(index) for index in range(25_000, 65_000)])
    assert np.bincount(taken, minlength=40_000).max() <= 2 and len(set(taken)) > 0.7 * 40_000
    # Any few steps hold easy pictures and others as all do.
    assert np.all(np.abs((taken < 12_000).reshape(-1, 200).mean(axis=1) - 0.3) < 0.02)
    plain = Rows("pretrain", features, processor, 2, batch_size=4, seed=0)
    (turn,) = plain.turns(1)
    assert check_unshown(plain[1], [turn], processor.tokenizer) == len(turn.unshown)
    assert (turn.text, turn.answer) == ("", caption(training_scene(plain.picture(1), 5)))
    batch = SideBySide(processor)([plain[0], plain[1]])
    assert batch["vision_features"].shape == (2, 64, 128) and batch["input_ids"].shape == (2, 136)


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


def test_questions_side_by_side_are_answered_as_if_alone(untrained):
    processor, model = untrained
    features = np.random.default_rng(0).normal(size=(5, 64, 128)).astype(np.float16)
    rows = Rows("finetune", features, processor, 80, batch_size=4, seed=0)
    items = [rows[54], rows[55], rows[70]]
    assert [len(rows.turns(index)) > 1 for index in (54, 55, 70)] == [True, True, False]
    batch = SideBySide(processor)(items)
    assert batch["input_ids"].shape == (3, 256)
    with torch.no_grad():
        together = model(**batch)
        losses = []
        for row, index in enumerate((54, 55, 70)):
            for number, turn in enumerate(rows.turns(index), 1):
                asked = {"from": "human", "value": f"<image>\n{turn.text}"}
                conversation = [asked, {"from": "gpt", "value": turn.answer}]
                ids, labels = (torch.tensor([values]) for values in encode_conversation(processor, conversation))
                images = {name: items[row][name] for name in ("vision_features", "instruction_input_ids")}
                alone = model(input_ids=ids, labels=labels, **images)
                mine = (items[row]["segments"] == number).nonzero()[:, 0]
                assert torch.allclose(alone.logits[0, -len(mine) :], together.logits[row, mine], atol=1e-5)
                losses += [alone.loss] * int((labels != -100).sum())
    assert len(losses) == int((batch["labels"] != -100).sum())
    assert torch.allclose(together.loss, torch.stack(losses).mean(), atol=1e-5)


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


def test_every_family_is_asked_in_training():
    assert set(TRAINED_FAMILIES) == {*FAMILIES, *EXERCISES}


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
