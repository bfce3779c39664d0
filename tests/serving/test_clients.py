"""Real clients of OpenAI's protocol, each in a process of an environment of its own (`make test-clients`)."""

import base64
import io
import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from support.serving import running_server

from emma_hf import EMMA_TINY
from emma_hf.inference import answer, load_model
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.scenes import Scene

PROGRAMS = Path(__file__).parent / "clients"
# The class that each client raises for: a prompt that is too long, a broken image, another model, a refused option.
ERRORS = {
    "openai-python": ["openai.BadRequestError"] * 2 + ["openai.NotFoundError", "openai.BadRequestError"],
    "litellm": [
        "litellm.ContextWindowExceededError",
        "litellm.BadRequestError",
        "litellm.NotFoundError",
        "litellm.BadRequestError",
    ],
    "langchain": [
        "langchain_openai.OpenAIContextOverflowError",
        "langchain_openai.OpenAIInvalidRequestError",
        "langchain_openai.OpenAIModelNotFoundError",
        "langchain_openai.OpenAIInvalidRequestError",
    ],
    "llama-index": ["openai.BadRequestError"] * 2 + ["openai.NotFoundError", "openai.BadRequestError"],
    "pydantic-ai": ["pydantic_ai.ModelHTTPError"] * 4,
    "openai-node": ["BadRequestError"] * 2 + ["NotFoundError", "BadRequestError"],
    "vercel": ["AI_APICallError"] * 4,
}
IN_NODE = ("openai-node", "vercel")
OPTIONS = {"max_tokens": 64}

pytestmark = [pytest.mark.slow, pytest.mark.once]
if not os.environ.get("EMMA_CLIENTS"):
    pytestmark.append(pytest.mark.skip("`make test-clients` makes the clients' environment and names it"))


def part_of(image: Image.Image, length: int | None = None) -> dict:
    """An image as OpenAI's clients send it; with `length`, so many bytes of it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()[:length]).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def user(text: str, *parts: dict) -> dict:
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def conversations() -> dict[str, tuple[list[dict], list[Image.Image]]]:
    """Messages of OpenAI's form, and the images in them."""
    first, second = (draw(Scene.random(seed), 96) for seed in (1, 2))
    system = {"role": "system", "content": "Answer with one word."}
    turns = [
        user("How many things are there?", part_of(second)),
        {"role": "assistant", "content": "three"},
        user("Describe the picture."),
    ]
    return {
        "image": ([user("Describe the picture.", part_of(first))], [first]),
        "system": ([system, user("How many things are there?", part_of(first))], [first]),
        "several turns": ([system, *turns], [second]),
        "two images": ([user("Are both pictures the same?", part_of(first), part_of(second))], [first, second]),
        "no image": ([user("Hello")], []),
    }


def without_urls(message: dict) -> dict:
    """A message as the processor takes it, its images beside it."""
    if isinstance(message["content"], str):
        return message
    parts = [{"type": "image"} if part["type"] == "image_url" else part for part in message["content"]]
    return {**message, "content": parts}


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What the package itself answers."""
    model, processor = load_model(EMMA_TINY, device="cpu", dtype="float32")
    texts = {
        name: answer(model, processor, [[*map(without_urls, messages)]], [images], max_new_tokens=OPTIONS["max_tokens"])
        for name, (messages, images) in conversations().items()
    }
    assert len({text for (text,) in texts.values()}) == len(texts)
    return {name: text for name, (text,) in texts.items()}


@pytest.fixture(scope="module")
def address():
    with running_server() as (address, _):
        yield address


def refused(model: str) -> list[tuple[dict, str]]:
    """Requests that the server refuses, and a part of its reason; in the order of `ERRORS`."""
    scene = draw(Scene.random(1), 96)
    image, broken = part_of(scene), part_of(scene, 200)
    case = {"model": model, "messages": [user("What is it?", image)], "options": OPTIONS}
    return [
        ({**case, "messages": [user("word " * 600, image)]}, "maximum context length is 512 tokens"),
        ({**case, "messages": [user("What is it?", broken)]}, "The picture (PNG, 96x96) cannot be decoded"),
        ({**case, "model": "gpt-4o"}, "This server has one model"),
        ({**case, "options": {**OPTIONS, "presence_penalty": 1}}, "`presence_penalty` must be 0 or left out"),
    ]


def run_client(name: str, address: str, cases: list[dict], folder: Path) -> list[dict]:
    path = folder / "cases.json"
    path.write_text(json.dumps(cases), encoding="utf-8")
    environment = Path(os.environ["EMMA_CLIENTS"])
    if name in IN_NODE:
        folder = environment / "node"
        if not (folder / "node_modules").is_dir():
            pytest.skip(
                "`make test-clients` found no npm, or no registry for it, when it made the clients' environment"
            )
        command = ["node", PROGRAMS / "clients.mjs"]
    else:
        command = [environment / "bin" / "python", PROGRAMS / "clients.py"]
    # litellm would fetch its table of prices, and pydantic-ai is told that it may run in a plain process.
    variables = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": ""}
    done = subprocess.run(
        [*command, name, address, path], cwd=folder, env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ERRORS)
def test_a_client_gets_the_answers_of_the_package_and_errors_of_its_own(name, address, answers, tmp_path):
    asked = [
        ({"model": "emma-tiny", "messages": messages, "options": OPTIONS, "stream": stream}, text)
        for messages, text in zip((messages for messages, _ in conversations().values()), answers.values())
        for stream in (False, True)
    ]
    bad = [({**case, "stream": stream}, reason) for case, reason in refused("emma-tiny") for stream in (False, True)]
    results = run_client(name, address, [case for case, _ in asked + bad], tmp_path)
    assert results[: len(asked)] == [{"text": text} for _, text in asked]
    failed = results[len(asked) :]
    assert [result.get("error") for result in failed] == [kind for kind in ERRORS[name] for _ in range(2)], failed
    for result, (_, reason) in zip(failed, bad, strict=True):
        assert reason in result["text"]
