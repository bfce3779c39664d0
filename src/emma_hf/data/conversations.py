"""Training conversations: roles, the two templates of LLaVA, and which tokens have a label."""

from collections.abc import Mapping
from typing import Any

from ..model.chat_template_emma import SYSTEM_PROMPT
from ..model.errors_emma import EmmaError
from ..model.instruction_emma import check_part, escape_placeholders
from ..model.processing_emma import EmmaProcessor

# Label of a token without a loss, as PyTorch's cross-entropy has it.
IGNORE_INDEX = -100
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# What other formats put into a message, with an effect on training.
UNSUPPORTED_KEYS = (
    "audio",
    "audios",
    "function_call",
    "image",
    "images",
    "loss",
    "tool_calls",
    "train",
    "video",
    "videos",
    "weight",
)


def encode_conversation(
    processor: EmmaProcessor, conversation: list[dict[str, str]], template: str = "vicuna_v1"
) -> tuple[list[int], list[int]]:
    """Ids and labels (tokens) of a conversation in LLaVA's format.

    The loss is on the assistant's words and their end-of-sequence (in `plain`, their line break) only.

    Raises:
        EmmaError: messages that do not alternate, a row longer than the tokenizer's `model_max_length`, or no label.
    """
    turns = to_turns(conversation)
    pieces = _plain(turns, processor) if template == "plain" else _vicuna(turns, processor)
    input_ids, spans = processor.encode_prompt("".join(piece for piece, _ in pieces))
    labeled, position = [], 0
    for piece, has_label in pieces:
        if has_label:
            labeled.append((position, position + len(piece)))
        position += len(piece)
    labels = [
        token if any(start < stop and end > begin for begin, stop in labeled) else IGNORE_INDEX
        for token, (start, end) in zip(input_ids, spans)
    ]
    limit = processor.tokenizer.model_max_length
    if len(input_ids) > limit:
        raise EmmaError(
            f"A row must fit the model's context of {limit} tokens: it has {len(input_ids)}, {len(input_ids) - limit} "
            "too many. Shorten it, or raise `processor.tokenizer.model_max_length` if the model allows."
        )
    if all(label == IGNORE_INDEX for label in labels):
        raise EmmaError("A row needs words of the assistant to learn from: all its labels are -100.")
    return input_ids, labels


def to_turns(conversation: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Roles and texts: at most one system turn, then user and assistant in alternation.

    An assistant turn that opens the row is dropped.

    Raises:
        EmmaError: a message without role or text, or with a key that this package does not train on; turns that do not
            alternate; a text that is not valid Unicode.
    """
    turns = []
    for message in conversation:
        values = message if isinstance(message, Mapping) else {}
        role, text = values.get("from"), values.get("value")
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
            raise EmmaError(
                "A message needs `from` (human or gpt; in a chat `role`, user or assistant) and a text: got "
                f"{str(message)[:200]}."
            )
        refuse_keys(values, UNSUPPORTED_KEYS, "A message")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise EmmaError(
                f"A text must be valid Unicode: that of a {role} message has half of a surrogate pair at character "
                f"{error.start}, {text[error.start]!a}. Remove it."
            ) from error
        turns.append((ROLES[role], text))
    system = turns[:1] if turns and turns[0][0] == "system" else []
    turns = turns[len(system) :]
    if turns and turns[0][0] == "assistant":
        turns = turns[1:]
    roles = [role for role, _ in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise EmmaError(f"User and assistant must take turns, and the assistant must end the row: got {roles}.")
    return system + turns


def _vicuna(turns: list[tuple[str, str]], processor: EmmaProcessor) -> list[tuple[str, bool]]:
    token = processor.image_token
    pieces = [] if turns[0][0] == "system" else [(f"{SYSTEM_PROMPT} ", False)]
    for role, text in turns:
        if role == "system":
            pieces.append((f"{escape_placeholders(text, token)} ", False))
        elif role == "user":
            count = text.count(token)
            # The authors' `preprocess_multimodal`: placeholders to the front, each on a line of its own.
            words = text.replace(token, "").strip() if count else text
            pieces.append((f"USER: {f'{token}{chr(10)}' * count}{words} ASSISTANT:", False))
        else:
            pieces.append((f" {escape_placeholders(text, token)}{processor.tokenizer.eos_token}", True))
    return pieces


def _plain(turns: list[tuple[str, str]], processor: EmmaProcessor) -> list[tuple[str, bool]]:
    token = processor.image_token
    if len(turns) != 2 or turns[0][0] != "user" or token not in turns[0][1]:
        raise EmmaError(
            f"A row of the `plain` template is a picture and its caption: got {len(turns)} turns and "
            f"{turns[0][1].count(token)} placeholders in the first."
        )
    caption = escape_placeholders(turns[1][1], token)
    return [(token * turns[0][1].count(token), False), (f"{caption}\n", True)]


def to_llava_format(message: dict[str, Any], token: str) -> tuple[str, list[Any]]:
    """Text of a chat message with one placeholder per image, and what each image part holds (None: nothing).

    Raises:
        EmmaError: no message; content that is neither a text nor a list of text and image parts, each with its own
            content alone; a key that this package does not train on.
    """
    if not isinstance(message, Mapping):
        raise EmmaError(f"A message must be an object with `role` and `content`: got {str(message)[:200]}.")
    refuse_keys(message, UNSUPPORTED_KEYS, "A message")
    content = message.get("content")
    if isinstance(content, str):
        return content, [None] * (content.count(token) if message.get("role") == "user" else 0)
    if not isinstance(content, list):
        raise EmmaError(f"A message needs `content`, a text or a list of parts: got {message}.")
    text, images = "", []
    for part in content:
        if not isinstance(part, Mapping) or (part.get("type") == "text" and not isinstance(part.get("text"), str)):
            raise EmmaError(f"A part of a message needs `type` and, of type 'text', a text: got {str(part)[:200]}.")
        if part.get("type") in ("text", "image"):
            check_part(part["type"], part)
        if part.get("type") == "text":
            text += escape_placeholders(part["text"], token)
        elif part.get("type") == "image":
            sources = (part.get(key) for key in ("image", "url", "path", "base64"))
            images.append(next((source for source in sources if source is not None), None))
        else:
            raise EmmaError(f"A part of a message must be of type 'text' or 'image': got {part.get('type')!r}.")
    return f"{token}\n" * len(images) + text, images


def refuse_keys(values: Mapping[str, Any], keys: tuple[str, ...], owner: str) -> None:
    """Raise an EmmaError if one of `keys` has a value: ignoring it would train on something else than was given."""
    for key in keys:
        value = values.get(key)
        if value is not None and not (isinstance(value, (str, list, tuple, Mapping)) and not value):
            raise EmmaError(f"{owner} cannot be trained on with `{key}`: got {str(value)[:100]!r}. Remove the key.")
