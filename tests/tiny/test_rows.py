"""The rows of emma-tiny's two stages: features of images, and questions with what is learned of each answer."""

from collections import Counter

import numpy as np
import pytest
import torch

from emma_hf.data import encode_conversation
from emma_hf.model.instruction_emma import encode_instruction
from emma_hf.tiny import rows as tiny_rows
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.questions import ENDING, EXERCISES, FAMILIES, caption
from emma_hf.tiny.rows import (
    TRAINED_FAMILIES,
    PackedQuestionsCollator,
    RowKind,
    TinyEmmaDataset,
    training_scene,
    vision_features,
)


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(5, 64, 128)).astype(np.float16)


@pytest.fixture(scope="module")
def rows(untrained, features):
    return TinyEmmaDataset("finetune", features, untrained[0], 80, batch_size=4, seed=0)


def check_excluded_tokens(item, turns, tokenizer) -> int:
    """Excluded tokens are those by which excluded answers depart from right ones; returns how many these are."""
    has_label = item["labels"] != -100
    assert (item["excluded_tokens"][~has_label] == -1).all()
    tokens, excluded = item["labels"][has_label].tolist(), item["excluded_tokens"][has_label].tolist()
    for turn in turns:
        end = tokens.index(tokenizer.eos_token_id) + 1 if turn.text else len(tokens)
        marked = [(i, other) for i, other in enumerate(excluded[:end]) if other >= 0]
        assert len(marked) == len(turn.excluded_answers)
        for i, other in marked:
            begun = "".join(tokenizer.convert_ids_to_tokens([*tokens[:i], other])).replace("▁", " ")
            assert other != tokens[i]
            assert any(f" {answer}".startswith(begun) for answer in turn.excluded_answers)
        tokens, excluded = tokens[end:], excluded[end:]
    assert not tokens
    return sum(len(turn.excluded_answers) for turn in turns)


def test_vision_features_are_those_of_the_model(untrained, tmp_path):
    processor, model = untrained
    features = vision_features(model, processor, 5, tmp_path / "features")
    for index in (0, 4):
        image = draw(training_scene(index, 5))
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        expected = model.get_vision_features(pixels)[0]
        assert np.abs(features[index] - expected.detach().numpy()).max() < 5e-3 * expected.abs().max()
    # A file of another size was cut off and is made anew.
    (tmp_path / "cut").write_bytes(b"half")
    assert np.array_equal(vision_features(model, processor, 5, tmp_path / "cut"), features)


def test_the_kinds_of_rows_take_turns_by_step(untrained, features, rows):
    kinds = ["chat", "packed", "packed", "packed", "packed", "single"]
    assert [rows.kind(index).value for index in range(80)] == [kinds[index // 4 % 6] for index in range(80)]
    captions = TinyEmmaDataset("pretrain", features, untrained[0], 30, batch_size=4, seed=0)
    assert {captions.kind(index) for index in range(30)} == {RowKind.CAPTION}


def test_the_first_rows_are_about_easy_images(untrained, rows):
    assert {rows.image_index(index) for index in range(20)} == {0, 1}
    assert {rows.image_index(index) for index in range(20, 80)} == {0, 1, 2, 3, 4}
    assert max(len(training_scene(index, 5).things) for index in (0, 1)) <= 2
    many = TinyEmmaDataset("finetune", np.zeros((40_000, 1, 1)), untrained[0], 100_000, batch_size=32, seed=0)
    indices = np.array([many.image_index(index) for index in range(25_000, 65_000)])
    assert np.bincount(indices, minlength=40_000).max() <= 2
    assert len(set(indices)) > 0.7 * 40_000
    # Any few steps hold easy images and others as all do.
    assert np.all(np.abs((indices < 12_000).reshape(-1, 200).mean(axis=1) - 0.3) < 0.02)


def test_a_row_has_the_features_of_its_image(rows, features):
    for index in range(0, 80, 7):
        expected = torch.from_numpy(features[rows.image_index(index)].astype(np.float32))
        assert torch.equal(rows[index]["vision_features"][0], expected)


def test_questions_of_a_chat_follow_each_other(untrained, rows):
    processor, _ = untrained
    decode, counts, excluded = processor.tokenizer.decode, [], 0
    for index in (index for index in range(80) if rows.kind(index) is RowKind.CHAT):
        item, turns = rows[index], rows.turns(index)
        text = " USER: ".join(f"{turn.text} ASSISTANT: {turn.answer}</s>" for turn in turns)
        assert decode(item["input_ids"][item["segments"] == 1]).strip().replace("</s>USER", "</s> USER") == text
        answers = decode(item["labels"][item["labels"] != -100]).split("</s>")
        assert [answer.strip() for answer in answers] == [*(turn.answer for turn in turns), ""]
        assert item["position_ids"].tolist() == list(range(len(item["input_ids"])))
        assert (item["labels"][item["segments"] == 0] == -100).all()
        # As the authors train: of several questions what stands after their colon, and the shortest of them.
        texts = [turn.text.split(":")[-1].lstrip() if len(turns) > 1 else turn.text for turn in turns]
        ids = [encode_instruction(processor.instruction_tokenizer, text) for text in texts]
        (instruction,) = item["instruction_input_ids"].tolist()
        assert instruction in ids
        assert instruction.count(0) == max(row.count(0) for row in ids)
        assert len(item["input_ids"]) <= 256
        counts.append(len(turns))
        excluded += check_excluded_tokens(item, turns, processor.tokenizer)
    assert np.mean(counts) > 4
    assert excluded > 10


def test_packed_questions_fill_a_row_and_single_ones_stand_alone(untrained, rows):
    processor, _ = untrained
    decode, lengths, endings, excluded = processor.tokenizer.decode, [], [], 0
    for index in (index for index in range(80) if rows.kind(index) is not RowKind.CHAT):
        item, turns = rows[index], rows.turns(index)
        (instruction,) = item["instruction_input_ids"].tolist()
        assert instruction == encode_instruction(processor.instruction_tokenizer, turns[0].text)
        assert (item["labels"][item["segments"] == 0] == -100).all()
        for number, turn in enumerate(turns, 1):
            own = item["segments"] == number
            assert decode(item["input_ids"][own]).strip() == f"{turn.text} ASSISTANT: {turn.answer}</s>"
            assert decode(item["labels"][own & (item["labels"] != -100)]) == f"{turn.answer}</s>"
        if rows.kind(index) is RowKind.SINGLE:
            assert len(turns) == 1
        else:
            lengths.append(len(item["input_ids"]))
        endings += [ENDING in turn.text for turn in turns]
        excluded += check_excluded_tokens(item, turns, processor.tokenizer)
    assert np.mean(lengths) > 220
    assert max(lengths) <= 256
    assert excluded > 40
    # Half of the questions have the ending, and a quarter of these keep it.
    assert 0.05 < np.mean(endings) < 0.2


def test_rows_of_the_first_stage_are_captions(untrained, features):
    processor, _ = untrained
    captions = TinyEmmaDataset("pretrain", features, processor, 2, batch_size=4, seed=0)
    (turn,) = captions.turns(1)
    assert check_excluded_tokens(captions[1], [turn], processor.tokenizer) == len(turn.excluded_answers)
    assert (turn.text, turn.answer) == ("", caption(training_scene(captions.image_index(1), 5)))
    batch = PackedQuestionsCollator(processor)([captions[0], captions[1]])
    assert batch["vision_features"].shape == (2, 64, 128)
    assert batch["input_ids"].shape == (2, 136)


def test_packed_questions_are_answered_as_if_alone(untrained):
    processor, model = untrained
    features = np.random.default_rng(0).normal(size=(5, 64, 128)).astype(np.float16)
    rows = TinyEmmaDataset("finetune", features, processor, 80, batch_size=4, seed=0)
    items = [rows[54], rows[55], rows[70]]
    assert [len(rows.turns(index)) > 1 for index in (54, 55, 70)] == [True, True, False]
    batch = PackedQuestionsCollator(processor)(items)
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


def test_every_family_is_asked_in_training():
    assert set(TRAINED_FAMILIES) == {*FAMILIES, *EXERCISES}


def test_counts_are_kept_by_their_share(untrained, monkeypatch):
    processor, _ = untrained

    def counts() -> Counter:
        rows = TinyEmmaDataset("finetune", np.zeros((40, 1, 1)), processor, 240, batch_size=4, seed=0)
        turns = (turn for index in range(60, 120) for turn in rows.turns(index))
        return Counter(turn.answer for turn in turns if turn.family == "count")

    monkeypatch.setattr(tiny_rows, "KEPT_COUNTS", {})
    all_counts = counts()
    monkeypatch.setattr(tiny_rows, "KEPT_COUNTS", {"0": 0, "1": 0.1})
    kept = counts()
    assert min(all_counts["0"], all_counts["1"]) > 20
    assert not kept["0"]
    assert 0 < kept["1"] / kept["2"] < 0.5 * all_counts["1"] / all_counts["2"]
