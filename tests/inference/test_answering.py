"""Batched answers: each as if it were asked alone."""

import pytest
from PIL import Image

from emma_hf.inference import answer
from emma_hf.inference.answering import answer_by_instruction, user_messages


def user(*content):
    return [
        {
            "role": "user",
            "content": [each if isinstance(each, dict) else {"type": "text", "text": each} for each in content],
        }
    ]


IMAGE = {"type": "image"}


@pytest.fixture
def conversations():
    return [user(IMAGE, "Who?"), user("What is a hat?"), user(IMAGE, IMAGE, "What changed between these two images?")]


def test_a_batch_answers_as_each_alone(model, processor, photo, conversations):
    image = Image.open(photo)
    images = [[image], [], [str(photo), image]]
    together = answer(model, processor, conversations, images, max_new_tokens=6)
    alone = [answer(model, processor, [one], [row], max_new_tokens=6)[0] for one, row in zip(conversations, images)]
    assert together == alone
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "path": str(photo)}, {"type": "text", "text": "Who?"}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert together[0] == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_the_instruction_is_of_the_messages_not_of_the_prompt(model, processor, photo, monkeypatch):
    """A question that holds a role's name would be cut short if the prompt were parsed."""
    received = []
    call = type(processor).__call__
    monkeypatch.setattr(
        type(processor), "__call__", lambda self, *args, **kwargs: received.append(kwargs["instructions"]) or call(self, *args, **kwargs)
    )  # fmt: skip
    answer(model, processor, [user(IMAGE, "What does ASSISTANT: mean here?")], [[str(photo)]], max_new_tokens=1)
    assert received == [[["What does ASSISTANT: mean here?"]]]


def test_stop_strings_need_no_tokenizer(model, processor, photo):
    whole = answer(model, processor, [user(IMAGE, "Who?")], [[str(photo)]], max_new_tokens=6)[0]
    stop = whole[:1]
    stopped = answer(model, processor, [user(IMAGE, "Who?")], [[str(photo)]], max_new_tokens=6, stop_strings=[stop])[0]
    assert whole.startswith(stopped)
    assert len(stopped) < len(whole)


def test_columns_of_instructions_share_the_vision_features(model, processor, photo, conversations, monkeypatch):
    first, second = Image.open(photo), Image.open(photo).rotate(90)
    # The same image in two conversations, one conversation without, one with two images.
    asked, images = [*conversations, user(IMAGE, "What is below?")], [[first], [], [second, first], [first]]
    columns = [["a hat", "", "who", "shoes"], ["", "", "", ""], ["stars", "x", "moon", "sun"]]
    encoded = []
    encode = type(model).get_vision_features
    monkeypatch.setattr(
        type(model), "get_vision_features", lambda self, pixels: encoded.append(len(pixels)) or encode(self, pixels)
    )
    together = answer_by_instruction(model, processor, asked, images, columns, max_new_tokens=6)
    assert encoded == [2]
    prompts = processor.apply_chat_template(asked, add_generation_prompt=True)
    for column, answers in zip(columns, together, strict=True):
        for text, prompt, row, found in zip(column, prompts, images, answers, strict=True):
            inputs = processor(
                images=row or None, text=prompt, instructions=[text] * len(row) if row else None, return_tensors="pt"
            )
            tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert found == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert together[0] != together[1]


def test_images_stand_where_a_prompt_holds_their_placeholders():
    assert user_messages("<image> or <image>?", 2, "<image>") == [{"role": "user", "content": "<image> or <image>?"}]
    parts = [IMAGE, {"type": "text", "text": "What does <image> mean?"}]
    assert user_messages("What does <image> mean?", 0, "<image>")[0]["content"] == parts[1:]
    assert user_messages("Who?", 2, "<image>")[0]["content"] == [IMAGE, IMAGE, {"type": "text", "text": "Who?"}]
