"""What a client of `emma-hf serve` may ask: a chat completion's fields and pictures, checked before anything runs."""

import base64
import binascii
import math
import urllib.request
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from ..model.errors_emma import EmmaError

# Formats of pictures on the web. Pillow reads many more, some of them by starting other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
FETCH_SECONDS = 10
# Fields of OpenAI's chat completions that have no bearing on the answer.
WITHOUT_EFFECT = {"user", "metadata", "service_tier", "stream_options", "parallel_tool_calls", "tool_choice", "store"}
# Fields that ask for what this server does not do, and the values of them that ask for nothing.
ONLY = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
ROLES = ("system", "user", "assistant")
STOPS = 4


class RequestError(EmmaError):
    """A request that cannot be answered, through no fault of the server.

    Args:
        message: the rule, what came instead, the remedy.
        status: of HTTP, in the 400s.
        code: word for programs, as OpenAI names it.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for.

    Args:
        request_bytes: whole body, pictures included.
        picture_pixels: width times height of each picture.
        remote_pictures: fetch `http` and `https` URLs. Off, because a server that does can be made to reach what only
            it can reach.
    """

    request_bytes: int = 32 * 2**20
    picture_pixels: int = 36_000_000
    remote_pictures: bool = False


@dataclass(frozen=True)
class ChatRequest:
    """A checked request: `messages` with decoded pictures, and the settings that were given."""

    messages: list[dict[str, Any]]
    instructions: str | list[str] | None = None
    stream: bool = False
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


def read_request(body: dict[str, Any], model: str, limits: Limits, most_pictures: int) -> ChatRequest:
    """Check the body of a chat completion and decode its pictures.

    Args:
        body: the JSON of the request.
        model: name of the only model that is served.
        limits: of one request.
        most_pictures: that fit into the model's context.

    Raises:
        RequestError: anything in it that would be answered wrongly, or not at all.
    """
    named = body.get("model")
    if named is not None and named != model:
        raise RequestError(f"This server has one model, {model!r}: got {_shown(named)}.", 404, "model_not_found")
    settings = _settings(body)
    messages = _messages(body.get("messages"))
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if len(parts) > most_pictures:
        raise RequestError(
            f"The model's context has room for at most {most_pictures} pictures: got {len(parts)}.",
            code="context_length_exceeded",
        )
    instructions = _instructions(body.get("chat_template_kwargs"), len(parts))
    for number, part in enumerate(parts, start=1):
        try:
            part["image"] = _picture(part.pop("url"), limits)
        except RequestError as error:
            if len(parts) == 1:
                raise
            raise RequestError(f"Picture {number} of {len(parts)}: {error}", error.status, error.code) from error
    return ChatRequest(messages, instructions, **settings)


def _settings(body: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in body.items() if value is not None}
    for name, neutral in ONLY.items():
        # `True == 1` in Python, but not to a client.
        if name in given and not any(given[name] == value and type(given[name]) is not bool for value in neutral):
            if given[name] is False and False in neutral:
                continue
            raise RequestError(f"`{name}` must be {neutral[0]!r} or left out: got {_shown(given[name])}.")
    taken = {"model", "messages", "chat_template_kwargs", "max_completion_tokens", *ChatRequest.__dataclass_fields__}
    unknown = sorted(given.keys() - (taken - {"instructions"}) - ONLY.keys() - WITHOUT_EFFECT)
    if unknown:
        raise RequestError(
            f"A request may hold the fields of OpenAI's chat completions that this server knows: got "
            f"{', '.join(map(_shown, unknown))}. Leave it out."
        )
    if not isinstance(given.get("stream", False), bool):
        raise RequestError(f"`stream` must be true or false: got {_shown(given['stream'])}.")
    longest = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    stop = given.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > STOPS or not all(isinstance(text, str) and text for text in stop):
        raise RequestError(f"`stop` must be a text or a list of at most {STOPS}, none empty: got {_shown(stop)}.")
    return {
        "stream": given.get("stream", False),
        "max_tokens": _number(given, longest, int, 1, math.inf),
        "temperature": _number(given, "temperature", float, 0, 2),
        "top_p": _number(given, "top_p", float, 1e-6, 1),
        "seed": _number(given, "seed", int, -(2**63), 2**63 - 1),
        "stop": tuple(_text(text, "`stop`") for text in stop),
    }


def _number(given: dict[str, Any], name: str, kind: type, low: float, high: float) -> Any:
    if name not in given:
        return None
    value = given[name]
    whole = isinstance(value, int) or (kind is float and isinstance(value, float))
    if isinstance(value, bool) or not whole or not low <= value <= high:
        bounds = (
            f"from {low:g} to {high:g}" if high < 2**53 else f"of at least {low:g}" if low > -(2**53) else "of 64 bits"
        )
        raise RequestError(
            f"`{name}` must be a {'whole number' if kind is int else 'number'} {bounds}: got {_shown(value)}."
        )
    return kind(value)


def _messages(messages: Any) -> list[dict[str, Any]]:
    """The conversation as the processor takes it, each picture still a URL."""
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"`messages` must be a list of at least one message: got {_shown(messages)}.")
    result = []
    for number, message in enumerate(messages):
        where = f"`messages[{number}]`"
        if not isinstance(message, dict):
            raise RequestError(f"{where} must be an object with `role` and `content`: got {_shown(message)}.")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or (role == "system" and number):
            raise RequestError(
                f"{where} must have the role system (first only), user or assistant: got {_shown(role)}."
            )
        if message.get("tool_calls"):
            raise RequestError(f"{where} holds `tool_calls`, and this model calls no tools. Leave them out.")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise RequestError(f"The content of {where} must be a text or a list of parts: got {_shown(content)}.")
        result.append({"role": role, "content": [_part(part, role, where) for part in content]})
    if result[-1]["role"] != "user":
        raise RequestError(f"The last message must be the user's: got one with role {result[-1]['role']!r}.")
    return result


def _part(part: Any, role: str, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return {"type": "text", "text": _text(part.get("text"), f"The text of {where}")}
    if kind != "image_url":
        shown = _shown(part if kind is None else kind)
        raise RequestError(
            f"A part of {where} must be of type text or image_url: got {shown}. The model takes no audio and no video."
        )
    if role != "user":
        raise RequestError(f"Pictures belong into messages of the user: got one in {where}, of role {role!r}.")
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        raise RequestError(f'A picture of {where} must be {{"url": "data:image/png;base64,…"}}: got {_shown(url)}.')
    return {"type": "image", "url": url}


def _text(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise RequestError(f"{what} must be a string: got {_shown(text)}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{what} must be valid Unicode: got half a character at position {error.start}.") from error
    return text


def _instructions(options: Any, pictures: int) -> str | list[str] | None:
    """An instruction of the client's own, in place of its question's first line."""
    if options is None:
        return None
    if not isinstance(options, dict) or options.keys() - {"instructions"}:
        raise RequestError(f"`chat_template_kwargs` takes `instructions` only: got {_shown(options)}.")
    instructions = options.get("instructions")
    if isinstance(instructions, str):
        return _text(instructions, "`instructions`")
    if instructions is None:
        return None
    if not isinstance(instructions, list) or len(instructions) != pictures:
        raise RequestError(
            f"`instructions` must be a text, or a list with one for each of {pictures} pictures: got "
            f"{_shown(instructions)}."
        )
    return [_text(text, "Each of `instructions`") for text in instructions]


def _picture(url: str, limits: Limits) -> Image.Image:
    """The picture at a data URL, upright, decoded only when its size is known to be within the limits."""
    if url.startswith("data:"):
        header, comma, encoded = url.partition(",")
        if not comma or not header.endswith(";base64"):
            raise RequestError(f"A data URL must begin like data:image/png;base64, got {_shown(url)}.")
        try:
            data = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"The data URL of a picture must hold base64: got {_shown(url)} ({error}).") from error
    elif not url.startswith(("http://", "https://")):
        # Whatever else it is, a path of this machine for example, is nothing that a client may open.
        raise RequestError(f"A picture must be a data URL (data:image/png;base64,…): got {_shown(url)}.")
    elif limits.remote_pictures:
        data = _fetch(url, limits.request_bytes)
    else:
        raise RequestError(
            f"This server fetches no pictures: got {_shown(url)}. Send it as a data URL (data:image/png;base64,…)."
        )
    try:
        picture = Image.open(BytesIO(data), formats=FORMATS)
        pixels = picture.width * picture.height
        if pixels > limits.picture_pixels:
            raise RequestError(
                f"A picture may have at most {limits.picture_pixels} pixels: got {picture.width}x{picture.height}. "
                "Make it smaller first.",
                413,
            )
        picture.load()
        return ImageOps.exif_transpose(picture)
    except RequestError:
        raise
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise RequestError(f"A picture must be one of {known}: got {len(data)} bytes of something else.") from error
    except Exception as error:
        # Decoders fail in many ways on broken files; all of them mean the same here.
        raise RequestError(f"The picture ({len(data)} bytes) cannot be decoded ({error}). Is it complete?") from error


def _fetch(url: str, limit: int) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "emma-hf"})
    try:
        with urllib.request.urlopen(request, timeout=FETCH_SECONDS) as response:
            data = response.read(limit + 1)
    except (OSError, ValueError) as error:
        raise RequestError(f"The picture at {_shown(url)} cannot be fetched ({error}).") from error
    if len(data) > limit:
        raise RequestError(f"A picture may have at most {limit} bytes: got more from {_shown(url)}.", 413)
    return data


def _shown(value: Any, length: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}…"
