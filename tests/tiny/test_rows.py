"""The rows of emma-tiny's two stages: features of pictures, and questions with what is learned of each answer."""

from collections import Counter

import numpy as np
import torch

from emma_hf.data import encode_conversation
from emma_hf.model.instruction_emma import encode_instruction
from emma_hf.tiny import rows as tiny_rows
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.questions import ENDING, EXERCISES, FAMILIES, caption
from emma_hf.tiny.rows import TRAINED_FAMILIES, Rows, SideBySide, training_scene, vision_features


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


def test_every_family_is_asked_in_training():
    assert set(TRAINED_FAMILIES) == {*FAMILIES, *EXERCISES}


def test_counts_are_kept_by_their_share(untrained, monkeypatch):
    processor, _ = untrained

    def counts() -> Counter:
        rows = Rows("finetune", np.zeros((40, 1, 1)), processor, 240, batch_size=4, seed=0)
        turns = (turn for index in range(60, 120) for turn in rows.turns(index))
        return Counter(turn.answer for turn in turns if turn.family == "count")

    monkeypatch.setattr(tiny_rows, "KEPT_COUNTS", {})
    all_counts = counts()
    monkeypatch.setattr(tiny_rows, "KEPT_COUNTS", {"0": 0, "1": 0.1})
    kept = counts()
    assert min(all_counts["0"], all_counts["1"]) > 20 and not kept["0"]
    assert 0 < kept["1"] / kept["2"] < 0.5 * all_counts["1"] / all_counts["2"]
