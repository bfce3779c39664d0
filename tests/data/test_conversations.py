"""Training text against the chat template, and what a message must be."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recorded import IMAGE_TOKENS

from emma_hf.data import encode_conversation
from emma_hf.data.conversations import IGNORE_INDEX

# Letters that a tokenizer, a template or a parser of prompts may treat in a way of their own.
PIECES = st.sampled_from(["a", "B:", " ", "\n", "é", "猫", "USER:", "ASSISTANT:", "</s>", "<image>", "{{", "\t", "?"])
TEXTS = st.lists(PIECES, max_size=6).map("".join)


@given(
    turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3),
    system=st.none() | TEXTS,
    images=st.lists(st.integers(0, 2), min_size=3, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_the_training_text_is_the_chat_template(processor, turns, system, images):
    """Documented differences: training strips a user turn that holds an image, and a chat's text parts never hold a
    placeholder, so that a user's spelled-out one is left out here."""
    messages, conversation = [], []
    if system is not None:
        messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
        conversation.append({"from": "system", "value": system})
    for (question, answer), count in zip(turns, images):
        question = question.replace("<image>", "")
        question = question.strip() if count else question
        parts = [{"type": "image"}] * count + [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        conversation.append({"from": "human", "value": f"{question}\n" + "<image>" * count if count else question})
        conversation.append({"from": "gpt", "value": answer})
    prompt = processor.apply_chat_template(messages)
    expected, spans = processor.encode_prompt(prompt)
    input_ids, labels = encode_conversation(processor, conversation)
    assert input_ids == expected
    assert input_ids.count(processor.image_token_id) == IMAGE_TOKENS * sum(images[: len(turns)])
    # The answers and their end-of-sequence, where the template ends each of them.
    answers = sum(label == processor.tokenizer.eos_token_id for label in labels)
    assert answers >= len(turns)
    assert labels[-1] == processor.tokenizer.eos_token_id
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(input_ids, labels))
    assert len(spans) == len(labels)


@pytest.mark.parametrize("system", [[], [{"from": "system", "value": "Be <image> brief."}]])
def test_the_answers_and_their_ends_have_labels_and_nothing_else(processor, system):
    def ids_of(text: str) -> list[int]:
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    turns = [("human", "a"), ("gpt", "b <image> c"), ("human", "d"), ("gpt", "e")]
    conversation = [*system, *({"from": role, "value": text} for role, text in turns)]
    ids, labels = encode_conversation(processor, conversation)
    learned = [token for token in labels if token != IGNORE_INDEX]
    end = processor.tokenizer.eos_token_id
    assert processor.tokenizer.decode(learned) == "b <image> c</s> e</s>"
    assert learned[-len(ids_of("e")) - 1 :] == [*ids_of("e"), end]
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels))
    assert processor.image_token_id not in ids
    # The first stage learns the caption and its line break.
    caption = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a hat"}]
    ids, labels = encode_conversation(processor, caption, "plain")
    words = ids_of("a hat\n")
    assert ids == [processor.tokenizer.bos_token_id, *[processor.image_token_id] * IMAGE_TOKENS, *words]
    assert labels == [IGNORE_INDEX] * (1 + IMAGE_TOKENS) + words


def test_a_row_may_fill_the_context_and_no_more(processor, monkeypatch):
    conversation = [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]
    length = len(encode_conversation(processor, conversation)[0])
    monkeypatch.setattr(processor.tokenizer, "model_max_length", length)
    assert len(encode_conversation(processor, conversation)[0]) == length
    monkeypatch.setattr(processor.tokenizer, "model_max_length", length - 1)
    with pytest.raises(
        ValueError, match=f"context of {length - 1} tokens: it has {length}, 1 too many. Shorten it, or"
    ):
        encode_conversation(processor, conversation)


@pytest.mark.parametrize("where", ["human", "gpt", "system"])
def test_half_a_surrogate_pair_is_named(processor, where):
    conversation = [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]
    for message in conversation:
        if message["from"] == where:
            message["value"] += " \ud83d"
    expected = (
        rf"must be valid Unicode: that of a {where} message has half of a surrogate pair at character 2, '\\ud83d'"
    )
    with pytest.raises(ValueError, match=expected):
        encode_conversation(processor, conversation)


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", 0), ("image", "a.png"), ("tool_calls", [{}]), ("train", False), ("loss", False), ("videos", ["a.mp4"])],
)
def test_a_key_with_an_effect_is_not_ignored(processor, key, value):
    conversation = [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g", key: value}]
    with pytest.raises(ValueError, match=f"A message cannot be trained on with `{key}`: got .*Remove the key"):
        encode_conversation(processor, conversation)
    conversation[1][key] = None
    assert encode_conversation(processor, conversation)
