"""Which text is an image's instruction, and the ids that CLIP's text encoder gets for it."""

import html
import re
import unicodedata
import warnings
from bisect import bisect_right
from collections.abc import Mapping
from functools import cache, lru_cache
from html.entities import html5
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .errors_emma import EmmaError

try:
    import ftfy
except ImportError:
    ftfy = None

try:
    # Always there: every supported Transformers requires it.
    import regex
except ImportError:
    regex = None

# A typed `<image>` that is words, not an image, carries this private-use character behind its first letter, so that a
# rendered prompt still tells the two apart. The processor takes it out again before anything is encoded.
PLACEHOLDER_ESCAPE = "\U000f0002"

# Transformers 5 puts typed control tokens between these two (`sanitize_control_tokens`).
# Neither mark is inside, which keeps the search linear however many of the first stand alone.
_MARKED = re.compile("\U000f0000([^\U000f0000\U000f0001])([^\U000f0000\U000f0001]*)\U000f0001")

# The parts of a message that are read, and what each of them holds; beside it, what another holds would be lost.
PART_CONTENTS = {"text": ("text",), "image": ("image", "url", "path", "base64"), "image_url": ("image_url",)}
_CONTENTS = ("audio", "image", "image_url", "text", "video")

# An id of CLIP's vocabulary stands for 24 characters at most. What lies beyond this many for each id is not cleaned:
# HTML entities inside each other cost the square of their number.
_CHARACTERS_PER_ID = 50
_REPEATED_SPACE = re.compile(r"([ \t\n])\1+")

# The letter that stands for each byte in a byte-level vocabulary.
_BYTE_LETTERS = bytes_to_unicode()

_USER = re.compile(r"(?<!\w)USER:")
# Also behind a letter: a missing space must not let an answer through.
_ASSISTANT = re.compile(r"ASSISTANT:")

_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
_TERMINAL_ESCAPE = re.compile("\x1b\\[[0-9;]*[a-zA-Z]")
_CONTROL_CHARACTERS = dict.fromkeys((*range(0, 9), 11, *range(14, 32), 127))
_STRAIGHT_QUOTES = {
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
    **dict.fromkeys((0x02BC, *range(0x2018, 0x201C)), "'"),
}


def check_text(name: str, text: Any) -> None:
    """Raise `EmmaError` where `text` is not a string, or no text that UTF-8 can write."""
    if not isinstance(text, str):
        raise EmmaError(f"{name} must be a string: got {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EmmaError(
            f"{name} must be valid Unicode: got half of a surrogate pair at character {error.start}, "
            f"{text[error.start]!a}. Remove it."
        ) from error


def clean_instruction(text: str) -> str:
    """Text as CLIP's tokenizer sees it: repaired, unescaped, whitespace collapsed, lower case.

    The cleaning of open_clip's `SimpleTokenizer`. It needs ftfy where the text is not plain ASCII; without ftfy ASCII
    text is still exact, and other text is cleaned as far as possible, with a warning.

    Raises:
        EmmaError: `text` is not a string, or holds half of a surrogate pair.
    """
    check_text("An instruction", text)
    if ftfy is not None:
        text = ftfy.fix_text(text)
    else:
        fixed = _fix_without_ftfy(text)
        if not (text.isascii() and fixed.isascii()):
            _warn_without_ftfy()
        text = fixed
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


def instructions_per_image(instructions: Any, counts: list[int]) -> list[str]:
    """One instruction per image, in the images' order, from what a caller passes as `instructions`.

    Args:
        instructions: one string for all images, one per prompt (with a single prompt one per image), or a list per
            prompt.
        counts: images per prompt.

    Raises:
        EmmaError: another type, or numbers that differ.
    """
    if isinstance(instructions, str):
        return [instructions] * sum(counts)
    if not isinstance(instructions, (list, tuple)):
        raise EmmaError(
            "`instructions` must be a string, a list of strings or a list of lists of strings: got "
            f"{type(instructions).__name__}."
        )
    if any(isinstance(row, (list, tuple)) for row in instructions):
        rows = [[row] if isinstance(row, str) else list(row) for row in instructions]
    elif len(counts) == 1:
        rows = [list(instructions)]
        if len(rows[0]) == 1 and counts[0]:
            rows = [rows[0] * counts[0]]
    else:
        rows = [[instruction] * count for instruction, count in zip(instructions, counts)]
    if len(rows) != len(counts) or (len(instructions) != len(rows) and len(counts) > 1):
        raise EmmaError(
            f"`instructions` must have one entry per prompt: got {len(instructions)} for {len(counts)} prompts."
        )
    for row, (given, count) in enumerate(zip(rows, counts)):
        if len(given) != count:
            raise EmmaError(
                f"Each image has one instruction: prompt {row} has {count} images and {len(given)} instructions. "
                "Pass one string per image, or one string for all."
            )
    return [instruction for row in rows for instruction in row]


def check_instruction_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that [`encode_instruction`] cannot use.

    Raises:
        EmmaError: another vocabulary than CLIP's, or no tokens of start and end.
    """
    if "a</w>" not in tokenizer.get_vocab():
        raise EmmaError(
            "`instruction_tokenizer` must be CLIP's, whose words end in `</w>`: got "
            f"{type(tokenizer).__name__}. In a folder it lies in `instruction_tokenizer/`."
        )
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise EmmaError(
            f"`instruction_tokenizer` must know its tokens of start and end: got {tokenizer.bos_token!r} and "
            f"{tokenizer.eos_token!r}. A folder names them in `instruction_tokenizer/tokenizer_config.json`: fetch it."
        )


def encode_instruction(tokenizer: PreTrainedTokenizerBase, text: str, length: int = 77) -> list[int]:
    """Ids of one instruction: start, byte-pair ids, end, padded with 0 to `length`.

    The rule is open_clip's `SimpleTokenizer`: a text too long is cut and its last id is the end. The padding is id 0,
    whatever the tokenizer's own padding is, since every position has a weight in EMMA.

    Args:
        tokenizer: CLIP's tokenizer in Transformers, fast or slow; its normalizer, padding and special spellings are
            not used.
        text: the instruction as written.
        length: number of ids.

    Raises:
        EmmaError: `text` is not a valid string, or `length` has no room for start and end.
    """
    if length < 2:
        raise EmmaError(f"An instruction needs room for its start and end, so a length of at least 2: got {length}.")
    check_text("An instruction", text)
    text = _REPEATED_SPACE.sub(r"\1", text)[: _CHARACTERS_PER_ID * length]
    ids = [tokenizer.bos_token_id]
    for match in _word_pattern().finditer(clean_instruction(text)):
        word = match.group()
        if len(ids) >= length:
            break
        if word == "<start_of_text>":
            ids.append(tokenizer.bos_token_id)
        elif word == "<end_of_text>":
            ids.append(tokenizer.eos_token_id)
        else:
            ids += _byte_pair_ids(tokenizer, word)
    ids = [*ids[: length - 1], tokenizer.eos_token_id]
    return ids + [0] * (length - len(ids))


def instruction_from_turn(text: str, image_token: str = "<image>") -> str:
    """The instruction in one user turn at inference: without placeholders, up to the first line break.

    "<image>\\nIs it a hat?\\nAnswer the question using a single word or phrase." asks "Is it a hat?".
    """
    return _first_line(text.replace(image_token, ""))


def instructions_from_prompt(
    prompt: str, image_token: str = "<image>", instruction_turn: str = "image", end_token: str | None = "</s>"
) -> list[str]:
    """The instruction of each image in a rendered prompt, in the order of the placeholders.

    A turn reaches from the last `USER:` before the image to the ` ASSISTANT:` behind it; a text without roles is one
    turn. A turn of images alone takes the words of the next user turn. An answer, whatever it says, is not read: it
    ends at the `end_token`, or in a prompt that has none at the next `USER:`.

    Raises:
        EmmaError: an unknown `instruction_turn`.
    """
    regions = _outside_answers(prompt, end_token)
    users = [
        (match.end(), index)
        for index, (start, end) in enumerate(regions)
        for match in _USER.finditer(prompt, start, end)
    ] or [(0, 0)]

    @cache
    def words(start: int, region: int) -> str:
        return instruction_from_turn(prompt[start : regions[region][1]], image_token)

    starts, regions_of_users = zip(*users)
    instructions = []
    for match in re.finditer(re.escape(image_token), prompt):
        before = bisect_right(starts, match.start())
        start, region = users[before - 1] if before else (0, 0)
        after = bisect_right(regions_of_users, region)
        instructions.append(words(start, region) or (words(*users[after]) if after < len(users) else ""))
    if _is_last(instruction_turn):
        latest = next(user for user in users if user[1] == users[-1][1])
        instructions = [words(*latest)] * len(instructions)
    return instructions


def _outside_answers(prompt: str, end_token: str | None) -> list[tuple[int, int]]:
    """Start and end of what is not the assistant's, in order; at least one, perhaps empty. One that follows an answer
    begins with what ended it.
    """
    end = re.compile(re.escape(end_token)) if end_token and end_token in prompt else _USER
    regions, start = [], 0
    while (answer := _ASSISTANT.search(prompt, start)) is not None:
        regions.append((start, answer.start()))
        close = end.search(prompt, answer.end())
        if close is None:
            return regions
        start = close.start()
    return [*regions, (start, len(prompt))]


def instructions_from_messages(
    messages: list[dict[str, Any]], image_token: str = "<image>", instruction_turn: str = "image"
) -> list[str]:
    """The instruction of each image in chat messages, in their order.

    Content that is a string is a bare prompt: `image_token` in it is an image. In a list of parts the images are the
    parts of type `image` or `image_url`, the text parts are joined, and `image_token` in them is words. Only the user's
    turns are read.

    Raises:
        EmmaError: an unknown `instruction_turn`, or a message without role or content.
    """
    turns = [
        _count_and_instruction(message["content"], image_token)
        for message in (normalize_message(message, image_token) for message in messages)
        if message["role"] == "user"
    ]
    if _is_last(instruction_turn):
        return [turns[-1][1]] * sum(count for count, _ in turns) if turns else []
    instructions = []
    for index, (count, words) in enumerate(turns):
        if not words and index + 1 < len(turns):
            words = turns[index + 1][1]
        instructions += [words] * count
    return instructions


def normalize_message(message: dict[str, Any], image_token: str = "<image>") -> dict[str, Any]:
    """A chat message whose content is a list of parts, in which `image_token` in a text stands for an image.

    A user's content that is one string is a bare prompt, whose placeholders are images. Any other `image_token` in a
    text is text, and is escaped. A part of type `image_url` becomes one of type `image`. Content that is None (of an
    assistant that calls a tool) has no parts.

    Raises:
        EmmaError: a message or a part of another shape, a user's without content, a text that is not valid Unicode.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        is_without_role = isinstance(message, Mapping) and "role" not in message
        found = f"the keys {sorted(message)}" if is_without_role else repr(message)
        raise EmmaError(f"A message needs a `role` (system, user or assistant): got {found[:200]}.")
    content, is_user = message.get("content"), message["role"] == "user"
    if content is None and not is_user:
        content = []
    if isinstance(content, str):
        check_text(f"The {message['role']} message", content)
        text = content if is_user else escape_placeholders(content, image_token)
        return {**message, "content": [{"type": "text", "text": text}]}
    if not isinstance(content, (list, tuple)):
        raise EmmaError(
            f"A message of role {message['role']} needs `content`, a string or a list of parts: got "
            f"{type(content).__name__}."
        )
    parts = [_normalize_part(part) for part in content]
    texts = [part for part in parts if part["type"] == "text"]
    for part, text in zip(texts, _escape_joined([part["text"] for part in texts], image_token)):
        part["text"] = text
    return {**message, "content": parts}


def _normalize_part(part: Any) -> dict[str, Any]:
    """A copy of a part of a message; one of type `image_url` becomes one of type `image`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind not in PART_CONTENTS:
        raise EmmaError(
            f"A part of a message must have one of the types {', '.join(PART_CONTENTS)}: got {str(part)[:200]!a}."
        )
    check_part(kind, part)
    if kind == "text":
        check_text("The `text` of a text part", part.get("text"))
    if kind != "image_url":
        return dict(part)
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, Mapping) else url
    check_text("The `image_url` of a part", url)
    return {"type": "image", "url": url}


def check_part(kind: str, part: Mapping[str, Any]) -> None:
    """Raise an EmmaError for a part of a message, of the type `kind`, that also holds what another type does."""
    for name in _CONTENTS:
        value = part.get(name)
        if name not in PART_CONTENTS[kind] and value is not None and not (isinstance(value, str) and not value):
            raise EmmaError(
                f"A part of a message of type {kind!r} holds {' or '.join(PART_CONTENTS[kind])}: got `{name}` too, "
                f"{str(value)[:100]!a}. Make it a part of its own."
            )


def _escape_joined(texts: list[str], image_token: str) -> list[str]:
    """The texts, in which a placeholder is escaped that stands in one of them or begins in one and ends in another."""
    joined = "".join(texts)
    if image_token not in joined:
        return texts
    escapes = {match.start() + 1 for match in re.finditer(re.escape(image_token), joined)}
    escaped, position = [], 0
    for text in texts:
        letters = enumerate(text, position)
        escaped.append("".join(PLACEHOLDER_ESCAPE + c if index in escapes else c for index, c in letters))
        position += len(text)
    return escaped


def _count_and_instruction(parts: list[dict[str, Any]], image_token: str) -> tuple[int, str]:
    """Number of images in the parts of a normalized user message, and their instruction."""
    text = "".join(part["text"] for part in parts if part.get("type") == "text")
    images = sum(part.get("type") == "image" for part in parts) + text.count(image_token)
    return images, instruction_from_turn(text, image_token)


def training_instruction(
    conversation: list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    image_token: str = "<image>",
    length: int = 77,
) -> str:
    """The instruction of a training row in LLaVA's format, by the authors' rule.

    A row of two messages: the whole user turn. Any other row: of each user turn the text between the first and the
    second colon, or all of it if there is none; of these candidates the one with the most padding, the first of
    equals. Placeholders do not belong to a turn's text: the authors move them to its front before they remove them.

    Args:
        conversation: messages `{"from": "human" | "gpt", "value": text}`.
        tokenizer: the instruction tokenizer, which decides the shortest.
        image_token: the placeholder of an image.
        length: ids per instruction.

    Raises:
        EmmaError: no user turn.
    """
    turns = [
        _without_placeholders(message["value"], image_token)
        for message in conversation
        if message["from"] in ("human", "user")
    ]
    if not turns:
        raise EmmaError(
            "A training row needs a user turn (`from` is 'human'): got "
            f"{[message['from'] for message in conversation]}."
        )
    if len(conversation) == 2:
        return turns[0].strip()
    candidates = []
    for turn in turns:
        parts = turn.split(":")
        candidates.append(parts[1].lstrip() if len(parts) > 1 else turn)
    return max(candidates, key=lambda text: encode_instruction(tokenizer, text, length).count(0))


def _without_placeholders(text: str, image_token: str) -> str:
    """A user turn without its placeholders, and with the spelled-out ones as they were written."""
    text = text.replace(image_token, "").strip() if image_token in text else text
    return text.replace(PLACEHOLDER_ESCAPE, "")


def escape_placeholders(text: str, image_token: str = "<image>") -> str:
    """Mark each `image_token` in `text` as words, so that it does not count as an image."""
    return text.replace(image_token, _escaped(image_token))


def unmark_control_tokens(text: str) -> str:
    """Turn the marks that Transformers 5 puts around typed control tokens into ours."""
    return _MARKED.sub(rf"\1{PLACEHOLDER_ESCAPE}\2", text)


def _escaped(token: str) -> str:
    return token[0] + PLACEHOLDER_ESCAPE + token[1:]


def _first_line(text: str) -> str:
    text = unmark_control_tokens(text).replace(PLACEHOLDER_ESCAPE, "")
    return text.strip().partition("\n")[0].strip()


def _is_last(instruction_turn: str) -> bool:
    if instruction_turn not in ("image", "last"):
        raise EmmaError(f"`instruction_turn` must be 'image' or 'last': got {instruction_turn!r}.")
    return instruction_turn == "last"


def _byte_pair_ids(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    # The merges alone: the tokenizer's own pipeline would normalize the text once more, which open_clip does not.
    letters = "".join(_BYTE_LETTERS[byte] for byte in word.encode())
    if tokenizer.is_fast:
        return [token.id for token in tokenizer.backend_tokenizer.model.tokenize(letters)]
    return tokenizer.convert_tokens_to_ids(tokenizer.bpe(letters).split())


@lru_cache(maxsize=1)
def _word_pattern() -> Any:
    """CLIP's words (OpenAI CLIP and open_clip, `tokenizer.py`)."""
    return regex.compile(
        r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
    )


def _fix_without_ftfy(text: str) -> str:
    """What `ftfy.fix_text` does to ASCII, and of the rest what the standard library can."""
    lines, unescape = [], True
    for line in re.split(r"(?<=\n)", text):
        # ftfy takes a text with tags for HTML source, from that line on.
        unescape = unescape and "<" not in line
        previous = None
        while line != previous:
            previous = line
            if unescape:
                line = _ENTITY.sub(_unescape_entity, line)
            # Line breaks stay as they are: whoever calls this makes one space of any.
            line = line.translate(_STRAIGHT_QUOTES)
            line = _TERMINAL_ESCAPE.sub("", line).translate(_CONTROL_CHARACTERS)
            line = unicodedata.normalize("NFC", line)
        lines.append(line)
    return "".join(lines)


def _unescape_entity(match: re.Match[str]) -> str:
    entity = match.group()
    name = entity[1:]
    if name in html5:
        return html5[name]
    character = html.unescape(entity)
    if entity.startswith("&#"):
        return entity if ";" in character else character
    # Names in capitals that HTML does not know are read as their lower-case form.
    if name == name.upper() and character == entity and name.lower() in html5:
        return html5[name.lower()].upper()
    return entity


@lru_cache(maxsize=1)
def _warn_without_ftfy() -> None:
    warnings.warn(
        "Instructions that are not plain ASCII are cleaned exactly only with ftfy: without it the visual tokens can "
        'differ slightly from the authors\'. Install it with `pip install "emma-hf[ftfy]"`.',
        stacklevel=4,
    )
