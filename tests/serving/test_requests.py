"""What a client may ask of the server, and what it is told otherwise."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image

from emma_hf.serving.requests import ChatRequest, Limits, RequestError, read_request


def data_url(image: Image.Image, form: str = "PNG", **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


RED = data_url(Image.new("RGB", (4, 3), "red"))


def user(*urls: str, text: str = "What is it?") -> list[dict]:
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def read(limits: Limits | None = None, **body) -> ChatRequest:
    return read_request({"messages": user(RED), **body}, "emma", limits or Limits(), 3)


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
            "holds `tool_calls`, and this model calls no tools",
        ),
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
        ({"top_p": 0}, "`top_p` must be a number from 1e-06 to 1: got 0"),
        ({"seed": 2**64}, "`seed` must be a whole number of 64 bits: got 18446744073709551616"),
        ({"stop": ["a", ""]}, "`stop` must be a text or a list of at most 4, none empty: got \\['a', ''\\]"),
        ({"stop": list("abcde")}, "list of at most 4"),
        ({"stream": "yes"}, "`stream` must be true or false: got 'yes'"),
        ({"n": 2}, "`n` must be 1 or left out: got 2"),
        ({"n": True}, "`n` must be 1 or left out: got True"),
        ({"logprobs": True}, "`logprobs` must be False or left out: got True"),
        ({"response_format": {"type": "json_object"}}, "`response_format` must be .* or left out"),
        ({"tools": [{"type": "function"}]}, "`tools` must be \\[\\] or left out"),
        ({"generation_config": "{}"}, "fields of OpenAI's chat completions that this server knows: got 'generation_conf"),
        ({"instructions": "the hat"}, "that this server knows: got 'instructions'"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "`chat_template_kwargs` takes `instructions` only: got"),
        ({"chat_template_kwargs": {"instructions": ["a", "b"]}}, "one for each of 1 pictures: got \\['a', 'b'\\]"),
        ({"chat_template_kwargs": {"instructions": [3]}}, "Each of `instructions` must be a string: got 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(body, message):
    with pytest.raises(RequestError, match=message) as caught:
        read(**body)
    assert caught.value.status == 400
    # No message repeats a whole picture.
    assert len(str(caught.value)) < 400


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


def test_remote_pictures_only_where_they_are_allowed_and_only_so_many_bytes():
    payload = base64.b64decode(RED.partition(",")[2])

    class Pictures(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/red.png" else 404)
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Pictures) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        request = read(Limits(remote_pictures=True), messages=user(f"{url}/red.png"))
        assert request.messages[0]["content"][0]["image"].size == (4, 3)
        with pytest.raises(RequestError, match="at most 10 bytes: got more from 'http") as caught:
            read(Limits(remote_pictures=True, request_bytes=10), messages=user(f"{url}/red.png"))
        assert caught.value.status == 413
        with pytest.raises(RequestError, match="cannot be fetched .*404"):
            read(Limits(remote_pictures=True), messages=user(f"{url}/blue.png"))
        server.shutdown()


def test_every_refusal_is_json():
    """The text of an error may hold what the client sent, and must still be sent back."""
    with pytest.raises(RequestError) as caught:
        read(messages=user("data:\ud800\x00"))
    json.dumps(str(caught.value)).encode()
