"""Requests to the server and to the handler: an independent account of what is valid, and words for all else."""

import base64
import io
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.fuzzing import JSON, damage_json, fuzz, texts
from support.recorded import IMAGE_TOKENS

from emma_hf.hub.template import handler
from emma_hf.serving import Limits, RequestError
from emma_hf.serving.requests import read_request


def picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


PICTURE = picture()
BODY = {
    "model": "emma",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}},
                {"type": "text", "text": "What is it?"},
            ],
        },
        {"role": "assistant", "content": "A hat."},
        {"role": "user", "content": "And now?"},
    ],
    "max_tokens": 7, "max_completion_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x"], "stream": True, "n": 1,
    "logprobs": False, "tools": [], "user": "me", "chat_template_kwargs": {"instructions": ["the hat"]},
}  # fmt: skip


def read(body):
    request = read_request(body, "emma", Limits(), 3, 400)
    request.decode_images()
    return request


@fuzz(500)
@given(JSON, st.integers(0, 2**32))
def test_a_request_is_prepared_or_refused(processor, junk, seed):
    body = damage_json(BODY, random.Random(seed), junk)
    if not isinstance(body, dict):
        return
    try:
        request = read(body)
    except RequestError as error:
        assert error.status in (400, 404, 413)
        # The reply can be sent, and repeats no whole request.
        json.dumps({"message": str(error), "param": error.param}, ensure_ascii=False).encode()
        assert len(str(error)) < 600
        return
    # What the check lets pass, the processor takes.
    options = {} if request.instructions is None else {"instructions": request.instructions}
    prepared = processor.apply_chat_template(
        request.messages, add_generation_prompt=True, tokenize=True, return_dict=True, **options
    )
    images = sum(part["type"] == "image" for message in request.messages for part in message["content"])
    assert prepared["input_ids"][0].count(processor.image_token_id) == images * IMAGE_TOKENS


NUMBERS = (
    st.integers()
    | st.floats()
    | st.booleans()
    | st.sampled_from(
        [0, 0.0, -0.0, 1, 1.0, 2, 2.0, 2**63, 2**63 - 1, -(2**63), 1e-6, 1e-7, 4096, 4097, 16, 17, 10, 0.01, math.nan]
    )
    | st.sampled_from(["1", [1], {}, None])
)


def is_number(value, *, whole: bool) -> bool:
    return type(value) is int or (not whole and type(value) is float and math.isfinite(value))


OPENAI = {
    "max_tokens": lambda v: is_number(v, whole=True) and v >= 1,
    "max_completion_tokens": lambda v: is_number(v, whole=True) and v >= 1,
    "temperature": lambda v: is_number(v, whole=False) and (v == 0 or 1e-6 <= v <= 2),
    "top_p": lambda v: is_number(v, whole=False) and 0 <= v <= 1,
    "seed": lambda v: is_number(v, whole=True) and -(2**63) <= v < 2**63,
    "n": lambda v: is_number(v, whole=False) and v == 1,
    "presence_penalty": lambda v: is_number(v, whole=False) and v == 0,
    "stream": lambda v: type(v) is bool,
    "logprobs": lambda v: v is False,
}


@fuzz(400)
@given(st.sampled_from(sorted(OPENAI)), NUMBERS)
def test_numbers_of_a_request(name, value):
    body = {"messages": BODY["messages"], name: value}
    if value is None:
        assert read(body) == read({"messages": BODY["messages"]})
    elif OPENAI[name](value):
        request = read(body)
        field = "max_tokens" if name == "max_completion_tokens" else name
        assert getattr(request, field, value) == value
    else:
        with pytest.raises(RequestError, match=f"`{name}` must be ") as caught:
            read(body)
        assert (caught.value.status, caught.value.param) == (400, name)


HANDLER = {
    "do_sample": lambda v: type(v) is bool,
    "max_new_tokens": lambda v: is_number(v, whole=True) and 1 <= v <= 4096,
    "num_beams": lambda v: is_number(v, whole=True) and 1 <= v <= 16,
    "repetition_penalty": lambda v: is_number(v, whole=False) and 0.01 <= v <= 10,
    "temperature": lambda v: is_number(v, whole=False) and 1e-6 <= v <= 10,
    "top_k": lambda v: is_number(v, whole=True) and 1 <= v <= 1_000_000,
    "top_p": lambda v: is_number(v, whole=False) and 0.01 <= v <= 1,
}


@fuzz(400)
@given(st.dictionaries(st.sampled_from([*HANDLER, "min_p", "custom_generate"]), NUMBERS, max_size=3))
def test_parameters_of_the_handler(values):
    options = {name: value for name, value in values.items() if value is not None}
    if all(name in HANDLER and HANDLER[name](value) for name, value in options.items()) and values.keys() <= set(
        HANDLER
    ):
        read_options = handler._read_parameters(values)
        assert read_options == {"max_new_tokens": 256, "do_sample": False, **options}
        # `generate` refuses a whole number as a temperature.
        assert all(type(read_options[name]) is handler.PARAMETERS[name][0] for name in options)
    else:
        with pytest.raises(ValueError, match="`parameters` knows|` must be "):
            handler._read_parameters(values)


@pytest.fixture(scope="module")
def endpoint(processor, model):
    class Model:
        """The model's config and device; what would be generated is asked for nothing."""

        config, device, dtype = model.config, model.device, model.dtype

        @staticmethod
        def generate(input_ids, max_new_tokens, **_):
            assert 0 < max_new_tokens <= model.config.get_text_config().max_position_embeddings - input_ids.shape[1]
            return input_ids

    one = object.__new__(handler.EndpointHandler)
    one.processor, one.model = processor, Model
    return one


REQUEST = {
    "inputs": {
        "images": [PICTURE, f"data:image/png;base64,{PICTURE}"],
        "question": "What is it?",
        "instruction": "the hat",
    },
    "parameters": {"max_new_tokens": 8, "do_sample": True, "temperature": 2},
}


@fuzz(400)
@given(JSON | texts(), st.integers(0, 2**32))
def test_a_request_to_the_handler_is_answered_or_refused(endpoint, junk, seed):
    request = damage_json(REQUEST, random.Random(seed), junk)
    try:
        answer = endpoint(request)
    except ValueError as error:
        str(error).encode()
        assert len(str(error)) < 600
        return
    assert answer == [{"generated_text": ""}]
    inputs = request["inputs"]
    assert inputs.keys() <= {"image", "images", "question", "text", "instruction"}
    assert str(inputs.get("question") or inputs.get("text")).strip()
