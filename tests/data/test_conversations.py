"""Training text against the chat template, and what a message must be."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recorded import IMAGE_TOKENS

from emma_hf.data import encode_conversation
from emma_hf.data.conversations import IGNORE_INDEX, to_llava_format
from emma_hf.model.instruction_emma import PLACEHOLDER_ESCAPE

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


def text(value) -> dict:
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    ("message", "words", "images"),
    [
        ({"role": "user", "content": "<pic>\nWho <pic> <image>?"}, "<pic>\nWho <pic> <image>?", [None, None]),
        ({"role": "assistant", "content": "a <pic>"}, "a <pic>", []),
        ({"content": "a <pic>"}, "a <pic>", []),
        (
            {
                "role": "user",
                "content": [
                    text("a <pic> "),
                    *({"type": "image", "image": None, key: key} for key in ("url", "path", "base64", "image")),
                    text("<image> b"),
                    {"type": "image"},
                    {"type": "image", "image": 0, "url": "u"},
                ],
            },
            "<pic>\n" * 6 + f"a <{PLACEHOLDER_ESCAPE}pic> <image> b",
            ["url", "path", "base64", "image", None, 0],
        ),
    ],
)
def test_a_chat_message_in_llava_s_format(message, words, images):
    assert to_llava_format(message, "<pic>") == (words, images)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ([3], "A message must be an object with `role` and `content`: got [3]."),
        ({"role": "user"}, "A message needs `content`, a text or a list of parts: got {'role': 'user'}."),
        ({"role": "user", "content": "a", "weight": 0}, "A message cannot be trained on with `weight`: got '0'. Remove the key."),
        ({"content": ["a"]}, "A part of a message needs `type` and, of type 'text', a text: got a."),
        ({"content": [text(3)]}, "A part of a message needs `type` and, of type 'text', a text: got {'type': 'text', 'text': 3}."),
        ({"content": [{"type": "video"}]}, "A part of a message must be of type 'text' or 'image': got 'video'."),
        (
            {"content": [{**text("a"), "image": "b.png"}]},
            "A part of a message of type 'text' holds text: got `image` too, 'b.png'. Make it a part of its own.",
        ),
        (
            {"content": [{"type": "image", "text": "a"}]},
            "A part of a message of type 'image' holds image or url or path or base64: got `text` too, 'a'. Make it a part of its own.",
        ),
    ],
)  # fmt: skip
def test_a_chat_message_that_has_none_is_named(message, error):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        to_llava_format(message, "<pic>")
    assert str(caught.value) == error


def test_what_is_no_message_or_holds_nothing_to_learn_is_named(processor, monkeypatch):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        encode_conversation(processor, [3])
    assert str(caught.value) == (
        "A message needs `from` (human or gpt; in a chat `role`, user or assistant) and a text: got 3."
    )
    monkeypatch.setattr(processor, "encode_prompt", lambda text: ([1], [(0, 0)]))
    with pytest.raises(
        ValueError, match="^A row needs words of the assistant to learn from: all its labels are -100.$"
    ):
        encode_conversation(processor, [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}])


def test_another_placeholder_and_another_end(renamed):
    texts = {"system": "Be <pic> <image>.", "human": "Who <image>\n<pic>?", "gpt": "a <pic> <image>"}
    ids, labels = encode_conversation(renamed, [{"from": role, "value": value} for role, value in texts.items()])
    assert ids.count(renamed.image_token_id) == IMAGE_TOKENS
    assert renamed.tokenizer.decode([token for token in labels if token != IGNORE_INDEX]) == "a <pic> <image><end>"
    caption = [{"from": "human", "value": "<pic>"}, {"from": "gpt", "value": "a <pic> <image>"}]
    ids, labels = encode_conversation(renamed, caption, "plain")
    assert ids.count(renamed.image_token_id) == IMAGE_TOKENS
    assert renamed.tokenizer.decode([token for token in labels if token != IGNORE_INDEX]) == "a <pic> <image>\n"


def test_a_caption_may_spell_out_the_placeholder_and_a_row_without_picture_is_counted(processor):
    caption = [{"from": "human", "value": "<image>\n<image>"}, {"from": "gpt", "value": "a <image> hat"}]
    ids, labels = encode_conversation(processor, caption, "plain")
    assert ids.count(processor.image_token_id) == 2 * IMAGE_TOKENS
    assert processor.tokenizer.decode([token for token in labels if token != IGNORE_INDEX]) == "a <image> hat\n"
    for row, turns, found in ((caption * 2, 4, 2), ([{"from": "human", "value": "Hi"}, caption[1]], 2, 0)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            encode_conversation(processor, row, "plain")
        assert str(caught.value) == (
            "A row of the `plain` template is a picture and its caption: "
            f"got {turns} turns and {found} placeholders in the first."
        )
