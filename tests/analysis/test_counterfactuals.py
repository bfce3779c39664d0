"""Answers with other instructions, against the same questions asked in the usual way."""

import copy

import pytest
import torch
from support.analyzed import small, small_rows

from emma_hf import EmmaForConditionalGeneration
from emma_hf.analysis import Row, VisionPath, encode
from emma_hf.analysis.counterfactuals import (
    ANY_OTHER,
    CONSTANT,
    MEAN,
    OTHER_KIND,
    OWN,
    REMOVED,
    SAME_KIND,
    compare,
    compare_instructions,
    instructions,
)
from emma_hf.evaluation import paired_difference, share


@pytest.fixture(scope="module")
def found(path, sample):
    return compare_instructions(path, sample, seed=1, max_new_tokens=6)["conditions"]


def usual(model, processor, rows, texts, **inputs):
    """Answers one at a time, from pixels, with the instruction handed to the processor."""
    said = []
    for row, text in zip(rows, texts):
        content = [{"type": "image"}, {"type": "text", "text": row.question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        batch = processor(images=row.image, text=prompt, instructions=text, return_tensors="pt")
        tokens = model.generate(**batch, max_new_tokens=6, do_sample=False)[0, batch["input_ids"].shape[1] :]
        said.append(processor.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    return said


def test_answers_are_those_that_the_model_gives(small_model, found):
    rows = small_rows()
    texts, left_out = instructions(rows, seed=1)
    assert not left_out
    assert list(texts) == [OWN, SAME_KIND, OTHER_KIND, "empty", f"constant: {CONSTANT}", "off-domain sentence"]
    assert list(found) == [*texts, MEAN, REMOVED]
    for name, column in texts.items():
        assert found[name]["answers"] == usual(*small_model, rows, column), name
    # The random model is one whose words hang on the instruction.
    assert found["empty"]["answers"] != found[OWN]["answers"]


def test_a_replaced_text_term_is_a_model_without_text_and_with_an_offset(small_model, sample, found):
    """An EMMA with the offset of v3 and no text weights says the same."""
    model, processor = small_model
    config = copy.deepcopy(model.config)
    config.visual_offset = True
    other = EmmaForConditionalGeneration(config).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    adaptation = other.model.modality_adaptation
    rows = small_rows()
    with torch.no_grad():
        text = adaptation.visual_alignment.weight[:, 16:].clone()
        adaptation.visual_alignment.weight[:, 16:] = 0
        adaptation.visual_offset.copy_(text @ sample.instruction_tokens.mean(0))
        assert found[MEAN]["answers"] == usual(other, processor, rows, [""] * len(rows))
        adaptation.visual_offset.zero_()
        assert found[REMOVED]["answers"] == usual(other, processor, rows, [""] * len(rows))


def test_figures_of_a_condition():
    rows = [Row("", "a?", "Yes", "a"), Row("", "b?", "No", "a"), Row("", "c?", "Red", "b"), Row("", "d?", "2", "b")]
    own, said = ["yes", "No.", "red", "3"], ["Yes", "yes", "red", "2"]
    found = compare(rows, said, own)
    assert found["changed"] == share([True, True, False, True])
    assert found["accuracy"] == share([True, False, True, True])
    assert found["gain"] == paired_difference([True, True, True, False], [True, False, True, True])
    assert found["by_kind"] == {"a": share([True, False]), "b": share([True, True])}
    assert found["answers"] == said


def test_without_answers_and_kinds_only_changes_are_counted(path):
    rows = [Row(row.image, row.question) for row in small_rows()]
    conditions = compare_instructions(path, encode(path, rows), max_new_tokens=3)["conditions"]
    assert ANY_OTHER in conditions
    assert SAME_KIND not in conditions
    assert all(set(figures) == {"answers", "changed"} for figures in conditions.values())


def test_a_kind_with_one_question_leaves_that_condition_out():
    texts, left_out = instructions([*small_rows(), Row("", "Who?", "Me", "who")])
    assert SAME_KIND not in texts
    assert "row 7 ('Who?') has none" in left_out[SAME_KIND]


def test_where_neither_kind_has_another_question_any_other_is_asked():
    questions = [("What is this?", "vizwiz"), ("What is this?", "coco"), ("Who is this?", "coco")]
    texts, left_out = instructions([Row("", question, None, kind) for question, kind in questions])
    assert set(left_out) == {SAME_KIND, OTHER_KIND}
    assert texts[ANY_OTHER] == ["Who is this?", "Who is this?", "What is this?"]


def test_hand_written_answers_need_the_instruction(by_hand, by_hand_rows):
    """EVIDENCE's construction: nearly all right with the own instruction, one in eight with another's."""
    path = VisionPath(*by_hand)
    found = compare_instructions(path, encode(path, by_hand_rows), max_new_tokens=2)["conditions"]
    assert found[OWN]["accuracy"]["share"] > 0.99
    for name in set(found) - {OWN}:
        assert 0.05 < found[name]["accuracy"]["share"] < 0.25, name
        assert found[name]["gain"]["low"] > 0.6


@pytest.mark.parametrize("variant", [{"visual_offset": True}, {"instruction_feature_select_strategy": "cls"}], ids=str)
def test_variants_answer(variant):
    path = VisionPath(*small(**variant))
    rows = small_rows()[:3]
    found = compare_instructions(path, encode(path, rows), max_new_tokens=6)["conditions"]
    texts = [row.instruction for row in rows]
    assert found[OWN]["answers"] == usual(path.model, path.processor, rows, texts)
