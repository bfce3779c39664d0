"""Generated inputs: how many of them, and the pieces that they are made of."""

import os
import random
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# `make fuzz` sets it, and gives a seed.
FACTOR = int(os.environ.get("EMMA_FUZZ", "1"))

# What a tokenizer, a template, a parser of prompts or a cleaner of text may treat in a way of its own.
PIECES = [
    "a", "Who is it?", " ", "  ", "\n", "\r\n", "\t", ":", "é", "猫", "😀", "USER:", "USER: ", "user:", "ASSISTANT", "</s>", "<s>", "<unk>",
    "<image>", "<IMAGE>", "<ima", "ge>", "<", "{{", "{% raw %}", "&amp;", "&lt;image&gt;", "\x00", "\x1b[31m", "\u200b", "\u2028", "\xa0",
    "▁", "<0x0A>", "<start_of_text>", "<end_of_text>", "\U000f0000", "\U000f0001", "\U000f0002", "\U000f0000<image>\U000f0001",
]  # fmt: skip
# The private-use characters among them, by which a control token that is typed is told from one that is meant.
MARKS = ("\U000f0000", "\U000f0001", "\U000f0002")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(PIECES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


def fuzz(examples: int) -> settings:
    """Settings of a test: the same inputs each time, or with `make fuzz` fifty times as many that a seed decides."""
    return settings(
        max_examples=examples * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=FACTOR > 1,
    )


def texts(pieces: list[str] = PIECES, without: tuple[str, ...] = (), max_size: int = 6) -> st.SearchStrategy[str]:
    """Texts of these pieces and of any characters, in which none of `without` stands."""
    characters = st.text(st.characters(exclude_categories=("Cs",)), max_size=4)
    joined = st.lists(st.sampled_from(pieces) | characters, max_size=max_size).map("".join)
    return joined.filter(lambda text: not any(word in text for word in without))


def damage_json(value: Any, chance: random.Random, junk: Any) -> Any:
    """`value` with `junk` in place of one of its parts, or as one more entry; nothing is changed in place."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        choice = chance.random()
        if choice < 0.1:
            return {name: inner for name, inner in value.items() if name != key}
        if choice < 0.15:
            return {**value, f"{key}s": junk}
        return {**value, key: damage_json(value[key], chance, junk)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        index = chance.randrange(len(value))
        kept = [] if chance.random() < 0.1 else [damage_json(value[index], chance, junk)]
        return [*value[:index], *kept, *value[index + 1 :]]
    return junk


def damage_bytes(data: bytes, chance: random.Random) -> bytes:
    """`data` cut off, with a bit flipped, with a part left out or twice, or of zeros in a part."""
    if not data:
        return b"\x00"
    start, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    match chance.randrange(5):
        case 0:
            return data[:start]
        case 1:
            position = min(start, len(data) - 1)
            return data[:position] + bytes([data[position] ^ (1 << chance.randrange(8))]) + data[position + 1 :]
        case 2:
            return data[:start] + data[end:]
        case 3:
            return data[:end] + data[start:]
        case _:
            return data[:start] + bytes(end - start) + data[end:]
