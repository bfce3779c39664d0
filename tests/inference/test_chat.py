"""A conversation that keeps its cache."""

import pytest

from emma_hf.inference import Chat, answer
from emma_hf.model.errors_emma import EmmaError


def turns_of(chat: Chat) -> list:
    """The conversation up to the last question."""
    return chat.messages[:-1]


@pytest.fixture
def prompt_lengths(model, monkeypatch):
    """Tokens of each forward pass of more than one."""
    lengths = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    yield lengths
    hook.remove()


def test_each_turn_answers_as_without_a_cache(model, processor, photo, prompt_lengths):
    chat = Chat(model, processor, [str(photo)])
    for question in ("Who is it?", "And the hat?", "Why?"):
        said = chat.answer(question, max_new_tokens=4)
        assert said == answer(model, processor, [turns_of(chat)], [[str(photo)]], max_new_tokens=4)[0]
        assert chat.messages[-1]["content"][0]["text"] == said
    cached = [length for length in prompt_lengths if length > 1]
    # Of each pair of prompts, the chat's and the whole.
    assert cached[0] == cached[1]
    assert cached[2] < cached[3] / 2
    assert cached[4] < cached[5] / 2


def test_a_conversation_leaves_room_for_an_answer(model, processor, photo):
    positions = model.config.position_count
    chat = Chat(model, processor, [str(photo)])
    with pytest.raises(EmmaError, match=rf"in the model's {positions} positions: got \d+ tokens. Shorten the question"):
        chat.answer("why " * positions, max_new_tokens=4)
    assert chat.messages == []


def test_images_are_a_list(model, processor):
    with pytest.raises(EmmaError, match="`images` must be a list of images: got str. Put it into a list."):
        Chat(model, processor, "scene.png")


def test_an_answer_that_breaks_off_leaves_nothing_behind(model, processor, photo):
    class Stopping:
        calls = 0

        def put(self, tokens):
            # The prompt, and then the first token.
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt

    chat = Chat(model, processor, [str(photo)])
    chat.answer("Who is it?", max_new_tokens=4)
    with pytest.raises(KeyboardInterrupt):
        chat.answer("Describe the whole picture, and all that is in it.", max_new_tokens=4, streamer=Stopping())
    said = chat.answer("And the hat?", max_new_tokens=4)
    assert said == answer(model, processor, [turns_of(chat)], [[str(photo)]], max_new_tokens=4)[0]


def test_a_guide_that_changes_drops_the_cache(model, processor, photo, monkeypatch):
    monkeypatch.setattr(processor, "instruction_turn", "last")
    chat = Chat(model, processor, [str(photo)])
    for question in ("Who is it?", "And the hat?"):
        said = chat.answer(question, max_new_tokens=4)
        assert said == answer(model, processor, [turns_of(chat)], [[str(photo)]], max_new_tokens=4)[0]
        assert chat.cached_instructions == [question]


def test_an_instruction_of_the_users(model, processor, photo):
    chat = Chat(model, processor, [str(photo), str(photo)], instruction="the hat")
    chat.answer("Who?", max_new_tokens=1)
    assert chat.cached_instructions == ["the hat", "the hat"]


def test_encoded_images_give_the_same_answer(model, processor, photo):
    chat = Chat(model, processor, [str(photo)])
    expected = chat.answer("Who is it?", max_new_tokens=4)
    chat.start_over()
    assert chat.messages == []
    chat.encode_images()
    assert chat.answer("Who is it?", max_new_tokens=4) == expected


@pytest.mark.parametrize("question", ["", " \n\t"])
def test_a_question_without_words_is_refused(model, processor, photo, question):
    chat = Chat(model, processor, [str(photo)])
    with pytest.raises(EmmaError, match="must have words: got "):
        chat.answer(question)
    assert chat.messages == []
