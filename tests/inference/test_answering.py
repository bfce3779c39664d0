"""Batched answers: each as if it were asked alone."""

import pytest
from PIL import Image

from emma_hf.inference import answer


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
