"""Prompts and messages through the processor: counts of placeholders, whose words reach the instruction, two ways to
the same ids, and what is said of what cannot be read."""

import random
import re

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.fuzzing import JSON, MARKS, PIECES, damage_json, fuzz, texts
from support.recorded import IMAGE_TOKENS

from emma_hf.model.instruction_emma import encode_instruction, instructions_from_messages, instructions_from_prompt

PICTURE = Image.new("RGB", (20, 30), "red")
SECRET = "Zebra7"
# What a processor may say of an input that it cannot read; a file is named where one is missing.
REFUSALS = (ValueError, FileNotFoundError)


def rows_of(processor, instructions: list[str]) -> list[list[int]]:
    return [encode_instruction(processor.instruction_tokenizer, text) for text in instructions]


@fuzz(150)
@given(st.lists(texts([*PIECES, "ASSISTANT:", " ASSISTANT: "]), min_size=1, max_size=3), st.integers(0, 4))
def test_each_placeholder_of_a_prompt_is_an_image(processor, prompts, images):
    # The marks around `<image>` make it words.
    counts = [re.sub("\U000f0000<image>\U000f0001", "", prompt).count("<image>") for prompt in prompts]
    given_images = [PICTURE] * images
    if sum(counts) != images:
        with pytest.raises(ValueError, match=rf"got {sum(counts)} placeholders .* and {images} images"):
            processor(images=given_images, text=prompts)
        return
    inputs = processor(images=given_images or None, text=prompts, padding=True, return_tensors="pt")
    found = (inputs["input_ids"] == processor.image_token_id).sum(1)
    assert found.tolist() == [count * IMAGE_TOKENS for count in counts]
    assert inputs["attention_mask"].shape == inputs["input_ids"].shape
    assert len(inputs.get("pixel_values", ())) == len(inputs.get("instruction_input_ids", ())) == images
    # One prompt by itself gives the same row, without the padding.
    for row, prompt in enumerate(prompts):
        alone = processor(images=[PICTURE] * counts[row] or None, text=prompt)["input_ids"][0]
        assert inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist() == alone


@fuzz(100)
# Transformers reads a typed "▁", sentencepiece's letter for a space, in a way of its own.
@given(st.lists(texts(without=("<image>", "<s>", "</s>", "<unk>", "▁", *MARKS)), min_size=1, max_size=3))
def test_text_between_images_has_the_tokens_of_sentencepiece(processor, reference, pieces):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(reference / "original" / "tokenizer.model"))
    images = [PICTURE] * (len(pieces) - 1)
    ids = processor(images=images or None, text="<image>".join(pieces), add_special_tokens=False)["input_ids"][0]
    image = [processor.image_token_id] * IMAGE_TOKENS
    expected = [token for piece in pieces for token in [*image, *plain.encode(piece)]][IMAGE_TOKENS:]
    assert ids == expected


@fuzz(150)
@given(
    st.lists(st.tuples(texts([*PIECES, "ASSISTANT:"]), texts([*PIECES, "ASSISTANT:"], ("</s>",))), max_size=4),
    texts(),
    st.sampled_from(["image", "last"]),
)
def test_no_word_of_the_assistant_is_an_instruction(turns, last, instruction_turn):
    prompt = "".join(f"USER: {question} ASSISTANT: {answer}{SECRET}{answer}</s>" for question, answer in turns)
    prompt += f"USER: {last} ASSISTANT:"
    instructions = instructions_from_prompt(prompt, instruction_turn=instruction_turn)
    assert len(instructions) == prompt.count("<image>")
    assert not any(SECRET in text for text in instructions)


def expected_instructions(turns: list[tuple[int, str]]) -> list[str]:
    """The rule of the documents, for turns of (images, words): the first line; the next turn's for an image alone."""
    lines = [words.strip().partition("\n")[0].strip() for _, words in turns]
    following = [*lines[1:], ""]
    return [line or after for (count, _), line, after in zip(turns, lines, following) for _ in range(count)]


TURNS = st.lists(
    st.tuples(st.integers(0, 2), texts(without=MARKS), st.booleans(), texts(without=MARKS)), min_size=1, max_size=3
)


def messages_of(turns, system: str | None) -> list[dict]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for images, words, is_split, answer in turns:
        middle = len(words) // 2 if is_split else 0
        parts = [{"type": "image", "image": PICTURE}] * images
        parts = [{"type": "text", "text": words[:middle]}, *parts, {"type": "text", "text": words[middle:]}]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": f"{answer}{SECRET}"}]
    return messages[:-1]


@fuzz(150)
@given(TURNS, st.none() | texts(without=MARKS))
def test_messages_and_their_rendered_prompt_are_the_same(processor, turns, system):
    messages = messages_of(turns, system)
    images = sum(count for count, *_ in turns)
    instructions = expected_instructions([(count, words) for count, words, *_ in turns])
    assert instructions_from_messages(messages) == instructions
    prepared = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert prepared["input_ids"][0].count(processor.image_token_id) == images * IMAGE_TOKENS
    assert prepared.get("instruction_input_ids", []) == rows_of(processor, instructions)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    rendered = processor(images=[PICTURE] * images or None, text=prompt)
    assert rendered["input_ids"] == prepared["input_ids"]
    # Where nobody types a role or the end of an answer, the prompt tells the instructions, too.
    typed = [system or "", *(text for _, words, _, answer in turns for text in (words, answer))]
    if not any(word in text for text in typed for word in ("USER:", "ASSISTANT:", "<s>", "</s>")):
        assert rendered.get("instruction_input_ids", []) == rows_of(processor, instructions)


@fuzz(300)
@given(TURNS, JSON, st.integers(0, 2**32))
def test_malformed_messages_are_refused_in_words(processor, turns, junk, seed):
    messages = damage_json(messages_of(turns, "Be brief."), random.Random(seed), junk)
    try:
        prepared = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    except REFUSALS as error:
        assert str(error).strip()
        return
    assert SECRET not in str(instructions_from_messages(messages))
    images = prepared["input_ids"][0].count(processor.image_token_id)
    assert images == len(prepared.get("pixel_values", ())) * IMAGE_TOKENS


@fuzz(150)
@given(
    texts(), st.sampled_from([True, False, "longest", "max_length"]), st.none() | st.integers(1, 60), st.booleans(),
    st.sampled_from(["left", "right"]),
)  # fmt: skip
def test_padding_and_truncation_keep_images_and_words(processor, text, padding, max_length, truncation, side):
    images = [PICTURE] * re.sub("\U000f0000<image>\U000f0001", "", text).count("<image>")
    whole = processor(images=images or None, text=text)["input_ids"][0]
    options = {"padding": padding, "max_length": max_length, "truncation": truncation, "padding_side": side}
    try:
        inputs = processor(images=images or None, text=text, **options)
    except ValueError as error:
        assert truncation
        assert re.search("must not cut an image", str(error))
        assert processor.image_token_id in whole[max_length:]
        return
    ids, mask = inputs["input_ids"][0], inputs["attention_mask"][0]
    kept = [token for token, one in zip(ids, mask) if one]
    assert kept == (whole[:max_length] if truncation and max_length else whole)
    limit = processor.tokenizer.model_max_length if max_length is None else max_length
    assert len(ids) == (max(len(kept), limit) if padding == "max_length" else len(kept))
    assert kept == (ids[len(ids) - len(kept) :] if side == "left" else ids[: len(kept)])
