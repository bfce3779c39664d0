"""The instruction: which text it is, and its ids, against the recorded ones and against open_clip."""

import importlib.metadata
import importlib.util
import json
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emma_hf.conversion.instruction_vocabulary import BPE_NAME, load_instruction_tokenizer
from emma_hf.model import instruction_emma
from emma_hf.model.instruction_emma import (
    PLACEHOLDER_ESCAPE,
    clean_instruction,
    encode_instruction,
    escape_placeholders,
    instruction_from_turn,
    instructions_from_messages,
    instructions_from_prompt,
    normalize_message,
    training_instruction,
    unmark_control_tokens,
)

SYSTEM = "A chat between a curious user and an artificial intelligence assistant. "


@pytest.fixture(scope="module")
def tokenizer(reference):
    return load_instruction_tokenizer(reference / "original" / BPE_NAME)


@pytest.fixture(scope="module")
def open_clip(reference):
    """open_clip's tokenizer, loaded by its file: importing the package needs torchvision."""
    try:
        distribution = importlib.metadata.distribution("open_clip_torch")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("open_clip_torch is not installed: `pip install --no-deps open_clip_torch`")
    path = distribution.locate_file("open_clip/tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer(str(reference / "original" / BPE_NAME))


def expected_ids(open_clip, text: str) -> list[int]:
    ids = [open_clip.sot_token_id, *open_clip.encode(text), open_clip.eot_token_id][:77]
    ids[-1] = open_clip.eot_token_id
    return ids + [0] * (77 - len(ids))


def recorded(reference):
    return [json.loads(line) for line in (reference / "instruction_tokens.jsonl").read_text().splitlines()]


# Ids


def test_recorded_ids(tokenizer, reference):
    rows = recorded(reference)
    assert len(rows) == 50
    for row in rows:
        assert encode_instruction(tokenizer, row["text"]) == row["ids"], row["text"]


def test_recorded_ids_of_ascii_without_ftfy(tokenizer, reference, monkeypatch):
    monkeypatch.setattr(instruction_emma, "ftfy", None)
    rows = [row for row in recorded(reference) if row["text"].isascii()]
    assert len(rows) > 25
    for row in rows:
        assert encode_instruction(tokenizer, row["text"]) == row["ids"], row["text"]


@pytest.mark.parametrize("text", ["Ünïcödé", "it’s", "&copy;"])
def test_other_text_without_ftfy_warns_once(tokenizer, monkeypatch, text):
    monkeypatch.setattr(instruction_emma, "ftfy", None)
    instruction_emma._warn_without_ftfy.cache_clear()
    with pytest.warns(UserWarning, match=r'not plain ASCII.*pip install "emma-hf\[ftfy\]"'):
        encode_instruction(tokenizer, text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_instruction(tokenizer, "façade")
        encode_instruction(tokenizer, "plain")


PIECES = [
    "'s", "'ſ", "'LL", "<start_of_text>", "<END_OF_TEXT>", "<|startoftext|>", "<|endoftext|>", "&amp;", "&lt;", "&amp;amp;",
    "&EACUTE;", "&#59;", "&#8217;", "&QUEST;", "&nosuch;", "&notit;", "&#0;", "&#128;", "&#x301;", "<", "\r", "\r\n", "\n",
    "\x1b[31m", "\x1b", "\x00", "\x85", "\u2028", "ﬁ", "İ", "ß", "J̌", "e\u0301", "K", "1²", "½", "!!", "it's", "\u200b",
    "\xa0", "&nbsp;", "Ã©", "“", "’", "Í\x85", "😀",
]  # fmt: skip
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(PIECES),
        st.text(st.characters(exclude_categories=("Cs",)), max_size=12),
        st.text(st.characters(max_codepoint=127), max_size=8),
    ),
    max_size=8,
).map("".join)


def test_random_text_gives_the_ids_of_open_clip(tokenizer, open_clip):
    @settings(max_examples=600, deadline=None, derandomize=True)
    @given(TEXTS)
    def check(text):
        assert encode_instruction(tokenizer, text) == expected_ids(open_clip, text)

    check()


def test_random_ascii_gives_the_ids_of_open_clip_without_ftfy(tokenizer, open_clip, monkeypatch):
    monkeypatch.setattr(instruction_emma, "ftfy", None)
    pieces = [piece for piece in PIECES if piece.isascii()]

    @settings(max_examples=600, deadline=None, derandomize=True)
    @given(st.lists(st.one_of(st.sampled_from(pieces), st.text(st.characters(max_codepoint=127))), max_size=8))
    def check(parts):
        text = "".join(parts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cleaned = clean_instruction(text)
        # Entities can name what is not ASCII; that text needs ftfy like any other.
        if cleaned.isascii():
            assert encode_instruction(tokenizer, text) == expected_ids(open_clip, text)

    check()


@pytest.mark.parametrize("fixes", ["ftfy", "ours"])
@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("&#8217;", "'"),
        ("&#38;#38;#38;#38;lt;", "<"),
        ("<&#38;#38;#38;#38;lt;", "<&#38;#38;lt;"),
        ("&amp&#59;", "&;"),
        ("&QUEST; &Quest; &NOSUCH;", "? &quest; &nosuch;"),
        ("&COPYSR; &IMATH;", "©sr; i"),
        ("a\r\nb\rc", "a b c"),
    ],
)
def test_entities_with_and_without_ftfy(monkeypatch, fixes, text, cleaned):
    if fixes == "ours":
        monkeypatch.setattr(instruction_emma, "ftfy", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert clean_instruction(text) == cleaned


def test_the_merges_of_a_slow_tokenizer():
    slow = SimpleNamespace(is_fast=False, bpe=lambda letters: f"{letters[0]} {letters[1:]}", convert_tokens_to_ids=list)
    assert instruction_emma._byte_pair_ids(slow, "é!") == ["Ã", "©!"]


@pytest.mark.parametrize("length", [2, 3, 10, 77])
def test_a_long_text_ends_with_the_end_token(tokenizer, length):
    ids = encode_instruction(tokenizer, "word " * 10_000, length)
    assert len(ids) == length
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert ids[1:-1] == [2653] * (length - 2)


def test_padding_is_zero_and_not_the_exclamation_mark_in_a_text(tokenizer):
    assert encode_instruction(tokenizer, "!")[:4] == [49406, 256, 49407, 0]
    assert encode_instruction(tokenizer, "")[:3] == [49406, 49407, 0]


def test_wrong_text_and_length_are_named(tokenizer):
    for function in (clean_instruction, partial(encode_instruction, tokenizer)):
        with pytest.raises(ValueError, match="^An instruction must be a string: got int"):
            function(3)
    with pytest.raises(ValueError, match="a length of at least 2: got 1"):
        encode_instruction(tokenizer, "a", 1)


def test_no_more_of_a_huge_text_is_encoded_than_is_kept(tokenizer, monkeypatch):
    words = []
    original = instruction_emma._byte_pair_ids
    monkeypatch.setattr(instruction_emma, "_byte_pair_ids", lambda *args: words.append(args) or original(*args))
    encode_instruction(tokenizer, "word " * 10_000)
    assert len(words) == 76


# Which text


@pytest.mark.parametrize(
    ("turn", "instruction"),
    [
        ("<image>\nIs it a hat?\nAnswer the question using a single word or phrase.", "Is it a hat?"),
        ("What is it?\n<image>", "What is it?"),
        ("<image>\n<image>\nWhat changed?", "What changed?"),
        ("Look at <image> please", "Look at  please"),
        ("<image>", ""),
        ("", ""),
        ("  \n\n a ", "a"),
        ("a\nb\nc", "a"),
    ],
)
def test_a_turns_instruction_is_its_first_line_without_placeholders(turn, instruction):
    assert instruction_from_turn(turn) == instruction


def test_recorded_prompts(prompts):
    for name, case in prompts.items():
        for prompt, expected in zip([case.get("prompt", "")], [case.get("instructions", [])]):
            assert instructions_from_prompt(prompt) == expected, name


@pytest.mark.parametrize(
    ("prompt", "instructions"),
    [
        ("USER: <image>\nWho? ASSISTANT:", ["Who?"]),
        ("USER: <image>\nWho?\nASSISTANT:", ["Who?"]),
        ("USER: <image>\nWho? ASSISTANT: Secret.</s>USER: And? ASSISTANT:", ["Who?"]),
        ("USER: Hi ASSISTANT: Secret.</s>USER: <image>\nWho? ASSISTANT: Other", ["Who?"]),
        ("USER: <image>\nA? ASSISTANT: x</s>USER: <image>\nB? ASSISTANT:", ["A?", "B?"]),
        ("USER: <image>\n<image>\nWhat changed? ASSISTANT:", ["What changed?"] * 2),
        ("USER: Who is it?\n<image> ASSISTANT:", ["Who is it?"]),
        ("USER: <image> ASSISTANT: Secret.</s>USER: Who? ASSISTANT:", ["Who?"]),
        ("USER: <image> ASSISTANT: Secret.</s>USER: Who? ASSISTANT: Secret.</s>USER: Why? ASSISTANT:", ["Who?"]),
        ("USER: <image> ASSISTANT: Secret.</s>USER: ASSISTANT: x</s>USER: Who? ASSISTANT:", [""]),
        ("USER: <image> ASSISTANT:", [""]),
        ("USER:<image>ASSISTANT:Secret", [""]),
        ("<image>\nWho is it?\nIn one word.", ["Who is it?"]),
        ("Who is it? <image>", ["Who is it?"]),
        ("no picture", []),
        (SYSTEM + "USER: <image>\nthe user: says assistant: hi ASSISTANT:", ["the user: says assistant: hi"]),
        ("USER: Hi ASSISTANT: Secret <image> ASSISTANT:", ["Hi"]),
        ("USER: <image> ASSISTANT: he wrote USER: Secret</s>USER: Who? ASSISTANT:", ["Who?"]),
        ("USER: <image> ASSISTANT: a USER: Secret ASSISTANT: Secret</s>USER: Who? ASSISTANT:", ["Who?"]),
        ("USER: <image> ASSISTANT: a</s>USER: Who? ASSISTANT: USER: Secret", ["Who?"]),
        ("USER: <image> ASSISTANT: he wrote USER: Secret</s>", [""]),
        ("USER: <image> ASSISTANT: Secret USER: Who? ASSISTANT:", ["Who?"]),
        ("USER: <image>\nWho?ASSISTANT: Secret", ["Who?"]),
        ("USER: he said USER: <image> who ASSISTANT:", ["who"]),
        ("".join(f"USER: <image>\n{turn}? ASSISTANT: x</s>" for turn in "ABCDE"), ["A?", "B?", "C?", "D?", "E?"]),
        ("A? <image> USER: B ASSISTANT: Secret</s>USER: C ASSISTANT:", ["A?  USER: B"]),
    ],
)
def test_prompts(prompt, instructions):
    assert instructions_from_prompt(prompt) == instructions
    assert not any("Secret" in text for text in instructions_from_prompt(prompt))


def test_the_latest_turn_can_be_the_instruction():
    prompt = "USER: <image>\nWho? ASSISTANT: Secret.</s>USER: And the hat?\nIn one word. ASSISTANT:"
    assert instructions_from_prompt(prompt, instruction_turn="last") == ["And the hat?"]
    prompt = "USER: <image>\nWho? ASSISTANT: USER: Secret</s>USER: USER: is typed ASSISTANT: USER: Secret</s>"
    assert instructions_from_prompt(prompt, instruction_turn="last") == ["USER: is typed"]
    assert instructions_from_prompt(prompt.replace("</s>", "<|end|>"), "<image>", "last", "<|end|>") == [
        "USER: is typed"
    ]
    prompt = "".join(f"USER: <image>\n{turn}? ASSISTANT: x</s>" for turn in "ABC")
    assert instructions_from_prompt(prompt, instruction_turn="last") == ["C?"] * 3
    assert instructions_from_messages([user(None, "Who?")], instruction_turn="last") == ["Who?"]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "Secret."},
        {"role": "user", "content": "And the hat?\nIn one word."},
    ]
    assert instructions_from_messages(messages) == ["Who?", "Who?"]
    assert instructions_from_messages(messages, instruction_turn="last") == ["And the hat?"] * 2
    for function, argument in ((instructions_from_prompt, prompt), (instructions_from_messages, messages)):
        with pytest.raises(ValueError, match="must be 'image' or 'last': got 'first'"):
            function(argument, instruction_turn="first")


def user(*parts) -> dict:
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("messages", "instructions"),
    [
        ([user(None, "Who?")], ["Who?"]),
        ([user("Who ", None, "is it?\nShort.")], ["Who is it?"]),
        ([user(None, "What is a <image> token?")], ["What is a <image> token?"]),
        ([{"role": "user", "content": "<image>\nWho?\nShort."}], ["Who?"]),
        ([{"role": "system", "content": "Secret"}, user(None, "Who?")], ["Who?"]),
        ([user(None), {"role": "assistant", "content": "Secret"}, user("Who?")], ["Who?"]),
        ([user(None), {"role": "assistant", "content": "Secret"}, user("Who?"), user("Why?")], ["Who?"]),
        ([user(None), user(), user("Who?")], [""]),
        ([user(None), {"role": "assistant", "content": "Secret"}], [""]),
        ([user(None, "A?"), {"role": "assistant", "content": "Secret"}, user(None, "B?")], ["A?", "B?"]),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], [""]),
        ([user("no picture")], []),
    ],
)
def test_messages(messages, instructions):
    assert instructions_from_messages(messages) == instructions


def test_malformed_messages_are_named():
    with pytest.raises(ValueError, match=r"A message needs a `role`.*got the keys \['content'\]"):
        instructions_from_messages([{"content": "x"}])
    with pytest.raises(ValueError, match="needs `content`.*got NoneType"):
        instructions_from_messages([{"role": "user"}])


def test_a_message_in_parts_is_unambiguous():
    def texts(role: str, content, *token: str) -> list[str]:
        return [part["text"] for part in normalize_message({"role": role, "content": content}, *token)["content"]]

    mark = PLACEHOLDER_ESCAPE
    assert texts("user", "a <image>") == ["a <image>"]
    assert texts("assistant", "a <image>") == [f"a <{mark}image>"]
    assert texts("assistant", "a <pic> <image>", "<pic>") == [f"a <{mark}pic> <image>"]
    assert texts("assistant", None) == texts("tool", None) == []
    # Also where it is split over parts, and where an image stands between them.
    parts = [{"type": "text", "text": text} for text in ("x <ima", "ge> <image>", "<", "y")]
    assert texts("user", parts) == [f"x <{mark}ima", f"ge> <{mark}image>", "<", "y"]
    assert texts("user", parts, "<pic>") == ["x <ima", "ge> <image>", "<", "y"]
    for url in ("u", {"url": "u"}):
        message = normalize_message({"role": "user", "content": [{"type": "image_url", "image_url": url}]})
        assert message == {"role": "user", "content": [{"type": "image", "url": "u"}]}
    assert instructions_from_messages([{"role": "user", "content": "<pic> <image>?"}], "<pic>") == ["<image>?"]
    assert instructions_from_messages([user(None, "a <pic> b")], "<pic>") == ["a <pic> b"]
    assert instructions_from_messages([], instruction_turn="last") == []


def test_each_shape_that_is_no_message_is_shown():
    for message, text in (
        ([1], "A message needs a `role` (system, user or assistant): got [1]."),
        ({"role": 3}, "assistant): got {'role': 3}."),
        ({"role": "user", "content": 3}, "A message of role user needs `content`, a string or a list of parts: got int."),
        ({"role": "user", "content": "\ud800"}, "The user message must be valid Unicode: got half of a surrogate pair at"),
        (user(3), "The `text` of a text part must be a string: got int."),
        ({"role": "user", "content": ["x"]}, "must have one of the types text, image, image_url: got 'x'."),
        ({"role": "user", "content": [{"type": "image_url", "image_url": 3}]}, "The `image_url` of a part must be a string: got int."),
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            normalize_message(message)
        assert text in str(caught.value)


def test_training_reads_either_name_of_the_user_and_one_colon(tokenizer):
    turns = [{"from": "user", "value": "a long first turn of words: short "}, {"from": "gpt", "value": "x"}]
    assert training_instruction(turns * 2, tokenizer) == "short "
    assert (
        training_instruction([{"from": "user", "value": f"<{PLACEHOLDER_ESCAPE}image> a "}, turns[1]], tokenizer)
        == "<image> a"
    )


def test_the_length_decides_which_training_turn_is_the_shortest(tokenizer):
    def chosen(words: tuple[int, int], **length) -> int:
        turns = [{"from": role, "value": "word " * count} for count in words for role in ("human", "gpt")]
        return len(training_instruction(turns, tokenizer, **length).split())

    assert (chosen((76, 75)), chosen((75, 74))) == (76, 74)
    assert (chosen((9, 5)), chosen((9, 5), length=7), chosen((9, 5), length=8)) == (5, 9, 5)


def test_typed_placeholders_are_words_and_their_marks_reach_nobody():
    escaped = escape_placeholders("a <image> b")
    assert escaped == f"a <{PLACEHOLDER_ESCAPE}image> b"
    assert "<image>" not in escaped
    assert instructions_from_prompt(f"USER: <image>\n{escaped} ASSISTANT:") == ["a <image> b"]
    marked = "USER: <image>\na \U000f0000<image>\U000f0001 \U000f0000</s>\U000f0001 b ASSISTANT:"
    assert instructions_from_prompt(unmark_control_tokens(marked)) == ["a <image> </s> b"]


# Training


def test_recorded_training_instructions(tokenizer, reference):
    rows = json.loads((reference / "training_examples.json").read_text())
    assert len(rows) == 15
    for row in rows:
        text = training_instruction(row["conversation"], tokenizer)
        ids = row["instruction_ids"]
        assert encode_instruction(tokenizer, text) == (ids[0] if isinstance(ids[0], list) else ids), row["conversation"]


def test_the_answer_never_becomes_the_training_instruction(tokenizer):
    # The answer is the shortest text of the row: any mix-up would choose it.
    answer = {"from": "gpt", "value": "Ha"}
    question = {"from": "human", "value": "<image>\nWhat could be the reason for taking this photo, do you think?"}
    for row in (
        [question, answer],
        [answer, question],
        [question, answer, question, answer],
        [answer, question, answer],
    ):
        assert "reason" in training_instruction(row, tokenizer)
    with pytest.raises(ValueError, match=r"^A training row needs a user turn.*got \['gpt'\]"):
        training_instruction([answer], tokenizer)


def test_what_lies_far_behind_the_last_id_is_not_read(tokenizer):
    spaces = " " * 10_000 + "\n" * 10_000
    assert encode_instruction(tokenizer, f"Who{spaces}is it?") == encode_instruction(tokenizer, "Who is it?")
    longest = "blackandwhitephotography " * 80
    assert encode_instruction(tokenizer, longest) == encode_instruction(tokenizer, longest[:2000])
    # A number of more digits than Python reads.
    assert encode_instruction(tokenizer, "&#" + "9" * 5000 + ";")[0] == tokenizer.bos_token_id
