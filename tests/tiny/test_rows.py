"""The rows of emma-tiny's two stages: features of images, and questions with what is learned of each answer."""

from collections import Counter

import numpy as np
import pytest
import torch

from emma_hf.model.instruction_emma import encode_instruction
from emma_hf.tiny import rows as tiny_rows
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.questions import ENDING, EXERCISES, FAMILIES, caption
from emma_hf.tiny.rows import (
    TRAINED_FAMILIES,
    RowKind,
    TinyEmmaCollator,
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


def test_vision_features_go_on_where_they_were_stopped(untrained, tmp_path, monkeypatch):
    processor, model = untrained
    monkeypatch.setattr(tiny_rows, "FEATURE_BATCH", 2)
    expected = vision_features(model, processor, 7, tmp_path / "whole")
    # Stopped in the third batch: its first image is done, and the second batch is not known to be complete.
    partial = np.memmap(tmp_path / "stopped.part", np.float16, "w+", shape=expected.shape)
    partial[:5] = expected[:5]
    partial[3] = 1
    partial.flush()
    seen, encode = [], model.get_vision_features
    monkeypatch.setattr(model, "get_vision_features", lambda pixels: (seen.append(len(pixels)), encode(pixels))[1])
    assert np.array_equal(vision_features(model, processor, 7, tmp_path / "stopped.f16"), expected)
    assert seen == [2, 2, 1]
    assert not (tmp_path / "stopped.part").exists()
    # Stopped with two processes, whose parts begin at 0 and at 6: the first one is four images behind.
    expected = vision_features(model, processor, 12, tmp_path / "all")
    partial = np.memmap(tmp_path / "two.part", np.float16, "w+", shape=expected.shape)
    done = [0, 1, *range(6, 12)]
    partial[done] = expected[done]
    partial.flush()
    assert np.array_equal(vision_features(model, processor, 12, tmp_path / "two.f16"), expected)


def test_the_kinds_of_rows_take_turns_by_step(untrained, features, rows):
    kinds = "question question ended question question description question question ended question chat description"
    assert [rows.kind(index).value for index in range(80)] == [kinds.split()[index // 4 % 12] for index in range(80)]
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
    # However long the training, the easy ones end after the same row.
    for count in (600_000, 1_000_000):
        long = TinyEmmaDataset("finetune", np.zeros((40_000, 1, 1)), untrained[0], count, batch_size=32, seed=0)
        assert max(long.image_index(index) for index in range(127_000, 128_000)) < 12_000
        assert max(long.image_index(index) for index in range(128_000, 128_100)) > 30_000
    # Any few steps hold easy images and others as all do.
    assert np.all(np.abs((indices < 12_000).reshape(-1, 200).mean(axis=1) - 0.3) < 0.02)


def test_a_row_has_the_features_of_its_image(rows, features):
    for index in range(0, 80, 7):
        expected = torch.from_numpy(features[rows.image_index(index)].astype(np.float32))
        assert torch.equal(rows[index]["vision_features"][0], expected)


def test_questions_of_a_chat_follow_each_other(untrained, rows):
    processor, _ = untrained
    decode, excluded = processor.tokenizer.decode, 0
    for index in (index for index in range(80) if rows.kind(index) is RowKind.CHAT):
        item, turns = rows[index], rows.turns(index)
        text = " USER: ".join(f"{turn.text} ASSISTANT: {turn.answer}</s>" for turn in turns)
        words = item["input_ids"][(item["input_ids"] == processor.image_token_id).nonzero()[-1] + 1 :]
        assert decode(words).strip().replace("</s>USER", "</s> USER") == text
        answers = decode(item["labels"][item["labels"] != -100]).split("</s>")
        assert [answer.strip() for answer in answers] == [*(turn.answer for turn in turns), ""]
        # As the authors train: of several questions what stands after their colon, and the shortest of them.
        texts = [turn.text.split(":")[-1].lstrip() for turn in turns]
        ids = [encode_instruction(processor.instruction_tokenizer, text) for text in texts]
        (instruction,) = item["instruction_input_ids"].tolist()
        assert instruction in ids
        assert instruction.count(0) == max(row.count(0) for row in ids)
        assert len(turns) == 3
        excluded += check_excluded_tokens(item, turns, processor.tokenizer)
    assert excluded > 1


def test_what_is_learned_in_other_rows_is_the_answer_to_their_instruction(untrained, rows):
    processor, _ = untrained
    decode, excluded, seen = processor.tokenizer.decode, 0, Counter()
    for index in (index for index in range(80) if rows.kind(index) is not RowKind.CHAT):
        item, (turn,) = rows[index], rows.turns(index)
        (instruction,) = item["instruction_input_ids"].tolist()
        assert instruction == encode_instruction(processor.instruction_tokenizer, turn.text)
        words = item["input_ids"][(item["input_ids"] == processor.image_token_id).nonzero()[-1] + 1 :]
        assert decode(words).strip() == f"{turn.text} ASSISTANT: {turn.answer}</s>"
        assert decode(item["labels"][item["labels"] != -100]) == f"{turn.answer}</s>"
        kind = rows.kind(index)
        assert (turn.family == "caption") is (kind is RowKind.DESCRIPTION)
        assert turn.text.endswith(ENDING) is (kind is RowKind.ENDED)
        excluded += check_excluded_tokens(item, [turn], processor.tokenizer)
        seen[kind.value] += 1
    assert excluded > 20
    assert seen == {"question": 52, "ended": 12, "description": 12}


def test_most_of_what_is_learned_has_its_own_question_as_instruction(untrained):
    processor, _ = untrained
    rows = TinyEmmaDataset("finetune", np.zeros((2000, 1, 1), np.float16), processor, 12_000, 10, seed=0)
    own = every = 0
    for index in range(0, 12_000, 29):
        item = rows[index]
        labels, (instruction,) = item["labels"].tolist(), item["instruction_input_ids"].tolist()
        ends = [place for place, label in enumerate(labels) if label == processor.tokenizer.eos_token_id]
        turns = rows.turns(index)
        assert len(ends) == len(turns)
        for turn, begin, end in zip(turns, [0, *ends], ends):
            length = sum(label != -100 for label in labels[begin + 1 : end + 1])
            every += length
            own += length * (instruction == encode_instruction(processor.instruction_tokenizer, turn.text))
    assert 0.9 < own / every < 1


def test_rows_of_the_first_stage_are_captions(untrained, features):
    processor, _ = untrained
    captions = TinyEmmaDataset("pretrain", features, processor, 2, batch_size=4, seed=0)
    (turn,) = captions.turns(1)
    assert check_excluded_tokens(captions[1], [turn], processor.tokenizer) == len(turn.excluded_answers)
    assert (turn.text, turn.answer) == ("", caption(training_scene(captions.image_index(1), 5)))
    items = [captions[0], captions[1]]
    batch = TinyEmmaCollator(processor)(items)
    assert batch["vision_features"].shape == (2, 64, 128)
    lengths = [len(item["input_ids"]) for item in items]
    assert len(set(lengths)) == 2
    assert batch["input_ids"].shape == batch["excluded_tokens"].shape == (2, max(lengths))
    short = lengths.index(min(lengths))
    assert (batch["excluded_tokens"][short, min(lengths) :] == -1).all()


def test_every_family_is_asked_in_training():
    assert set(TRAINED_FAMILIES) == {*FAMILIES, *EXERCISES}


def test_counts_are_kept_by_their_share(untrained, monkeypatch):
    processor, _ = untrained

    def counts() -> Counter:
        rows = TinyEmmaDataset("finetune", np.zeros((40, 1, 1)), processor, 1200, batch_size=4, seed=0)
        turns = (turn for index in range(300, 900) for turn in rows.turns(index))
        return Counter(turn.answer for turn in turns if turn.family == "count")

    monkeypatch.setattr(tiny_rows, "KEPT_COUNTS", {})
    all_counts = counts()
    monkeypatch.setattr(tiny_rows, "KEPT_COUNTS", {"0": 0, "1": 0.1})
    kept = counts()
    assert min(all_counts["0"], all_counts["1"]) > 20
    assert not kept["0"]
    assert 0 < kept["1"] / kept["2"] < 0.5 * all_counts["1"] / all_counts["2"]
