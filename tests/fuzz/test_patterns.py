"""No text makes a pattern slow: each is tried with 100,000 repetitions of all that it speaks of.

The patterns are read from the source, so that a new one is tried, too.
"""

import ast
import importlib
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import regex

import emma_hf
from emma_hf.conversion import key_tables
from emma_hf.conversion.instruction_vocabulary import BPE_NAME, load_instruction_tokenizer
from emma_hf.data.row_files import row_spans
from emma_hf.hub.template import handler
from emma_hf.hub.verification import check
from emma_hf.model import compat_emma, instruction_emma
from emma_hf.model.instruction_emma import (
    encode_instruction,
    instruction_from_turn,
    instructions_from_messages,
    instructions_from_prompt,
    training_instruction,
    unmark_control_tokens,
)
from emma_hf.model.loading_emma import LOADING_ERRORS
from emma_hf.serving import Limits
from emma_hf.serving.images import read_urls
from emma_hf.training.stages import LORA_TARGETS

SOURCE = Path(emma_hf.__file__).parent
# Rooms that read no stranger's text: files and tasks that the user names, and answers, whose length has a limit.
OWN_ROOMS = ("analysis", "evaluation", "tiny")
REPETITIONS = 100_000
SECONDS = 2
FUNCTIONS = {"compile", "findall", "finditer", "fullmatch", "match", "search", "split", "sub", "subn"}

# Patterns that are made when they are used: what the source writes in their place, and what can stand there.
TABLES = [
    pattern
    for name, table in vars(key_tables).items()
    if name.endswith("KEYS") and isinstance(table, dict)
    for pattern in table
]
TOWERS = [rf"^((?:model\.)?{tower})\.(?!{inner}\.)" for tower, inner in compat_emma.NESTED_TOWERS.items()]
VARIABLE = {
    ("model/instruction_emma.py", "re.escape(image_token)"): [re.escape("<image>")],
    ("model/instruction_emma.py", "re.escape(end_token)"): [re.escape("</s>")],
    ("model/processing_emma.py", "re.escape(self.image_token)"): [re.escape("<image>")],
    ("model/compat_emma.py", "f'^((?:model\\\\.)?{tower})\\\\.(?!{inner}\\\\.)'"): TOWERS,
    ("model/loading_emma.py", "pattern"): [pattern for _, pattern, *_ in LOADING_ERRORS],
    ("conversion/key_tables.py", "pattern"): TABLES,
    ("model/chat_template_emma.py", "reads"): [r"(?:\.|[\[(]['\"])images\b", r"\btools\b"],
    ("training/stages.py", "targets"): [LORA_TARGETS],
}


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call of `re` and `regex` in the package that takes a pattern, and the file that it stands in."""
    for path in sorted(SOURCE.rglob("*.py")):
        if path.relative_to(SOURCE).parts[0] in OWN_ROOMS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id in ("re", "regex")
                and node.func.attr in FUNCTIONS
            ):
                yield path.relative_to(SOURCE).as_posix(), node


def patterns() -> Iterator[tuple[str, Any, str]]:
    """Where a pattern stands, the pattern, and the function that takes it."""
    for name, call in calls():
        text = ast.unparse(call.args[0])
        flags = [ast.unparse(one.value) for one in call.keywords if one.arg == "flags"]
        flags += [ast.unparse(one) for one in call.args[1:] if "." in ast.unparse(one) and call.func.attr == "compile"]
        library = {"re": re, "regex": regex}[call.func.value.id]
        if (name, text) in VARIABLE:
            found = VARIABLE[name, text]
        else:
            # A literal, or one made of constants of its module.
            module = importlib.import_module("emma_hf." + name.removesuffix(".py").replace("/", "."))
            found = [eval(text, vars(module))]
        for pattern in found:
            flag = eval(flags[0], {"re": re, "regex": regex}) if flags else 0
            yield name, library.compile(pattern, flag), call.func.attr


# The card's template is the package's own text.
OWN_TEXT = {"<!-- released -->\\n(.*?)<!-- end -->\\n"}
ALL = {
    f"{name}: {function} {pattern.pattern}": (pattern, function)
    for name, pattern, function in patterns()
    if pattern.pattern not in OWN_TEXT
}


def units(pattern: Any) -> list[str]:
    """The characters and the literal words of a pattern, and characters of the usual classes."""
    written = pattern.pattern.replace(r"\n", "\n").replace(r"\t", "\t").replace(r"\r", "\r").replace("\\", "")
    words = re.split(r"[\[\](){}|?*+^$]+", written)
    return sorted({*written, *words, "a", "A", "0", "_", " ", "\n", "é", "猫"} - {""})


@contextmanager
def limited() -> Iterator[None]:
    """Ends what takes longer than `SECONDS` of this process's own time, whatever else the machine does."""

    def stop(*_: Any) -> None:
        raise AssertionError(f"took longer than {SECONDS} s for {REPETITIONS} repetitions")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_every_pattern_is_tried():
    keys = {(name, ast.unparse(call.args[0])) for name, call in calls()}
    assert VARIABLE.keys() <= keys
    assert len(ALL) + len(OWN_TEXT) >= len(keys)
    # Nothing gets patterns in by another name.
    for path in SOURCE.rglob("*.py"):
        assert not re.search(r"from (re|regex) import|import (re|regex) as", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("name", sorted(ALL), ids=ascii)
def test_a_pattern_takes_linear_time(name):
    pattern, function = ALL[name]
    parts = units(pattern)
    for unit in parts:
        for before in ("", *(word for word in parts if len(word) > 1)):
            text = before + unit * (REPETITIONS // len(unit) if len(unit) > 20 else REPETITIONS)
            with limited():
                if function == "fullmatch":
                    pattern.fullmatch(text)
                else:
                    # As slow as the slowest of the others.
                    pattern.sub("", text)


SPECIAL = [
    "\U000f0000", "\U000f0000x", "\U000f0001", "\U000f0002", "\U000f0000\U000f0001", "&", "&#", "&#9", "9", "&amp;", "amp;", "&#38;",
    ";", "<", ">", "'", "\u2019", "\x1b", "\x1b[", "\x1b[0", "\x00", "\r", "\n", "\t", " ", "\u3000", "!", "a", "\u00e9", "\u0301", "\u732b",
    "\u00c3\u00a9", "<image>", "<imag", "USER:", "USER", "ASSISTANT:", "ASSISTANT", "</s>", ":", "<start_of_text>", "<start_",
    "<image> ASSISTANT:", "USER: ASSISTANT:", "USER: <image> ASSISTANT: </s>", "a ", "---\n", "- ", "[", "{", '"', ",", "%",
]  # fmt: skip


def message(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


READERS: dict[str, Callable[[str], Any]] = {
    "unmark_control_tokens": unmark_control_tokens,
    "instruction_from_turn": instruction_from_turn,
    "instructions_from_prompt": lambda text: instructions_from_prompt(f"<image>{text}"),
    "instructions_from_messages": lambda text: instructions_from_messages([message(text), message(text)]),
    "instructions_from_a_string": lambda text: instructions_from_messages([{"role": "user", "content": text}]),
    "data_url": lambda text: read_urls([f"data:image/png;base64,{text}"], Limits()),
    "url": lambda text: read_urls([text], Limits()),
    "handler": lambda text: handler._decode_image(text),
}


@pytest.mark.parametrize("special", SPECIAL, ids=ascii)
def test_a_reader_takes_linear_time(special):
    for reader in READERS.values():
        for before in ("", "&", "---\n"):
            with limited():
                try:
                    reader(before + special * REPETITIONS)
                except ValueError as error:
                    assert len(str(error)) < 600


@pytest.fixture(scope="module")
def tokenizer(reference):
    return load_instruction_tokenizer(reference / "original" / BPE_NAME)


@pytest.mark.parametrize("special", SPECIAL, ids=ascii)
@pytest.mark.parametrize("before", ["", "&", "&#"], ids=ascii)
@pytest.mark.parametrize("with_ftfy", [True, False])
def test_an_instruction_takes_linear_time(tokenizer, monkeypatch, special, before, with_ftfy):
    if not with_ftfy:
        monkeypatch.setattr(instruction_emma, "ftfy", None)
    text = before + special * REPETITIONS
    turn = {"from": "human", "value": text}
    with limited():
        encode_instruction(tokenizer, text)
    with limited():
        training_instruction([turn, turn, turn], tokenizer)


@pytest.mark.parametrize("special", SPECIAL, ids=ascii)
def test_a_file_of_a_stranger_takes_linear_time(tmp_path, special):
    for before in ("", "[", "{", '["', "---\n"):
        text = before + special * REPETITIONS
        for name in ("rows.json", "rows.jsonl"):
            (tmp_path / name).write_text(text)
            with limited():
                try:
                    row_spans(tmp_path / name)
                except ValueError as error:
                    assert name in str(error)
        (tmp_path / "README.md").write_text(text)
        with limited():
            check(tmp_path)
