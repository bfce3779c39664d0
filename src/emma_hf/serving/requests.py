"""What a client of `emma-hf serve` may ask: a chat completion's fields and images, checked before anything runs."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

from .errors import RequestError
from .images import decode_image, image_number_in_errors, open_images, read_urls, shown
from .limits import (
    CHARACTERS_PER_POSITION,
    OPENAI_NUMBERS,
    SMALLEST_TEMPERATURE,
    STOP_CHARACTERS,
    STOP_TEXTS,
    Limits,
)

# Fields of OpenAI's chat completions that have no bearing on the answer.
IGNORED_FIELDS = {
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "user",
}
# Fields that ask for what this server does not do, and the values of them that ask for nothing.
UNSUPPORTED_FIELDS = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
# What a message can hold beside its content, and would be lost. Other servers take pictures here.
UNSUPPORTED_MESSAGE_FIELDS = ("tool_calls", "function_call", "audio", "image", "images", "video", "videos")
# What the parts of a content hold.
PART_CONTENTS = ("text", "image_url", "image", "input_audio", "audio", "video_url", "video")
# OpenAI's newer models call the system's role developer.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class ChatRequest:
    """A checked request: `messages` with images, opened but not yet decoded, and the settings that were given."""

    messages: list[dict[str, Any]]
    instructions: str | list[str] | None = None
    stream: bool = False
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def decode_images(self) -> None:
        """Replace the images of the messages by their pixels, upright.

        Raises:
            RequestError: a broken image.
        """
        parts = _image_parts(self.messages)
        try:
            for number, part in enumerate(parts, start=1):
                with image_number_in_errors(number, len(parts)):
                    part["image"] = decode_image(part["image"])
        except RequestError as error:
            error.param = "messages"
            raise


def read_request(body: dict[str, Any], model: str, limits: Limits, max_images: int, max_positions: int) -> ChatRequest:
    """Check the body of a chat completion, and open its images without decoding them.

    Args:
        body: the JSON of the request.
        model: name of the only model that is served.
        limits: limits for one request.
        max_images: how many fit into the model's context.
        max_positions: tokens of the model's context.

    Raises:
        RequestError: anything in it that would be answered wrongly, or not at all.
    """
    requested = body.get("model")
    if requested is not None and requested != model:
        raise RequestError(
            f"This server has one model, {model!r}: got {shown(requested)}.", 404, "model_not_found", "model"
        )
    settings = _read_settings(body)
    messages = _read_messages(body.get("messages"), max_positions)
    parts = _image_parts(messages)
    if len(parts) > max_images:
        raise RequestError(
            f"The model's context has room for at most {max_images} pictures: got {len(parts)}. Its maximum context "
            f"length is {max_positions} tokens.",
            400,
            "context_length_exceeded",
            "messages",
        )
    instructions = _read_instructions(body.get("chat_template_kwargs"), len(parts), max_positions)
    try:
        images: list[Image.Image] = open_images(read_urls([part.pop("url") for part in parts], limits), limits)
    except RequestError as error:
        error.param = "messages"
        raise
    for part, image in zip(parts, images):
        part["image"] = image
    return ChatRequest(messages, instructions, **settings)


def _read_settings(body: dict[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in body.items() if value is not None}
    for name in fields.keys() & UNSUPPORTED_FIELDS.keys():
        neutral = UNSUPPORTED_FIELDS[name]
        # `True == 1` and `False == 0` in Python, but not to a client.
        if not any(
            fields[name] == value and isinstance(value, bool) == isinstance(fields[name], bool) for value in neutral
        ):
            raise RequestError(f"`{name}` must be {neutral[0]!r} or left out: got {shown(fields[name])}.", param=name)
    known = {"model", "messages", "chat_template_kwargs", "stream", "stop", *OPENAI_NUMBERS}
    unknown = sorted(fields.keys() - known - UNSUPPORTED_FIELDS.keys() - IGNORED_FIELDS)
    if unknown:
        raise RequestError(
            f"A request may hold the fields of OpenAI's chat completions that this server knows: got "
            f"{shown(', '.join(map(shown, unknown[:3])), 90)[1:-1]}. Leave it out.",
            # A name may be any string of JSON, half a character included.
            param=unknown[0][:60].encode(errors="backslashreplace").decode(),
        )
    if not isinstance(fields.get("stream", False), bool):
        raise RequestError(f"`stream` must be true or false: got {shown(fields['stream'])}.", param="stream")
    numbers = {name: _read_number(fields[name], name) for name in OPENAI_NUMBERS if name in fields}
    if "max_completion_tokens" in numbers:
        numbers["max_tokens"] = numbers.pop("max_completion_tokens")
    if 0 < numbers.get("temperature", 0) < SMALLEST_TEMPERATURE:
        raise RequestError(
            f"`temperature` must be 0, which takes the most probable token, or at least {SMALLEST_TEMPERATURE:g}: got "
            f"{shown(fields['temperature'])}.",
            param="temperature",
        )
    return {"stream": fields.get("stream", False), "stop": _read_stop_texts(fields.get("stop", [])), **numbers}


def _read_stop_texts(stop: Any) -> tuple[str, ...]:
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > STOP_TEXTS or not all(isinstance(text, str) and text for text in stop):
        raise RequestError(
            f"`stop` must be a text or a list of at most {STOP_TEXTS}, none empty: got {shown(stop)}.", param="stop"
        )
    longest = max(map(len, stop), default=0)
    if longest > STOP_CHARACTERS:
        raise RequestError(
            f"A text of `stop` may have at most {STOP_CHARACTERS} characters: got {longest}.", param="stop"
        )
    return tuple(_read_text(text, "`stop`", "stop") for text in stop)


def _read_number(value: Any, name: str) -> Any:
    kind, low, high = OPENAI_NUMBERS[name]
    is_kind = isinstance(value, int) or (kind is float and isinstance(value, float))
    # `not low <= value <= high` is also true of NaN.
    if isinstance(value, bool) or not is_kind or not low <= value <= high:
        bounds = "of 64 bits"
        if high < 2**53:
            bounds = f"from {low:g} to {high:g}"
        elif low > -(2**53):
            bounds = f"of at least {low:g}"
        kind_name = "whole number" if kind is int else "number"
        raise RequestError(f"`{name}` must be a {kind_name} {bounds}: got {shown(value)}.", param=name)
    return kind(value)


def _read_messages(messages: Any, max_positions: int) -> list[dict[str, Any]]:
    """The conversation as the processor takes it, each image still a URL."""
    if not isinstance(messages, list) or not messages:
        raise RequestError(
            f"`messages` must be a list of at least one message: got {shown(messages)}.", param="messages"
        )
    _check_count(len(messages), "messages", max_positions, max_positions)
    result: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        is_leading = not result or result[-1]["role"] == "system"
        role, content = _read_message(message, f"messages[{number}]", is_leading)
        if role == "system" and result:
            # The model knows one system prompt, in front.
            result[0]["content"] += [{"type": "text", "text": "\n\n"}, *content]
        else:
            result.append({"role": role, "content": content})
    if result[-1]["role"] != "user":
        raise RequestError(
            f"The last message must be the user's: got one with role {result[-1]['role']!r}.", param="messages"
        )
    parts = [part for message in result for part in message["content"]]
    _check_count(len(parts), "parts", max_positions, max_positions)
    characters = sum(len(part.get("text", "")) for part in parts)
    _check_count(characters, "characters", max_positions * CHARACTERS_PER_POSITION, max_positions)
    return result


def _check_count(count: int, what: str, most: int, max_positions: int) -> None:
    """Refuse what cannot fit before it costs time."""
    if count > most:
        raise RequestError(
            f"This model's maximum context length is {max_positions} tokens, and a conversation may have at most "
            f"{most} {what}: got {count}. Shorten it.",
            400,
            "context_length_exceeded",
            "messages",
        )


def _read_message(message: Any, field: str, is_leading: bool) -> tuple[str, list[dict[str, Any]]]:
    """Role and parts of one message; `is_leading` where nobody but the system spoke before."""
    if not isinstance(message, dict):
        raise RequestError(f"`{field}` must be an object with `role` and `content`: got {shown(message)}.", param=field)
    named, content = message.get("role"), message.get("content")
    role = ROLES.get(named) if isinstance(named, str) else None
    if role is None or (role == "system" and not is_leading):
        raise RequestError(
            f"`{field}` must have the role system (first only), user or assistant: got {shown(named)}.",
            param=f"{field}.role",
        )
    for name in UNSUPPORTED_MESSAGE_FIELDS:
        if message.get(name):
            raise RequestError(
                f"`{field}` holds `{name}`: this model calls no tools, and its pictures are parts of the content. "
                "Leave it out.",
                param=f"{field}.{name}",
            )
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RequestError(
            f"The content of `{field}` must be a text or a list of parts: got {shown(content)}.",
            param=f"{field}.content",
        )
    return role, [_read_part(part, role, field) for part in content]


def _read_part(part: Any, role: str, field: str) -> dict[str, Any]:
    where = f"{field}.content"
    part_type = part.get("type") if isinstance(part, dict) else None
    for name in PART_CONTENTS if part_type in ("text", "image_url") else ():
        if name != part_type and part.get(name):
            raise RequestError(
                f"A part of `{field}` of type {part_type} must hold nothing else: got `{name}` {shown(part[name])}. "
                "Make it a part of its own.",
                param=where,
            )
    if part_type == "text":
        return {"type": "text", "text": _read_text(part.get("text"), f"The text of `{field}`", where)}
    if part_type != "image_url":
        raise RequestError(
            f"A part of `{field}` must be of type text or image_url: got "
            f"{shown(part if part_type is None else part_type)}. The model takes no audio and no video.",
            param=where,
        )
    if role != "user":
        raise RequestError(
            f"Pictures belong into messages of the user: got one in `{field}`, of role {role!r}.", param=where
        )
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        raise RequestError(
            f'A picture of `{field}` must be {{"url": "data:image/png;base64,…"}}: got {shown(url)}.', param=where
        )
    return {"type": "image", "url": url}


def _read_text(text: Any, what: str, param: str) -> str:
    if not isinstance(text, str):
        raise RequestError(f"{what} must be a string: got {shown(text)}.", param=param)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} must be valid Unicode: got half a character at position {error.start}.", param=param
        ) from error
    return text


def _read_instructions(options: Any, images: int, max_positions: int) -> str | list[str] | None:
    """An instruction of the client's own, in place of its question's first line."""
    field = "chat_template_kwargs"
    if options is None:
        return None
    if not isinstance(options, dict) or options.keys() - {"instructions"}:
        raise RequestError(f"`{field}` takes `instructions` only: got {shown(options)}.", param=field)
    instructions = options.get("instructions")
    if instructions is None:
        return None
    if not isinstance(instructions, str) and (not isinstance(instructions, list) or len(instructions) != images):
        raise RequestError(
            f"`instructions` must be a text, or a list with one for each of {images} pictures: got "
            f"{shown(instructions)}.",
            param=field,
        )
    texts = [instructions] if isinstance(instructions, str) else instructions
    for text in texts:
        _read_text(text, "`instructions`" if text is instructions else "Each of `instructions`", field)
    longest = max(map(len, texts), default=0)
    if longest > max_positions * CHARACTERS_PER_POSITION:
        raise RequestError(
            f"A text of `instructions` may have at most {max_positions * CHARACTERS_PER_POSITION} characters: got "
            f"{longest}.",
            param=field,
        )
    return instructions


def _image_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part for message in messages for part in message["content"] if part["type"] == "image"]
