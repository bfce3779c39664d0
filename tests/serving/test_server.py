"""The server, asked by OpenAI's own client."""

import base64
import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import transformers
from PIL import Image

import emma_hf.serving.requests
from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.cli import main
from emma_hf.model.instruction_emma import encode_instruction
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.scenes import Scene

QUESTIONS = ("How many things are there?", "Describe the picture.", "Is there a red circle?")
SEEDS = (1, 2)


def picture(seed: int) -> Image.Image:
    return draw(Scene.random(seed), 96)


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def messages(url: str, question: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def test_without_its_packages_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "emma_hf.serving.server", raising=False)
    monkeypatch.setattr(transformers, "__version__", "5.23.0")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=re.escape('Install them with `pip install "emma-hf[serve]"`')):
        import emma_hf.serving.server  # noqa: F401


def test_on_transformers_4_it_says_that_5_is_needed(monkeypatch, capfd):
    monkeypatch.delitem(sys.modules, "emma_hf.serving.server", raising=False)
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    assert main(["serve"]) == 2
    assert "needs the server of Transformers 5: got Transformers 4.57.6" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Everything from here on needs the extra `serve`.
with contextlib.suppress(ImportError):
    import openai
    import uvicorn

    from emma_hf.serving import Limits, build_app, listen

serving = pytest.mark.skipif(
    "emma_hf.serving.server" not in sys.modules, reason='needs Transformers 5 and `pip install "emma-hf[serve]"`'
)


@pytest.fixture(scope="module")
def tiny():
    return (
        EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, dtype=torch.float32).eval(),
        EmmaProcessor.from_pretrained(EMMA_TINY),
    )


@contextlib.contextmanager
def served(model, processor, limits=None):
    """The address of a server in a thread of this process."""
    with listen("127.0.0.1", 0) as listener:
        app = build_app(model, processor, "emma-tiny", limits)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=partial(server.run, sockets=[listener]))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(tiny):
    with served(*tiny, Limits(request_bytes=200_000, picture_pixels=100_000)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0)


def ask(client, image, question, **options):
    return client.chat.completions.create(model="emma-tiny", messages=messages(data_url(image), question), **options)


def streamed(client, image, question, **options) -> tuple[str, str, int]:
    """Text, why it ended, and how many tokens it has."""
    chunks = list(ask(client, image, question, stream=True, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return text, chunks[-1].choices[0].finish_reason, chunks[-1].usage.completion_tokens


def generated(tiny, image, question, instruction=None, **options) -> tuple[str, int]:
    """What `generate` answers, as text and as a number of tokens."""
    model, processor = tiny
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, instructions=instruction or question, return_tensors="pt")
    tokens = model.generate(**inputs, **{"max_new_tokens": 64, "do_sample": False, **options})
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    return processor.decode(answer, skip_special_tokens=True), len(answer)


@serving
def test_answers_are_those_of_generate_streamed_or_not(client, tiny):
    answers = set()
    for seed in SEEDS:
        for question in QUESTIONS:
            expected = generated(tiny, picture(seed), question)
            whole = ask(client, picture(seed), question)
            choice = whole.choices[0]
            assert (choice.message.content, whole.usage.completion_tokens) == expected
            assert choice.finish_reason == "stop"
            assert streamed(client, picture(seed), question) == (expected[0], "stop", expected[1])
            answers.add(expected[0])
    assert len(answers) > 2


@serving
def test_the_instruction_is_the_question_about_the_picture(client, tiny, monkeypatch):
    model, processor = tiny
    seen = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **inputs: seen.append(inputs["instruction_input_ids"]) or generate(**inputs)
    )
    question = f"{QUESTIONS[0]}\nAnswer the question using a single word or phrase."
    first = messages(data_url(picture(1)), question)
    later = [*first, {"role": "assistant", "content": "USER: 3"}, {"role": "user", "content": "And the colours?"}]
    for conversation in (first, later, messages(data_url(picture(1)), QUESTIONS[1])):
        client.chat.completions.create(model="emma-tiny", messages=conversation, max_tokens=1)
    ask(client, picture(1), question, max_tokens=1, extra_body={"chat_template_kwargs": {"instructions": "red"}})
    expected = [QUESTIONS[0], QUESTIONS[0], QUESTIONS[1], "red"]
    assert [row.tolist() for row in seen] == [
        [encode_instruction(processor.instruction_tokenizer, text, 77)] for text in expected
    ]


@serving
def test_several_pictures_and_none(client, tiny):
    model, processor = tiny
    pictures = [{"type": "image_url", "image_url": {"url": data_url(picture(seed))}} for seed in (1, 2)]
    content = [pictures[0], {"type": "text", "text": QUESTIONS[0]}, pictures[1]]
    answer = client.chat.completions.create(model="emma-tiny", messages=[{"role": "user", "content": content}])
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}] * 2 + [content[1]]}], add_generation_prompt=True
    )
    inputs = processor(images=[picture(1), picture(2)], text=prompt, instructions=QUESTIONS[0], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert answer.choices[0].message.content == processor.decode(tokens[0], skip_special_tokens=True)
    # `<image>` in a text is words.
    words = client.chat.completions.create(
        model="emma-tiny", messages=[{"role": "user", "content": "What does <image> mean?"}], max_tokens=3
    )
    assert words.usage.completion_tokens <= 3


@serving
def test_settings(client, tiny):
    text, count = generated(tiny, picture(1), QUESTIONS[1])
    assert count > 4
    short = ask(client, picture(1), QUESTIONS[1], max_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)
    assert text.startswith(short.choices[0].message.content)
    stop = text.split()[2]
    cut = ask(client, picture(1), QUESTIONS[1], stop=stop)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    assert streamed(client, picture(1), QUESTIONS[1], stop=[stop, "zzz"])[:2] == (text[: text.index(stop)], "stop")
    # What only looks like the beginning of a stop text comes out in the end.
    assert streamed(client, picture(1), QUESTIONS[1], stop=f"{text[-3:]}zzz")[:2] == (text, "stop")
    assert ask(client, picture(1), QUESTIONS[1], temperature=0).choices[0].message.content == text


@serving
def test_fewer_visual_tokens(client, monkeypatch):
    started = []
    monkeypatch.setattr("emma_hf.serving.server.serve", lambda *args: started.append(args[:2]))
    options = ["--port", "0", "--dtype", "float32", "--device", "cpu", "--visual-tokens", "8"]
    assert main(["serve", *options]) == 0
    (fewer,) = started
    cases = [(picture(seed), question) for seed in SEEDS for question in QUESTIONS]
    expected = [generated(fewer, *case) for case in cases]
    with served(*fewer) as address:
        short = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        with ThreadPoolExecutor(4) as clients:
            replies = list(clients.map(lambda case: ask(short, *case), cases))
        found = [(reply.choices[0].message.content, reply.usage.completion_tokens) for reply in replies]
        assert found == expected
        assert streamed(short, *cases[0]) == (expected[0][0], "stop", expected[0][1])
        parts = messages(data_url(picture(1)), "?")[0]["content"]
        with pytest.raises(openai.BadRequestError, match="room for at most 63 pictures: got 64"):
            short.chat.completions.create(
                model="emma-tiny", messages=[{"role": "user", "content": [*parts[:1] * 64, parts[1]]}]
            )
    whole = [ask(client, *case) for case in cases]
    assert [reply.usage.prompt_tokens - 64 + 8 for reply in whole] == [reply.usage.prompt_tokens for reply in replies]
    assert [reply.choices[0].message.content for reply in whole] != [text for text, _ in found]


@serving
def test_a_seed_belongs_to_its_request(client):
    def sample(seed: int) -> str:
        return ask(client, picture(1), QUESTIONS[1], temperature=2, seed=seed, max_tokens=12).choices[0].message.content

    alone = {seed: sample(seed) for seed in range(4)}
    assert len(set(alone.values())) > 1
    with ThreadPoolExecutor(4) as clients:
        assert dict(zip(range(4), clients.map(sample, range(4)))) == alone


@serving
def test_the_context_is_the_limit(client, tiny):
    with pytest.raises(
        openai.BadRequestError, match="must leave room for an answer in the model's 512 positions"
    ) as caught:
        ask(client, picture(1), "word " * 600)
    assert "This model's maximum context length is 512 tokens" in str(caught.value)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    parts = messages(data_url(picture(1)), "?")[0]["content"]
    with pytest.raises(openai.BadRequestError, match="room for at most 7 pictures: got 8"):
        client.chat.completions.create(
            model="emma-tiny", messages=[{"role": "user", "content": [*parts[:1] * 8, parts[1]]}]
        )


@serving
def test_models_and_routes(client):
    (model,) = client.models.list()
    assert (model.id, model.owned_by, model.status) == ("emma-tiny", "emma-hf", {"value": "loaded"})
    assert model.created > 0
    with pytest.raises(openai.NotFoundError, match="This server has /health, .*: got '/v1/responses'"):
        client.responses.create(model="emma-tiny", input="Hello")
    for path in ("/../load_model", "/../reset"):
        with pytest.raises(openai.NotFoundError):
            client.post(path, body={"model": "org/model"}, cast_to=object)


@serving
def test_every_get_answers_head_and_a_model_is_found_by_its_name(client, address):
    root = address.removesuffix("/v1")
    for path in ("/health", "/v1/models", "/v1/models/emma-tiny"):
        asked = urllib.request.Request(f"{root}{path}", method="HEAD")
        with urllib.request.urlopen(asked, timeout=30) as response:
            assert (response.status, response.read()) == (200, b"")
    assert client.models.retrieve("emma-tiny") == next(iter(client.models.list()))
    with pytest.raises(openai.NotFoundError, match="one model, 'emma-tiny': got 'org/gpt'") as caught:
        client.models.retrieve("org/gpt")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@serving
def test_an_answer_that_ends_with_its_last_token_is_whole(client, tiny):
    text, count = generated(tiny, picture(1), QUESTIONS[0])
    for length, reason in ((count, "stop"), (count - 1, "length")):
        whole = ask(client, picture(1), QUESTIONS[0], max_tokens=length)
        assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == (reason, length)
        assert streamed(client, picture(1), QUESTIONS[0], max_tokens=length)[1:] == (reason, length)
    assert ask(client, picture(1), QUESTIONS[0], max_tokens=count).choices[0].message.content == text


def events(address, body: dict) -> list[str]:
    """The data of a stream's events, as they are sent."""
    request = urllib.request.Request(
        f"{address}/chat/completions",
        json.dumps({**body, "stream": True}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        text = response.read().decode()
    assert text.endswith("\n\n")
    return [event.removeprefix("data: ") for event in text.removesuffix("\n\n").split("\n\n")]


@serving
def test_a_stream_says_that_it_is_over(address):
    data = events(address, {"messages": messages(data_url(picture(1)), QUESTIONS[0])})
    assert data[-1] == "[DONE]"
    assert data.count("[DONE]") == 1
    assert [json.loads(event)["object"] for event in data[:-1]] == ["chat.completion.chunk"] * (len(data) - 1)


@serving
def test_an_error_in_the_middle_of_a_stream_is_an_error_of_openai_s(client, address, tiny):
    steps = []

    def fail(*_):
        steps.append(1)
        if len(steps) == 3:
            raise RuntimeError('no "memory"\n in /etc/secret')

    hook = tiny[0].lm_head.register_forward_hook(fail)
    try:
        *before, error, done = events(address, {"messages": messages(data_url(picture(1)), QUESTIONS[1])})
        steps.clear()
        with pytest.raises(
            openai.APIError, match="The server failed on this request .RuntimeError.. Its log says why."
        ):
            streamed(client, picture(1), QUESTIONS[1])
    finally:
        hook.remove()
    assert json.loads(error) == {
        "error": {
            "message": "The server failed on this request (RuntimeError). Its log says why.",
            "type": "server_error",
            "param": None,
            "code": None,
        }
    }
    assert before
    assert done == "[DONE]"


@serving
def test_what_clients_send_besides(client, tiny):
    text = generated(tiny, picture(1), QUESTIONS[1])[0]
    neutral = {"safety_identifier": "me", "reasoning_effort": "none", "verbosity": "medium", "function_call": "none"}
    assert ask(client, picture(1), QUESTIONS[1], extra_body=neutral).choices[0].message.content == text
    # The most probable token alone is left.
    sampled = ask(client, picture(1), QUESTIONS[1], temperature=1, top_p=0, seed=1)
    assert sampled.choices[0].message.content == text
    assert ask(client, picture(1), QUESTIONS[1], temperature=1e-6, seed=1).choices[0].message.content == text
    for temperature in (1e-38, 9e-7):
        with pytest.raises(openai.BadRequestError, match="`temperature` must be 0, ") as caught:
            ask(client, picture(1), QUESTIONS[1], temperature=temperature)
        assert caught.value.param == "temperature"


@serving
def test_the_developer_and_the_system_speak_together(client, monkeypatch, tiny):
    seen = []
    template = tiny[1].apply_chat_template
    monkeypatch.setattr(
        tiny[1], "apply_chat_template", lambda *args, **kwargs: (out := template(*args, **kwargs), seen.append(out))[0]
    )
    question = {"role": "user", "content": "Hello"}
    nothing = {"role": "assistant", "content": None}
    for first in (
        [{"role": "system", "content": "Be brief.\n\nBe kind."}],
        [{"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be kind."}],
    ):
        client.chat.completions.create(model="emma-tiny", messages=[*first, question, nothing, question], max_tokens=1)
    assert seen[0]["input_ids"].tolist() == seen[1]["input_ids"].tolist()


@serving
def test_a_question_without_end_is_refused_at_once(client):
    start = time.monotonic()
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens") as caught:
        ask(client, picture(1), "a" * 150_000)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    assert time.monotonic() - start < 2


@serving
def test_one_request_is_decoded_at_a_time(client, monkeypatch):
    running, most = [], []
    decode = emma_hf.serving.requests.ChatRequest.decode_images

    def watched(self):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        decode(self)
        running.pop()

    monkeypatch.setattr("emma_hf.serving.requests.ChatRequest.decode_images", watched)
    with ThreadPoolExecutor(6) as clients:
        list(clients.map(lambda _: ask(client, picture(1), QUESTIONS[0], max_tokens=1), range(6)))
    assert most == [1] * 6


def large_picture(client):
    with pytest.raises(openai.APIStatusError, match="at most 100000 pixels: got 400x400") as caught:
        ask(client, Image.new("1", (400, 400)), "What is it?")
    assert caught.value.status_code == 413


def large_request(client):
    with pytest.raises(openai.APIStatusError, match="may have at most 200000 bytes: got more") as caught:
        ask(client, Image.effect_noise((300, 300), 90).convert("RGB"), "What is it?" * 20000)
    assert caught.value.status_code == 413


def unknown_model(client):
    with pytest.raises(openai.NotFoundError, match="one model, 'emma-tiny': got 'gpt-4o'"):
        client.chat.completions.create(model="gpt-4o", messages=messages(data_url(picture(1)), "?"))


def not_json(client):
    for body in (b'{"model": ', b"\xff\xfe", b"[1]"):
        with pytest.raises(openai.BadRequestError, match="body"):
            client.post(
                "/chat/completions",
                content=body,
                cast_to=object,
                options={"headers": {"content-type": "application/json"}},
            )


def malformed(client):
    with pytest.raises(openai.BadRequestError, match="role system .first only., user or assistant: got 'tool'"):
        client.chat.completions.create(model="emma-tiny", messages=[{"role": "tool", "content": "x"}])


def audio_and_video(client):
    sound = {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}}
    parts = [
        sound,
        *({"type": kind, kind: {"url": "data:video/mp4;base64,QUJD"}} for kind in ("audio_url", "video_url")),
    ]
    for part in parts:
        content = [part, {"type": "text", "text": "What is it?"}]
        with pytest.raises(openai.BadRequestError, match=f"got '{part['type']}'. The model takes no audio"):
            client.chat.completions.create(model="emma-tiny", messages=[{"role": "user", "content": content}])
    with pytest.raises(openai.BadRequestError, match="`modalities` must be .'text'. or left out: got .'text', 'audio'"):
        ask(client, picture(1), "?", modalities=["text", "audio"], audio={"voice": "alloy", "format": "wav"})


def bad_data_url(client):
    with pytest.raises(openai.BadRequestError, match="must be one of PNG"):
        client.chat.completions.create(model="emma-tiny", messages=messages("data:image/png;base64,QUJD", "?"))


def path_of_the_server(client):
    with pytest.raises(openai.BadRequestError, match="must be a data URL"):
        client.chat.completions.create(model="emma-tiny", messages=messages("/etc/hostname", "?"))


def gone_while_it_is_answered(client):
    with ask(client, picture(1), QUESTIONS[1], stream=True) as stream:
        next(iter(stream))


def gone_before_it_is_answered(client):
    host, port = client.base_url.host, client.base_url.port
    body = b'{"messages": [{"role": "user", "content": "Hello"}]}'
    with socket.create_connection((host, port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(body), body)
        )


def gone_while_it_sends(client):
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{"mod')


BAD = [
    large_picture,
    large_request,
    unknown_model,
    not_json,
    malformed,
    audio_and_video,
    bad_data_url,
    path_of_the_server,
    gone_while_it_is_answered,
    gone_before_it_is_answered,
    gone_while_it_sends,
]


@serving
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.__name__)
def test_the_server_goes_on_after(bad, client, tiny):
    bad(client)
    assert (
        ask(client, picture(2), QUESTIONS[0]).choices[0].message.content == generated(tiny, picture(2), QUESTIONS[0])[0]
    )


@serving
def test_what_the_server_itself_gets_wrong_is_a_500_and_it_goes_on(client, tiny):
    hook = tiny[0].lm_head.register_forward_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(
            openai.InternalServerError, match="failed on this request .ZeroDivisionError.. Its log says"
        ):
            ask(client, picture(2), QUESTIONS[0])
    finally:
        hook.remove()
    assert ask(client, picture(2), QUESTIONS[0]).choices[0].message.content


@serving
@pytest.mark.parametrize("gone", [gone_while_it_is_answered, gone_before_it_is_answered])
def test_an_answer_that_nobody_waits_for_is_not_computed_to_its_end(gone, client, tiny, monkeypatch):
    model = tiny[0]
    # It would go on until its context is full.
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    steps = []
    hook = model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    try:
        gone(client)
        # Answered after the one that is given up, by the same thread.
        last = ask(client, picture(1), QUESTIONS[0], max_tokens=2)
        assert last.usage.completion_tokens == 2
        assert len(steps) < 200
    finally:
        hook.remove()


@serving
@pytest.mark.slow
def test_eight_clients_get_the_answers_of_one_while_every_tenth_request_is_bad(client, tiny):
    expected = {(seed, question): generated(tiny, picture(seed), question) for seed in SEEDS for question in QUESTIONS}
    cases = list(expected)

    def request(number: int) -> None:
        if number % 10 == 9:
            BAD[number // 10 % len(BAD)](client)
            return
        seed, question = case = cases[number % len(cases)]
        if number % 2:
            text, reason, count = streamed(client, picture(seed), question)
        else:
            answer = ask(client, picture(seed), question)
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
            count = answer.usage.completion_tokens
        assert (text, count, reason) == (*expected[case], "stop"), case

    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(request, range(200))) == [None] * 200


@serving
def test_addresses_that_cannot_be_listened_to(capfd):
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--port", port]) == 2
    assert f"machine that is free: got 127.0.0.1:{port}" in capfd.readouterr().err
    assert main(["serve", "--port", "99999"]) == 2
    assert "`--host` and `--port` must name an address" in capfd.readouterr().err
    assert main(["serve", "--max-megapixels", "0"]) == 2
    assert "must be above 0: got 32 and 0." in capfd.readouterr().err
    assert main(["serve", "--max-megapixels", "40", "--max-request-megapixels", "39"]) == 2
    assert "must be at least `--max-megapixels`, 40: got 39." in capfd.readouterr().err
    assert main(["serve", "--max-waiting-megabytes", "31"]) == 2
    assert "`--max-waiting-megabytes` must be at least `--max-megabytes`, 32: got 31." in capfd.readouterr().err


@serving
@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ([], {}),
        (["--max-megapixels", "80"], {"picture_pixels": 80_000_000, "request_pixels": 80_000_000}),
        (
            ["--max-megapixels", "1", "--max-request-megapixels", "2"],
            {"picture_pixels": 1_000_000, "request_pixels": 2_000_000},
        ),
        (["--max-megabytes", "300"], {"request_bytes": 300 * 2**20, "waiting_bytes": 300 * 2**20}),
        (
            ["--max-waiting-megabytes", "64", "--remote-pictures"],
            {"waiting_bytes": 64 * 2**20, "remote_pictures": True},
        ),
    ],
)
def test_options_become_limits(options, changed, monkeypatch):
    seen = []
    monkeypatch.setattr("emma_hf.serving.server.serve", lambda *args: seen.append(args[-1]))
    assert main(["serve", "--port", "0", *options]) == 0
    defaults = {
        "request_bytes": 32 * 2**20, "picture_pixels": 36_000_000, "remote_pictures": False,
        "request_pixels": 72_000_000, "fetch_seconds": 10, "waiting_bytes": 256 * 2**20, "receive_seconds": 60,
    }  # fmt: skip
    assert [dataclasses.asdict(limits) for limits in seen] == [defaults | changed]


@serving
@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(tiny):
    process = subprocess.Popen(
        [sys.executable, "-m", "emma_hf", "serve", "--port", "0", "--dtype", "float32", "--device", "cpu"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        line = next(line for line in process.stderr if "answers at" in line)
        address = line.split()[-1]
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        deadline = time.monotonic() + 60
        while True:
            try:
                answer = ask(client, picture(1), QUESTIONS[0])
                break
            except openai.APIConnectionError:
                assert time.monotonic() < deadline
        assert answer.choices[0].message.content == generated(tiny, picture(1), QUESTIONS[0])[0]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode in (0, 130)
    finally:
        process.kill()
