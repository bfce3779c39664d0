"""What a client may ask of the server, and what it is told otherwise."""

import base64
import io
import json

import pytest
from PIL import Image
from support.images import png_header

from emma_hf.serving import Limits, RequestError
from emma_hf.serving.limits import CHARACTERS_PER_POSITION, IMAGE_FORMATS
from emma_hf.serving.requests import ChatRequest, read_request


def data_url(image: Image.Image, form: str = "PNG", **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


RED = data_url(Image.new("RGB", (4, 3), "red"))


def user(*urls: str, text: str = "What is it?") -> list[dict]:
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def read(limits: Limits | None = None, **body) -> ChatRequest:
    request = read_request({"messages": user(RED), **body}, "emma", limits or Limits(), 3, 512)
    request.decode_images()
    return request


def test_a_request_becomes_messages_with_decoded_pictures():
    request = read(model="emma", max_tokens=7, temperature=0, seed=3, stop="x", stream=True, user="me", n=1, tools=None)
    image, words = request.messages[0]["content"]
    assert image["image"].size == (4, 3)
    assert image["image"].getpixel((0, 0)) == (255, 0, 0)
    assert words == {"type": "text", "text": "What is it?"}
    assert (request.max_tokens, request.temperature, request.seed) == (7, 0.0, 3)
    assert (request.stop, request.stream, request.instructions) == (("x",), True, None)
    assert read(max_tokens=7, max_completion_tokens=5).max_tokens == 5
    assert read(logprobs=False, stop=None).stop == ()
    # A text is words, whatever it says; only parts are pictures.
    plain = read(messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>"}])
    assert plain.messages[1]["content"] == [{"type": "text", "text": "<image>"}]


def test_instructions_of_the_client_s_own():
    assert read(chat_template_kwargs={"instructions": "the hat"}).instructions == "the hat"
    assert read(chat_template_kwargs={"instructions": ["the hat"]}).instructions == ["the hat"]
    assert read(chat_template_kwargs={}).instructions is None


def test_a_photo_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    request = read(messages=user(data_url(Image.new("RGB", (40, 30)), "JPEG", exif=exif)))
    assert request.messages[0]["content"][0]["image"].size == (30, 40)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": None}, "`messages` must be a list of at least one message: got None."),
        ({"messages": []}, "must be a list of at least one message: got \\[\\]"),
        ({"messages": ["Hi"]}, "`messages\\[0\\]` must be an object with `role` and `content`: got 'Hi'"),
        ({"messages": [{"content": "Hi"}]}, "must have the role system \\(first only\\), user or assistant: got None"),
        ({"messages": [*user(RED), {"role": "system", "content": "x"}]}, "`messages\\[1\\]` must have the role"),
        ({"messages": [{"role": "user"}]}, "content of `messages\\[0\\]` must be a text or a list of parts: got None"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "must be of type text or image_url: got 'x'"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "or image_url: got 'video_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "must be a string: got None"),
        ({"messages": user(text="\ud800")}, "must be valid Unicode: got half a character at position 0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 'must be {"url": "data:image/png;'),
        ({"messages": [{**user(RED)[0], "role": "system"}]}, "Pictures belong into messages of the user: got one in"),
        ({"messages": [*user(RED), {"role": "assistant", "content": "x"}]}, "The last message must be the user's"),
        (
            {"messages": [*user(RED), {"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "holds `tool_calls`: this model calls no tools",
        ),
        ({"messages": [{**user(RED)[0], "images": ["QUJD"]}]}, "holds `images`: .* its pictures are parts of the content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "image_url": {"url": RED}}]}]},
            "of type text must hold nothing else: got `image_url` {'url': ",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": RED}, "text": "x"}]}]},
            "of type image_url must hold nothing else: got `text` 'x'. Make it a part",
        ),
        ({"tool_choice": "required"}, "`tool_choice` must be 'none' or left out: got 'required'"),
        ({"messages": user("/etc/hostname")}, "must be a data URL .*: got '/etc/hostname'"),
        ({"messages": user("file:///etc/hostname")}, "must be a data URL .*: got 'file:///etc/hostname'"),
        ({"messages": user("http://127.0.0.1/x.png")}, "fetches no pictures: got 'http://127.0.0.1/x.png'"),
        ({"messages": user("data:image/png,x")}, "must begin like data:image/png;base64, got 'data:image/png,x'"),
        ({"messages": user("data:image/png;base64,%%%")}, "must hold base64: got 'data:image/png;base64,%%%'"),
        ({"messages": user("data:image/png;base64,QUJD")}, "must be one of PNG, JPEG, .*: got 3 bytes of something"),
        ({"messages": user(RED[:-40])}, "The picture .* cannot be decoded .* Is it complete?"),
        ({"messages": user(RED, "x")}, "Picture 2 of 2: A picture must be a data URL"),
        ({"messages": user(RED, RED, RED, RED)}, "has room for at most 3 pictures: got 4"),
        ({"max_tokens": 0}, "`max_tokens` must be a whole number of at least 1: got 0"),
        ({"max_tokens": 1.5}, "`max_tokens` must be a whole number of at least 1: got 1.5"),
        ({"max_completion_tokens": "many"}, "`max_completion_tokens` must be a whole number"),
        ({"temperature": 3}, "`temperature` must be a number from 0 to 2: got 3"),
        ({"temperature": float("nan")}, "`temperature` must be a number from 0 to 2: got nan"),
        ({"temperature": True}, "`temperature` must be a number from 0 to 2: got True"),
        ({"temperature": 1e-38}, "`temperature` must be 0, .* or at least 1e-06: got 1e-38"),
        ({"temperature": 5e-324}, "`temperature` must be 0, .* or at least 1e-06: got 5e-324"),
        ({"top_p": -0.1}, "`top_p` must be a number from 0 to 1: got -0.1"),
        ({"top_p": 1.5}, "`top_p` must be a number from 0 to 1: got 1.5"),
        ({"seed": 2**64}, "`seed` must be a whole number of 64 bits: got 18446744073709551616"),
        ({"stop": ["a", ""]}, "`stop` must be a text or a list of at most 4, none empty: got \\['a', ''\\]"),
        ({"stop": list("abcde")}, "list of at most 4"),
        ({"stop": "a" * 129}, "A text of `stop` may have at most 128 characters: got 129"),
        ({"stop": ["x", "a" * 200_000]}, "A text of `stop` may have at most 128 characters: got 200000"),
        ({"stop": "\ud800"}, "`stop` must be valid Unicode"),
        ({"stream": "yes"}, "`stream` must be true or false: got 'yes'"),
        ({"n": 2}, "`n` must be 1 or left out: got 2"),
        ({"function_call": {"name": "f"}}, "`function_call` must be 'none' or left out: got {'name': 'f'}"),
        ({"reasoning_effort": "high"}, "`reasoning_effort` must be 'none' or left out: got 'high'"),
        ({"verbosity": "low"}, "`verbosity` must be 'medium' or left out: got 'low'"),
        ({"frequency_penalty": False}, "`frequency_penalty` must be 0 or left out: got False"),
        ({"logprobs": 0}, "`logprobs` must be False or left out: got 0"),
        ({"\ud800": 1}, "that this server knows: got"),
        ({"n": True}, "`n` must be 1 or left out: got True"),
        ({"logprobs": True}, "`logprobs` must be False or left out: got True"),
        ({"response_format": {"type": "json_object"}}, "`response_format` must be .* or left out"),
        ({"tools": [{"type": "function"}]}, "`tools` must be \\[\\] or left out"),
        ({"generation_config": "{}"}, "fields of OpenAI's chat completions that this server knows: got 'generation_conf"),
        ({"instructions": "the hat"}, "that this server knows: got 'instructions'"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "`chat_template_kwargs` takes `instructions` only: got"),
        ({"chat_template_kwargs": {"instructions": ["a", "b"]}}, "one for each of 1 pictures: got \\['a', 'b'\\]"),
        ({"chat_template_kwargs": {"instructions": "\ud800"}}, "^`instructions` must be valid Unicode"),
        ({"chat_template_kwargs": {"instructions": [3]}}, "Each of `instructions` must be a string: got 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(body, message):
    with pytest.raises(RequestError, match=message) as caught:
        read(**body)
    assert caught.value.status == 400
    # Each error names the field, or a place inside it.
    (field,) = body
    assert caught.value.param.partition("[")[0] == field.encode(errors="backslashreplace").decode()
    # No message repeats a whole picture.
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "gpt"}, "model"),
        ({"temperature": 3}, "temperature"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stream": 1}, "stream"),
        ({"n": 2}, "n"),
        ({"top_k": 5}, "top_k"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool"}]}, "messages[0].role"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content"),
        ({"messages": [{**user(RED)[0], "role": "system"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        (
            {"messages": [{"role": "assistant", "content": "x", "function_call": {"name": "f"}}]},
            "messages[0].function_call",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": user("data:image/png;base64,QUJD")}, "messages"),
        ({"messages": user(RED, RED, RED, RED)}, "messages"),
        ({"chat_template_kwargs": {"instructions": 3}}, "chat_template_kwargs"),
    ],
)
def test_an_error_names_its_field(body, param):
    with pytest.raises(RequestError) as caught:
        read(**body)
    assert caught.value.param == param


def test_fields_without_bearing_on_the_answer():
    plain = read()
    neutral = {
        "safety_identifier": "me", "prompt_cache_key": "x", "prediction": {"type": "content", "content": "x"},
        "function_call": "none", "reasoning_effort": "none", "verbosity": "medium", "presence_penalty": 0.0,
        "logit_bias": {}, "response_format": {"type": "text"}, "stream_options": {"include_usage": True},
    }  # fmt: skip
    asked = read(**neutral)
    assert asked.messages[0]["content"][1] == plain.messages[0]["content"][1]
    assert asked.instructions is asked.temperature is asked.top_p is asked.max_tokens is None
    assert read(top_p=0).top_p == 0


def test_what_the_developer_and_the_system_say_is_one_system_prompt():
    question = {"role": "user", "content": "Hi"}
    for first, second in (("developer", "system"), ("system", "system"), ("system", "developer")):
        messages = read(
            messages=[
                {"role": first, "content": "Be brief."},
                {"role": second, "content": [{"type": "text", "text": "Be kind."}]},
                question,
            ]
        ).messages
        assert [message["role"] for message in messages] == ["system", "user"]
        assert "".join(part["text"] for part in messages[0]["content"]) == "Be brief.\n\nBe kind."
        assert {part["type"] for part in messages[0]["content"]} == {"text"}
    assert read(messages=[{"role": "developer", "content": "Be brief."}, question]).messages[0]["role"] == "system"
    with pytest.raises(RequestError, match="`messages\\[1\\]` must have the role system .first only."):
        read(messages=[question, {"role": "developer", "content": "Be brief."}, question])


def test_an_assistant_that_said_nothing():
    messages = [
        *user(RED),
        {"role": "assistant", "content": None, "tool_calls": None},
        {"role": "user", "content": "?"},
    ]
    assert read(messages=messages).messages[1] == {"role": "assistant", "content": [{"type": "text", "text": ""}]}


def test_base64_may_have_line_breaks_and_a_scheme_in_capitals():
    head, _, encoded = RED.partition(",")
    lines = "\r\n".join(encoded[start : start + 76] for start in range(0, len(encoded), 76))
    for url in (f"{head},{lines}\n", f"DATA{head[4:]},{encoded}"):
        assert read(messages=user(url)).messages[0]["content"][0]["image"].size == (4, 3)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (user(text="x" * (512 * CHARACTERS_PER_POSITION + 1)), "may have at most 32768 characters: got 32769"),
        ([{"role": "user", "content": "x"}] * 513, "may have at most 512 messages: got 513"),
        (
            [{"role": "user", "content": [{"type": "text", "text": ""}] * 513}],
            "may have at most 512 parts: got 513",
        ),
    ],
    ids=["characters", "messages", "parts"],
)
def test_what_cannot_fit_is_refused_before_it_costs_time(messages, message):
    with pytest.raises(RequestError, match=f"maximum context length is 512 tokens, .* {message}") as caught:
        read(messages=messages)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert caught.value.param == "messages"


@pytest.mark.parametrize("instructions", ["x" * 40_000, ["x" * 40_000]], ids=["one", "list"])
def test_an_instruction_has_a_length(instructions):
    with pytest.raises(RequestError, match="`instructions` may have at most 32768 characters: got 40000") as caught:
        read(chat_template_kwargs={"instructions": instructions})
    assert caught.value.param == "chat_template_kwargs"


def test_every_limit_is_itself_allowed():
    assert read(temperature=1e-6).temperature == 1e-6
    assert (read(temperature=2).temperature, read(top_p=1).top_p, read().stream) == (2, 1, False)
    for seed in (2**63 - 1, -(2**63)):
        assert read(seed=seed).seed == seed
    stop = ["x" * 128, "b", "c", "d"]
    assert read(stop=stop).stop == tuple(stop)
    assert read(stop=[]).stop == ()
    longest = "x" * 512 * CHARACTERS_PER_POSITION
    assert read(chat_template_kwargs={"instructions": longest}).instructions == longest
    assert (
        read(messages=[{"role": "user", "content": "Hi"}], chat_template_kwargs={"instructions": []}).instructions == []
    )
    assert len(read(messages=[{"role": "user", "content": "x"}] * 512).messages) == 512
    assert read(messages=user(text=longest)).messages


def test_a_broken_picture_is_numbered():
    with pytest.raises(RequestError, match="^Picture 2 of 2: The picture .* cannot be decoded"):
        read(messages=user(RED, RED[:-40]))
    photo = data_url(Image.new("RGB", (40, 30), "red"), "JPEG", exif=_turned())
    parts = read(messages=user(RED, photo)).messages[0]["content"]
    assert set(parts[1]) == {"type", "image"}
    assert parts[1]["image"].size == (30, 40)


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_what_was_sent_is_shown():
    for body, text in (
        ({"messages": [{"role": "tool", "content": "x"}]}, "user or assistant: got 'tool'."),
        ({"messages": [{"role": [], "content": "x"}]}, "user or assistant: got []."),
        ({"messages": [{"role": "user", "content": 3}]}, "a list of parts: got 3."),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 3}]}]}, "got 3."),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "The text of `messages[0]` must be a string: got 3."),
        ({"messages": [*user(RED), *user(), {"role": "assistant", "content": "x"}]}, "got one with role 'assistant'."),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "are parts of the content. Leave it out."),
        ({"chat_template_kwargs": {"x": 1}}, "takes `instructions` only: got {'x': 1}."),
        ({"chat_template_kwargs": {"instructions": "\ud800"}}, "`instructions` must be valid Unicode: got half a character at position 0."),
        ({"a": 1, "b": 1, "c": 1, "d": 1}, "this server knows: got 'a', 'b', 'c'. Leave it out."),
        ({"x" * 90: 1}, "…. Leave it out."),
    ):  # fmt: skip
        with pytest.raises(RequestError) as caught:
            read(**body)
        assert str(caught.value).endswith(text)


@pytest.mark.parametrize("form", ["EPS", "PPM", "ICO", "PDF"])
def test_formats_that_are_not_the_web_s_are_refused(form):
    with pytest.raises(RequestError, match=f"must be one of {', '.join(IMAGE_FORMATS)}: got .* of something else"):
        read(messages=user(data_url(Image.new("RGB", (32, 32), "red"), form)))


@pytest.mark.parametrize("form", IMAGE_FORMATS)
def test_formats_of_the_web_are_read(form):
    request = read(messages=user(data_url(Image.new("RGB", (32, 16), "red"), form)))
    assert request.messages[0]["content"][0]["image"].size == (32, 16)


def test_the_pixels_of_a_request_have_a_sum(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    urls = [data_url(Image.new("1", (300, 200)))] * 3
    limits = Limits(picture_pixels=60_000, request_pixels=179_999)
    with pytest.raises(RequestError, match="Picture 3 of 3: .* at most 179999 pixels together: got 180000") as caught:
        read_request({"messages": user(*urls)}, "emma", limits, 3, 512)
    assert (caught.value.status, caught.value.param) == (413, "messages")
    assert read_request({"messages": user(*urls)}, "emma", Limits(request_pixels=180_000), 3, 512)


def test_a_bomb_of_pixels_is_too_large_not_broken():
    url = "data:image/png;base64," + base64.b64encode(png_header(50_000, 50_000)).decode()
    with pytest.raises(RequestError, match="at most 36000000 pixels") as caught:
        read(messages=user(url))
    assert caught.value.status == 413


def test_too_many_pictures_exceed_the_context():
    with pytest.raises(RequestError, match="context length is 512 tokens.$") as caught:
        read(messages=user(RED, RED, RED, RED))
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")


def test_another_model_is_not_found():
    with pytest.raises(RequestError, match="one model, 'emma': got 'gpt'") as caught:
        read(model="gpt")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_a_large_picture_is_refused_before_it_is_decoded(monkeypatch):
    large = data_url(Image.new("1", (3000, 2000)))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(RequestError, match="at most 1000000 pixels: got 3000x2000") as caught:
        read(Limits(picture_pixels=1_000_000), messages=user(large))
    assert caught.value.status == 413


def test_every_refusal_is_json():
    """The text of an error may hold what the client sent, and must still be sent back."""
    with pytest.raises(RequestError) as caught:
        read(messages=user("data:\ud800\x00"))
    json.dumps(str(caught.value)).encode()


def test_every_refused_field_is_json():
    with pytest.raises(RequestError) as caught:
        read(**{"\ud800": 1})
    json.dumps(caught.value.param, ensure_ascii=False).encode()
