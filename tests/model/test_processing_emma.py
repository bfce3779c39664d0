"""The processor: counts, instructions, prompt ids, chat templates, saving and loading, and its errors."""

import copy
import inspect
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support.processes import run_python
from support.recorded import IMAGE_TOKENS, recorded_inputs
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast, pipeline, tokenization_utils_base
from transformers.processing_utils import Unpack

from emma_hf import EmmaImageProcessor, EmmaProcessor
from emma_hf.model import processing_emma
from emma_hf.model.compat_emma import CACHE_NAME, TRANSFORMERS_5
from emma_hf.model.instruction_emma import PLACEHOLDER_ESCAPE, encode_instruction
from emma_hf.model.processing_emma import EmmaProcessorKwargs

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
RECORDED = ["single", "single_two_lines", "unicode", "multi_image", "history"]


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def asked(processor, row) -> list[int]:
    return encode_instruction(processor.instruction_tokenizer, row)


def user(*parts) -> dict:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": "user", "content": content}


# Calls


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_prompts_and_instructions(processor, cases, prompts, name):
    case = prompts[name]
    inputs = processor(images=[picture()] * len(case["instructions"]), text=case["prompt"], return_tensors="pt")
    expected = recorded_inputs(cases, name)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["instruction_input_ids"], expected["instruction_input_ids"])
    assert inputs["pixel_values"].shape == expected["pixel_values"].shape
    explicit = processor(
        images=[picture()] * len(case["instructions"]), text=case["prompt"], instructions=case["instructions"]
    )
    assert explicit["instruction_input_ids"] == expected["instruction_input_ids"].tolist()


def test_a_padded_batch_pads_the_prompt_and_never_the_instruction(processor):
    texts = [
        "USER: <image>\nWho? ASSISTANT:",
        "USER: hello there ASSISTANT:",
        "USER: <image>\n<image>\nWhat? ASSISTANT:",
    ]
    images = [[picture(0)], [], [picture(1), picture(2)]]
    single = [processor(images=row or None, text=text) for row, text in zip(images, texts)]
    for side in ("left", "right"):
        for padding, length in ((True, None), ("max_length", 120), ("longest", None)):
            batch = processor(
                images=images, text=texts, padding=padding, max_length=length, padding_side=side, return_tensors="pt"
            )
            assert batch["instruction_input_ids"].shape == (3, 77)
            assert batch["pixel_values"].shape == (3, 3, 28, 28)
            for row, alone in enumerate(single):
                kept = batch["attention_mask"][row].bool()
                assert batch["input_ids"][row][kept].tolist() == alone["input_ids"][0]
                assert kept[-1 if side == "left" else 0]
                assert (batch["input_ids"][row][~kept] == processor.tokenizer.pad_token_id).all()
            if length:
                assert batch["input_ids"].shape[1] == length
            rows = [asked(processor, "Who?"), asked(processor, "What?"), asked(processor, "What?")]
            assert batch["instruction_input_ids"].tolist() == rows
    flat = processor(images=[image for row in images for image in row], text=texts, padding=True, return_tensors="pt")
    assert torch.equal(
        flat["input_ids"], processor(images=images, text=texts, padding=True, return_tensors="pt")["input_ids"]
    )


def test_text_kwargs_and_special_tokens(processor):
    plain = processor(text="hello", add_special_tokens=False)["input_ids"][0]
    assert processor(text="hello")["input_ids"][0] == [1, *plain]
    assert processor(text="hello", text_kwargs={"add_special_tokens": False})["input_ids"][0] == plain
    assert "attention_mask" not in processor(text="hello", return_attention_mask=False)
    padded = processor(text="hello", padding="max_length", max_length=9, pad_to_multiple_of=4)["input_ids"][0]
    assert padded == [0] * (11 - len(plain)) + [1, *plain]
    assert processor.encode_prompt("hello")[0] == [1, *plain]
    types = processor(images=picture(), text="USER: <image>\nWho? ASSISTANT:", return_mm_token_type_ids=True)
    ids = types["input_ids"][0]
    assert types["mm_token_type_ids"][0] == [int(token == 700) for token in ids]
    assert sum(types["mm_token_type_ids"][0]) == IMAGE_TOKENS
    assert processor.image_token_ids == [700]
    if hasattr(processor, "create_mm_token_type_ids"):
        # What Transformers 5 makes of the same ids by this name.
        assert processor.create_mm_token_type_ids([ids]) == types["mm_token_type_ids"]


def test_padding_gives_a_mask_and_needs_a_token(processor):
    lacking = copy.deepcopy(processor)
    lacking.tokenizer.model_input_names = ["input_ids"]
    assert lacking(text=["a b", "c"], padding=True)["attention_mask"][1][0] == 0
    lacking.tokenizer.pad_token = None
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        lacking(text="a", padding=True)
    assert str(caught.value) == (
        "Padding needs a padding token, which the tokenizer lacks: set `processor.tokenizer.pad_token`."
    )


@pytest.mark.parametrize("legacy", [True, False])
def test_a_piece_between_pictures_is_read_as_a_text_of_its_own(processor, reference, tmp_path, legacy):
    import sentencepiece

    processor.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "legacy": legacy}))
    again = EmmaProcessor.from_pretrained(tmp_path)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(reference / "original" / "tokenizer.model"))
    for piece in (" ASSISTANT:", "  a", "\n", "\nWho?", "a", " \nx", "   ", "the hat  is", "é 猫"):
        prompt = f"<image>{piece}<image>"
        ids = again(images=[picture()] * 2, text=prompt, add_special_tokens=False)["input_ids"][0]
        assert ids[IMAGE_TOKENS:-IMAGE_TOKENS] == plain.encode(piece), repr(piece)


def test_a_slow_tokenizer_gives_a_piece_one_span(processor, monkeypatch):
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", pytest.fail)
    # One id for each byte, 3 above its value.
    tokenizer = ByT5Tokenizer(model_max_length=3)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    slow = EmmaProcessor(processor.image_processor, tokenizer, processor.instruction_tokenizer, image_seq_length=2)
    ids, spans = slow.encode_prompt("abde<image>c")
    assert ids == [100, 101, 103, 104, slow.image_token_id, slow.image_token_id, 102, tokenizer.eos_token_id]
    assert spans == [(0, 4)] * 4 + [(4, 11), (4, 11), (11, 12), (12, 12)]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        slow.encode_prompt(f"a <{PLACEHOLDER_ESCAPE}image>")
    assert str(caught.value) == (
        "A text that holds '<image>' as words needs a fast tokenizer: got ByT5Tokenizer. Load it through AutoTokenizer."
    )


def test_a_tokenizer_that_keeps_a_leading_space_gets_none_from_us(processor):
    words = Tokenizer(WordLevel({"a": 0, " a": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    keeping = EmmaProcessor(processor.image_processor, tokenizer, processor.instruction_tokenizer, image_seq_length=1)
    assert keeping.encode_prompt(" a<image>a")[0] == [1, 3, 0]


def test_the_tokenizer_s_own_settings_hold(processor):
    set_up = copy.deepcopy(processor)
    set_up.tokenizer.init_kwargs["max_length"] = 12
    assert len(set_up(text="a", padding="max_length")["input_ids"][0]) == 12


def test_offsets_point_into_the_prompt(processor):
    prompt = "USER: <image>\nWho is it? ASSISTANT: An officer."
    inputs = processor(images=picture(), text=prompt, return_offsets_mapping=True)
    spans = {
        prompt[start:end]
        for token, (start, end) in zip(inputs["input_ids"][0], inputs["offset_mapping"][0])
        if token == 700
    }
    assert spans == {"<image>"}
    # A piece with a space in front, without another in the place of the image.
    _, spans = processor.encode_prompt("<image> Who is it?")
    words = spans[1 + IMAGE_TOKENS :]
    assert [start for start, _ in words] == [7, *(end for _, end in words[:-1])]
    assert words[-1][1] == len("<image> Who is it?")
    ends = [end for _, end in inputs["offset_mapping"][0]]
    assert max(ends) == len(prompt)
    assert ends[1:] == sorted(ends[1:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_offsets_are_padded_as_the_ids_are(processor, side):
    texts = ["Who is it?", "Hi"]
    batch = processor(text=texts, padding=True, padding_side=side, return_offsets_mapping=True)
    for text, mask, offsets in zip(texts, batch["attention_mask"], batch["offset_mapping"]):
        alone = processor(text=text, return_offsets_mapping=True)["offset_mapping"][0]
        padding = [(0, 0)] * (len(mask) - len(alone))
        assert offsets == (padding + alone if side == "left" else alone + padding)
        assert mask == [int(i < len(alone)) for i in range(len(mask))][:: -1 if side == "left" else 1]


@pytest.mark.parametrize("tensors", [None, "pt", "np"])
def test_return_types(processor, tensors):
    inputs = processor(images=picture(), text="<image>\nWho?", return_tensors=tensors)
    kind = {None: list, "pt": torch.Tensor, "np": np.ndarray}[tensors]
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "instruction_input_ids"}
    assert all(isinstance(value, kind) for value in inputs.values())
    if tensors:
        dtypes = [str(inputs[name].dtype).removeprefix("torch.") for name in ("pixel_values", "instruction_input_ids")]
        assert dtypes == ["float32", "int64"]


def test_pictures_alone_and_words_alone(processor):
    assert set(processor(images=picture(), return_tensors="pt")) == {"pixel_values"}
    plain = processor(images=picture(), text="<image>", do_normalize=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(
        plain, processor.image_processor(picture(), do_normalize=False, return_tensors="pt")["pixel_values"]
    )
    assert not torch.equal(plain, processor(images=picture(), return_tensors="pt")["pixel_values"])
    both = processor(images=[picture(), picture()], instructions="Who?", return_tensors="pt")
    assert both["instruction_input_ids"].shape == (2, 77)
    assert set(processor(text="hello", return_tensors="pt")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ("a", ["a", "a", "a"]),
        (["a", "b"], ["a", "b", "b"]),
        ([["a"], ["b", "c"]], ["a", "b", "c"]),
        (["who", ["b", "c"]], ["who", "b", "c"]),
    ],
)
def test_instructions_of_two_prompts(processor, instructions, expected):
    texts, images = ["<image>\nx", "<image>\n<image>\ny"], [[picture()], [picture()] * 2]
    ids = processor(images=images, text=texts, instructions=instructions)["instruction_input_ids"]
    assert ids == [asked(processor, text) for text in expected]


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [("a", "aa"), (["a"], "aa"), (["a", "b"], "ab"), ([["a", "b"]], "ab"), (("a", "b"), "ab")],
)
def test_instructions_of_one_prompt(processor, instructions, expected):
    ids = processor(images=[picture()] * 2, text="<image>\n<image>\nx", instructions=instructions)[
        "instruction_input_ids"
    ]
    assert ids == [asked(processor, text) for text in expected]


def test_unusual_text_is_legal(processor, model):
    for text in (
        "USER: <image> ASSISTANT:",
        "<image>",
        "USER: <image>\n" + "word " * 10_000 + "ASSISTANT:",
        "<image><image>",
    ):
        images = [picture()] * text.count("<image>")
        inputs = processor(images=images, text=text, return_tensors="pt")
        assert (inputs["input_ids"] == 700).sum() == IMAGE_TOKENS * len(images)
        assert inputs["instruction_input_ids"][0, 0] == 49406
    assert set(processor(text="")) == {"input_ids", "attention_mask"}
    for size in ((1, 1), (1, 3), (3, 1)):
        inputs = processor(images=Image.new("RGB", size), text="<image>\nWho?", return_tensors="pt")
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_cuts_words_and_never_a_picture(processor, monkeypatch, side):
    monkeypatch.setattr(processor.tokenizer, "truncation_side", side)
    given = {"images": picture(), "text": "Who is it? Look: <image>\nAn officer.", "return_offsets_mapping": True}
    whole = processor(**given)
    length = len(whole["input_ids"][0])
    for lost in (-3, 0, 1, 4):
        cut = processor(**given, truncation=True, max_length=length - lost)
        kept = slice(max(lost, 0), None) if side == "left" else slice(length - lost)
        for name in ("input_ids", "attention_mask", "offset_mapping"):
            assert cut[name][0] == whole[name][0][kept], (name, lost)
    assert processor(**given, truncation="do_not_truncate", max_length=12)["input_ids"] == whole["input_ids"]
    # A length alone truncates, as in Transformers.
    kept = slice(1, None) if side == "left" else slice(length - 1)
    assert processor(**given, max_length=length - 1)["input_ids"][0] == whole["input_ids"][0][kept]
    # One that a tokenizer was saved with says nothing about this call.
    with monkeypatch.context() as patch:
        patch.setitem(processor.tokenizer.init_kwargs, "max_length", 12)
        assert processor(**given)["input_ids"] == whole["input_ids"]
    lost = whole["input_ids"][0][slice(length - 12) if side == "left" else slice(12, None)].count(700)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        processor(**given, truncation=True, max_length=12)
    assert str(caught.value) == (
        f"Truncation must not cut an image: prompt 0 has {length} tokens and would lose {lost} of its 16 image tokens "
        "at max_length=12. Raise `max_length` or shorten the prompt."
    )
    # Without a length of its own, the model's.
    monkeypatch.setattr(processor.tokenizer, "model_max_length", 5)
    assert processor(text="Who is it, and why?", truncation=True)["attention_mask"] == [[1] * 5]


# Chats


def test_the_chat_template_is_the_recorded_conversation(processor, prompts):
    recorded = {name: "<s>" + prompts[name]["prompt"] for name in ("single", "multi_image", "history")}
    messages = [user(picture(), "What color is the cat?")]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == recorded["single"]
    messages = [user(picture(), picture(), "What changed between the two?")]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == recorded["multi_image"]
    messages = [user(picture(), "Who is it?"), {"role": "assistant", "content": "An officer."}, user("And the hat?")]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == recorded["history"]
    as_words = [{"role": "user", "content": "<image>\nWhat color is the cat?"}]
    assert processor.apply_chat_template(as_words, add_generation_prompt=True) == recorded["single"]
    system = [{"role": "system", "content": "Be brief."}, user("Hi")]
    assert processor.apply_chat_template(system) == "<s>Be brief. USER: Hi "
    begun = [user("Hi"), {"role": "assistant", "content": "Hello th"}]
    assert processor.apply_chat_template(begun, continue_final_message=True).endswith("ASSISTANT: Hello th")


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("text", ["Who?", "<image>\nWho?", "USER: <image>\nWho? ASSISTANT:", ""])
def test_a_written_bos_is_the_first_id_once(processor, text, add_special_tokens):
    # Trainers and servers hand over a rendered chat with it and turn the special tokens off.
    images = [picture()] * text.count("<image>") or None
    written = processor(images=images, text=f"<s>{text}", add_special_tokens=add_special_tokens)
    plain = processor(images=images, text=text)
    assert written["input_ids"] == plain["input_ids"]
    if images:
        assert torch.equal(torch.tensor(written["instruction_input_ids"]), torch.tensor(plain["instruction_input_ids"]))
    offsets = processor(images=images, text=f"<s>{text}", return_offsets_mapping=True)["offset_mapping"][0]
    expected = processor(images=images, text=text, return_offsets_mapping=True)["offset_mapping"][0]
    assert offsets == [(0, 3)] + [(start + 3, end + 3) for start, end in expected[1:]]


@pytest.mark.parametrize("batched", [False, True])
def test_messages_and_their_rendered_prompt_give_the_same_inputs(processor, batched):
    messages = [
        user(picture(1), "Who is it?\nIn one word."),
        {"role": "assistant", "content": [{"type": "text", "text": "An officer."}]},
        user("And the hat?"),
    ]
    chats = [messages, [user(picture(2), picture(3), "What changed?")]] if batched else messages
    settings = {"add_generation_prompt": True, "padding": batched}
    inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_tensors="pt", **settings)
    rendered = processor.apply_chat_template(chats, add_generation_prompt=True)
    images = [[picture(1)], [picture(2), picture(3)]] if batched else picture(1)
    expected = processor(images=images, text=rendered, padding=batched, return_tensors="pt")
    assert set(inputs) == set(expected)
    for name in inputs:
        assert torch.equal(inputs[name], expected[name]), name
    assert inputs["instruction_input_ids"][0].tolist() == asked(processor, "Who is it?")


def test_an_explicit_instruction_wins(processor):
    chat = [user(picture(), "Who is it?")]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    flat = processor.apply_chat_template(chat, instructions="the hat", **settings)
    inner = processor.apply_chat_template(chat, processor_kwargs={"instructions": "the hat"}, **settings)
    for inputs in (flat, inner):
        assert inputs["instruction_input_ids"].tolist() == [asked(processor, "the hat")]


def test_the_latest_turn_can_be_the_instruction(processor):
    latest = EmmaProcessor(
        processor.image_processor,
        processor.tokenizer,
        processor.instruction_tokenizer,
        image_seq_length=16,
        instruction_length=20,
        instruction_turn="last",
    )
    chat = [user(picture(), "Who?"), {"role": "assistant", "content": "Secret."}, user("And the hat?")]
    inputs = latest.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert inputs["instruction_input_ids"] == [asked(processor, "And the hat?")[:20]]
    prompt = latest.apply_chat_template(chat, add_generation_prompt=True)
    assert latest(images=picture(), text=prompt)["instruction_input_ids"] == inputs["instruction_input_ids"]


def test_words_that_pass_for_a_role_are_the_instruction_of_a_chat(processor):
    inputs = processor.apply_chat_template(
        [user(picture(), "What does ASSISTANT: mean?")], tokenize=True, return_dict=True
    )
    assert inputs["instruction_input_ids"] == [asked(processor, "What does ASSISTANT: mean?")]


@pytest.mark.skipif(CACHE_NAME != "cache", reason="before 5.24 Transformers passes the images of the messages as well")
def test_a_template_can_place_images_itself(processor):
    template = "<image>\nWho is it? {{ messages[0]['role'] }}"
    images = {"images": [picture()]}
    inputs = processor.apply_chat_template(
        [user("Hi")], template, tokenize=True, return_dict=True, processor_kwargs=images
    )
    assert inputs["instruction_input_ids"] == [asked(processor, "Who is it? user")]


def test_another_placeholder_and_another_end(renamed):
    words = "What is a <pic> <image>?"
    inputs = renamed.apply_chat_template([user(picture(), words)], tokenize=True, return_dict=True)
    assert inputs["input_ids"][0].count(renamed.image_token_id) == IMAGE_TOKENS
    assert inputs["instruction_input_ids"] == [asked(renamed, words)]
    inputs = renamed(images=picture(), text="USER: <pic> ASSISTANT: x USER: Secret<end>USER: Who? ASSISTANT:")
    assert inputs["instruction_input_ids"] == [asked(renamed, "Who?")]


def test_a_typed_placeholder_in_a_text_part_is_words(processor):
    chat = [user(picture(), "What is a <image> token?")]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    ids = inputs["input_ids"][0]
    assert ids.count(700) == IMAGE_TOKENS
    assert inputs["instruction_input_ids"] == [asked(processor, "What is a <image> token?")]
    words = processor.tokenizer.decode([token for token in ids if token != 700])
    assert "What is a <image> token?" in words
    assert PLACEHOLDER_ESCAPE not in words
    # The rendered prompt keeps the two apart as well.
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert processor(images=picture(), text=prompt)["input_ids"] == [ids]
    # In a bare prompt it is a placeholder, and the numbers must agree.
    with pytest.raises(ValueError, match="prompt 0 holds 2 placeholders|got 2 placeholders"):
        processor(images=picture(), text="USER: <image>\nWhat is a <image> token? ASSISTANT:")
    answer = [user(picture(), "Who?"), {"role": "assistant", "content": "A <image>."}, user("So?")]
    inputs = processor.apply_chat_template(answer, tokenize=True, return_dict=True)
    assert inputs["input_ids"][0].count(700) == IMAGE_TOKENS


def test_a_placeholder_split_over_two_parts_is_words(processor):
    content = [{"type": "image", "image": picture()}, *({"type": "text", "text": text} for text in ("a <ima", "ge> b"))]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)
    ids = inputs["input_ids"][0]
    assert ids.count(700) == IMAGE_TOKENS
    assert "a <image> b" in processor.tokenizer.decode([token for token in ids if token != 700])
    assert inputs["instruction_input_ids"] == [asked(processor, "a <image> b")]


def test_control_tokens_that_transformers_marked_are_words(processor, caplog):
    marked = "USER: <image>\na \U000f0000<image>\U000f0001 b \U000f0000</s>\U000f0001 ASSISTANT:"
    inputs = processor(images=picture(), text=marked, sanitize_control_tokens=True)
    assert inputs["input_ids"][0].count(700) == IMAGE_TOKENS
    assert processor.tokenizer.eos_token_id not in inputs["input_ids"][0]
    assert inputs["instruction_input_ids"] == [asked(processor, "a <image> b </s>")]
    assert "sanitize_control_tokens" not in caplog.text


def test_assistant_tokens_can_be_masked(processor):
    chat = [user(picture(), "Who is it?"), {"role": "assistant", "content": "An officer."}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids = [token for token, kept in zip(inputs["input_ids"][0], inputs["assistant_masks"][0]) if kept]
    assert processor.tokenizer.decode(ids).strip() == "An officer.</s>"


def test_other_roles_are_refused(processor):
    system = {"role": "system", "content": "x"}
    for messages, role in (([{"role": "tool", "content": "x"}], "tool"), ([user("Hi"), system], "system")):
        with pytest.raises(ValueError, match=f"Roles are system .*got {role}"):
            processor.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"list of at least one message.*got '\[\]'"),
        ([[]], "list of at least one message"),
        ([[user("Hi")], []], "list of at least one message"),
        ("hi", "^A conversation must be a list of at least one message.*got 'hi'"),
        (None, "list of at least one message.*got 'None'"),
        (user("Hi"), "list of at least one message"),
        (["hi"], "needs a `role`.*got 'hi'"),
        ([None], "needs a `role`.*got None"),
        ([{"content": "x"}], r"needs a `role`.*got the keys \['content'\]"),
        ([{"role": 3, "content": "x"}], "needs a `role`"),
        ([{"role": "user"}], "role user needs `content`.*got NoneType"),
        ([user("Hi"), {"role": "assistant", "content": 3}], "role assistant needs `content`.*got int"),
        ([{"role": "system", "content": 3}, user("Hi")], "role system needs `content`.*got int"),
        ([{"role": "user", "content": {"type": "text"}}], "needs `content`.*got dict"),
        *(
            ([{"role": role, "content": [part]}], "one of the types text, image, image_url: got")
            for role in ("user", "assistant", "system")
            for part in ({"type": "video", "video": "x"}, {"type": "input_text", "text": "a"}, {"text": "a"}, "a", 3, None)
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "`text` of a text part must be a string: got NoneType"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "must be a string: got int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "`image_url` of a part must be a string: got NoneType"),
        *(
            ([{"role": "user", "content": [part]}], message)
            for part, message in (
                ({"type": "image", "image": "a.png", "text": "Hi"}, "'image' holds image or .*: got `text` too, 'Hi'"),
                ({"type": "text", "text": "Hi", "image": 3}, "'text' holds text: got `image` too, '3'. Make it a part"),
                ({"type": "text", "text": "Hi", "image_url": {"url": "x"}}, "got `image_url` too"),
                ({"type": "image_url", "image_url": "x", "audio": b"x"}, "got `audio` too"),
            )
        ),
        *(
            ([{"role": "user", "content": "Hi", name: value}], rf"reads the role and the content of messages: got `{name}`")
            for name, value in (("images", ["a.png"]), ("image", picture()), ("video", "x"))
        ),
        ([user("Hi"), {"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}], "got `tool_calls`"),
        ([user("Hi \ud83d")], "text part must be valid Unicode: got half of a surrogate pair at character 3, '.ud83d'"),
        ([{"role": "system", "content": "\udc80"}, user("Hi")], "system message must be valid Unicode"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tokenize", [False, True])
def test_messages_of_a_wrong_shape_are_named(processor, messages, message, tokenize):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(messages, tokenize=tokenize, return_dict=tokenize)


def test_columns_of_a_table_that_are_empty_are_nothing(processor):
    """A row of `datasets` has every column of the others: the parts of a message, and the keys of all messages."""
    parts = [{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "Hi", "image": None, "index": None}]
    chat = [{"role": "user", "content": parts, "tool_calls": None, "images": []}]
    rendered = processor.apply_chat_template(chat, tools=None, documents=[])
    assert rendered == processor.apply_chat_template([user(picture(), "Hi")])


def test_what_a_template_reads_is_given_to_it(processor):
    chat = [{"role": "user", "content": "Hi", "images": [1, 2]}]
    template = "{% for message in messages %}{{ message['images'] | length }}{% endfor %}{{ tools | length }}"
    assert processor.apply_chat_template(chat, template, tools=[{}] * 3) == "23"
    for name in ("tools", "documents"):
        with pytest.raises(ValueError, match=f"got `{name}` "):
            processor.apply_chat_template([user("Hi")], **{name: [{"name": "look"}]})


@pytest.mark.parametrize("content", [None, []])
def test_an_assistant_without_words_is_an_empty_answer(processor, content):
    chat = [user("Hi"), {"role": "assistant", "content": content}]
    empty = [user("Hi"), {"role": "assistant", "content": ""}]
    options = {"tokenize": True, "return_dict": True}
    assert processor.apply_chat_template(chat, **options) == processor.apply_chat_template(empty, **options)


@pytest.mark.parametrize("cut", range(1, 7))
def test_a_placeholder_cut_over_two_parts_is_words(processor, cut):
    chat = [user(picture(), "What is <image>"[: 8 + cut], "<image>"[cut:] + " here?")]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    assert inputs["input_ids"][0].count(700) == IMAGE_TOKENS
    assert inputs["instruction_input_ids"] == [asked(processor, "What is <image> here?")]
    whole = [user(picture(), "What is <image> here?")]
    assert inputs["input_ids"] == processor.apply_chat_template(whole, tokenize=True, return_dict=True)["input_ids"]


def test_an_image_alone_takes_the_words_of_the_next_turn_not_of_the_last(processor):
    answer = {"role": "assistant", "content": "Yes."}
    chat = [user(picture()), answer, user("Who is it?"), answer, user("And the hat?")]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    expected = [asked(processor, "Who is it?")]
    assert (
        inputs["instruction_input_ids"] == processor(images=picture(), text=prompt)["instruction_input_ids"] == expected
    )


def test_the_pipeline_hands_instructions_to_the_processor(processor, model, photo):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    seen = []
    chat = [{"role": "user", "content": [{"type": "image", "url": str(photo)}, {"type": "text", "text": "Who is it?"}]}]
    handle = model.model.instruction_encoder.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].tolist())
    )
    try:
        pipe(text=chat, max_new_tokens=1, instructions="zebra")
        pipe(text=chat, max_new_tokens=1)
    finally:
        handle.remove()
    assert seen == [[asked(processor, "zebra")], [asked(processor, "Who is it?")]]


def test_a_prompt_longer_than_the_model_warns_once(processor, tmp_path, monkeypatch):
    processor.save_pretrained(tmp_path)
    short = EmmaProcessor.from_pretrained(tmp_path)
    short.tokenizer.model_max_length = 20
    text = "USER: <image>\nWho is it, and what is it that it does in this place? ASSISTANT:"
    length = len(processor(images=picture(), text=text)["input_ids"][0])
    said = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", said.append)
    short(images=picture(), text=text, verbose=False)
    short(images=picture(), text=text, max_length=300)
    assert not [text for text in said if "longer than" in text]
    short(images=[picture()] * 2, text=[text, text])
    short(images=picture(), text=text)
    (warning,) = [text for text in said if "longer than" in text]
    assert f"longer than the specified maximum sequence length for this model ({length} > 20)" in warning


@pytest.mark.skipif(not TRANSFORMERS_5, reason="4.57 has no such keyword")
def test_replacement_offsets_are_those_of_transformers(processor):
    prompts = ["a <image> b <image>", "hello"]
    found = processor(
        images=[picture()] * 2, text=list(prompts), padding=True, return_tensors="pt",
        return_text_replacement_offsets=True, return_offsets_mapping=True,
    )  # fmt: skip
    expanded, expected = processor.get_text_with_replacements(list(prompts), ["<image>" * IMAGE_TOKENS] * 2)
    assert found["text_replacement_offsets"] == expected
    for ids, spans, text in zip(found["input_ids"].tolist(), found["offset_mapping"].tolist(), expanded):
        assert [text[start:end] for token, (start, end) in zip(ids, spans) if token == 700] == ["<image>"] * ids.count(
            700
        )
        assert max(end for _, end in spans) == len(text)
    assert "text_replacement_offsets" not in processor(text="hello")


def test_a_save_in_one_file_loads(processor, tmp_path):
    options = {} if TRANSFORMERS_5 else {"legacy_serialization": False}
    processor.save_pretrained(tmp_path, **options)
    again = EmmaProcessor.from_pretrained(tmp_path)
    assert again.to_dict(**options) == processor.to_dict()
    text = "USER: <image>\nWho? ASSISTANT:"
    assert again(images=picture(), text=text)["input_ids"] == processor(images=picture(), text=text)["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folder", "模型"])
def test_processes_of_datasets_run_the_processor_of_a_folder(processor, tmp_path, name):
    pytest.importorskip("datasets")
    processor.save_pretrained(tmp_path / name)
    code = """if __name__ == "__main__":
    import datasets
    from transformers import AutoProcessor
    processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
    rows = datasets.Dataset.from_dict({"text": ["hi", "there"]})
    mapped = rows.map(lambda row: {"ids": processor(text=row["text"])["input_ids"][0]}, num_proc=2)
    print(json.dumps([mapped["ids"][:], mapped._fingerprint]))
"""
    runs = [
        run_python(f"import json\n{code}", tmp_path / name, importable=False, HF_HOME=str(tmp_path / "cache"))
        for _ in range(2)
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr[-2000:]
    ids, fingerprint = json.loads(runs[0].stdout)
    assert ids == [processor(text=text)["input_ids"][0] for text in ("hi", "there")]
    # The same in every process, so that `datasets` finds again what it has computed.
    assert json.loads(runs[1].stdout) == [ids, fingerprint]


# What serving engines use


def test_the_interface_of_serving_engines(processor):
    assert processor.replace_image_token({}, 0) == "<image>" * 16
    planned = processor._get_num_multimodal_tokens(image_sizes=[(20, 30), (1, 1)])
    assert (planned.num_image_tokens, planned.num_image_patches) == ([16, 16], [1, 1])
    inputs = processor(images=picture(), text="<image>")
    assert processor.model_input_names == ["input_ids", "attention_mask", "pixel_values", "instruction_input_ids"]
    assert set(processor.model_input_names) == set(inputs)


# Saving and loading


def test_a_template_is_chosen_by_its_name(processor, monkeypatch):
    messages = [{"role": "user", "content": "Who?"}]
    templates = {"default": "{{ messages[0]['role'] }}", "rag": "{{ documents[0]['text'] }}"}
    monkeypatch.setattr(processor, "chat_template", templates)
    assert processor.apply_chat_template(messages) == "user"
    assert (
        processor.apply_chat_template(messages, chat_template="rag", documents=[{"text": "A hammer."}]) == "A hammer."
    )
    with pytest.raises(
        ValueError, match="The chat template reads the role and the content of messages: got `documents`"
    ):
        processor.apply_chat_template(messages, documents=[{"text": "A hammer."}])


def test_a_save_keeps_everything(processor, tmp_path):
    changed = EmmaProcessor(
        EmmaImageProcessor(size=28, crop_size=28, do_pad=False),
        processor.tokenizer,
        processor.instruction_tokenizer,
        image_seq_length=16,
        instruction_turn="last",
        chat_template="{{ messages }}",
    )
    changed.save_pretrained(tmp_path)
    again = EmmaProcessor.from_pretrained(tmp_path)
    assert again.chat_template == "{{ messages }}"
    assert (again.image_seq_length, again.instruction_length, again.instruction_turn) == (16, 77, "last")
    assert again.image_processor.to_dict() == changed.image_processor.to_dict()
    text = "USER: <image>\nWhat’s “this”! ASSISTANT: x</s>"
    for name, value in changed(images=picture(), text=text, return_tensors="pt").items():
        assert torch.equal(value, again(images=picture(), text=text, return_tensors="pt")[name])
    overridden = EmmaProcessor.from_pretrained(tmp_path, instruction_turn="image")
    assert overridden.instruction_turn == "image"
    # Where `AutoTokenizer` looks for the kind of the second tokenizer.
    assert json.loads((tmp_path / "instruction_tokenizer" / "config.json").read_text()) == {
        "model_type": "clip_text_model"
    }
    config = json.loads((tmp_path / "processor_config.json").read_text())
    assert config["auto_map"] == {"AutoProcessor": "processing_emma.EmmaProcessor"}
    assert str(tmp_path) not in json.dumps(config)


def test_a_save_can_be_pushed(processor, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        EmmaProcessor, "push_to_hub", lambda self, *args, **kwargs: pushed.append((args, kwargs)) or "url"
    )
    assert processor.save_pretrained(tmp_path / "name", push_to_hub=True, private=True) == "url"
    processor.save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="me/other")
    # 4.57 would take a folder of the repository's name that lies in the working directory.
    place = {} if TRANSFORMERS_5 else {"use_temp_dir": True}
    assert pushed == [(("name",), {"private": True, **place}), (("me/other",), place)]
    # The folder is written, too.
    assert EmmaProcessor.from_pretrained(tmp_path / "name").chat_template == processor.chat_template


@pytest.mark.parametrize(
    ("subfolder", "first", "second"),
    [(None, "", "instruction_tokenizer"), ("sub", "sub", "sub/instruction_tokenizer")],
)
def test_the_parts_are_loaded_from_where_the_processor_is(monkeypatch, subfolder, first, second):
    asked_for = []
    for loader in (EmmaImageProcessor, processing_emma.AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", lambda path, **kwargs: asked_for.append((path, kwargs)))
    EmmaProcessor._get_arguments_from_pretrained("me/it", subfolder=subfolder, revision="r")
    assert asked_for == [("me/it", {"subfolder": folder, "revision": "r"}) for folder in (first, first, second)]


def test_a_folder_without_the_second_tokenizer_is_refused(converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.rmtree(folder / "instruction_tokenizer")
    with pytest.raises((ValueError, OSError)):
        EmmaProcessor.from_pretrained(folder)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "^Pass `text`, `images` or both: got neither.$"),
        ({"text": 3}, "`text` must be a string or a list of at least one string: got int"),
        ({"text": []}, "at least one string"),
        ({"text": ["a", 3]}, r"got \['str', 'int'\]"),
        ({"text": picture(), "images": "<image>"}, r"got Image. The order is \(images, text\); pass both by name"),
        ({"text": [picture()], "images": "<image>"}, r"got \['Image'\]. The order is \(images, text\)"),
        ({"text": "hi", "videos": ["x.mp4"]}, "reads text and images: got `videos`"),
        ({"text": "hi", "audio": ["x.wav"]}, "reads text and images: got `audio`"),
        ({"text": "Hi \ud83d"}, "`text` must be valid Unicode: got half of a surrogate pair at character 3"),
        ({"text": ["Hi", "\udc80"]}, "`text` of prompt 1 must be valid Unicode"),
        ({"text": "<image>", "images": picture(), "instructions": "\udc80"}, "An instruction must be valid Unicode"),
        ({"text": "<image>"}, "tokens in the prompts should be the same as the number of"),
        ({"text": "hi", "images": picture()}, "tokens in the prompts should be the same as the number of"),
        ({"text": "<image>"}, "prompt 0 holds 1 placeholders and comes with 0 images"),
        ({"text": "hi", "images": picture()}, r"got 0 placeholders \(per prompt: \[0\]\) and 1 images"),
        ({"text": ["<image>", "<image>"], "images": [picture()]}, r"got 2 placeholders \(per prompt: \[1, 1\]\) and 1 images"),
        (
            {"text": ["<image>", "<image>"], "images": [[picture(), picture()], []]},
            "prompt 0 holds 1 placeholders and comes with 2 images",
        ),
        ({"text": ["<image>"], "images": [[picture()], [picture()]]}, "got 2 lists and 1 prompts"),
        ({"text": ["<image>"] * 2, "images": [[picture()] * 2]}, "got 1 lists and 2 prompts"),
        ({"text": "<image>", "images": picture(), "instructions": ["a", "b"]}, "^Each image .*: prompt 0 has 1 images and 2 instructions. Pass one string per image, or one string for all.$"),
        ({"text": ["<image>"] * 2, "images": [picture()] * 2, "instructions": ["a"]}, "one entry per prompt: got 1 for 2"),
        ({"text": ["<image>"] * 2, "images": [picture()] * 2, "instructions": ["a"] * 3}, "one entry per prompt: got 3 for 2"),
        ({"text": "<image>", "images": picture(), "instructions": 3}, "list of lists of strings: got int"),
        ({"text": "<image>", "images": picture(), "instructions": [3]}, "An instruction must be a string: got int"),
        ({"text": "hi", "instructions": ["a"]}, "prompt 0 has 0 images and 1 instructions"),
        ({"text": "<image><image>", "images": [[picture(), []]]}, "Each entry of a list of images must be one image: got 2 entries that hold 1"),
        ({"text": "<image>", "images": [[[picture(), picture()]]]}, "must be one image: got 1 entries that hold 2 images"),
        ({"text": "<image>", "images": [np.zeros((2, 4, 4, 3), np.uint8)]}, "must be one image: got 1 entries that hold 2 images"),
        ({"text": ["a b c", "a"], "return_tensors": "pt"}, "Prompts of different lengths .* Pass `padding=True`"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_the_keywords_of_a_call_are_typed():
    keywords = inspect.signature(EmmaProcessor.__call__).parameters["kwargs"]
    assert keywords.annotation == Unpack[EmmaProcessorKwargs]
    assert {"text_kwargs", "images_kwargs"} <= set(EmmaProcessorKwargs.__annotations__)


def test_parts_in_the_wrong_place_are_named(processor):
    parts = processor.image_processor, processor.tokenizer, processor.instruction_tokenizer
    with pytest.raises(
        ValueError, match=rf"^`instruction_tokenizer` must be CLIP's.*: got {type(parts[1]).__name__}. In a"
    ):
        EmmaProcessor(parts[0], parts[1], parts[1], image_seq_length=16)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        EmmaProcessor(parts[0], parts[2], parts[2], image_seq_length=16)
    assert str(caught.value) == (
        f"`tokenizer` must know the placeholder '<image>' as one token: got {type(parts[2]).__name__} without it. Add it "
        "with `tokenizer.add_tokens(['<image>'], special_tokens=True)` and a row in the model."
    )
    nameless = copy.deepcopy(parts[2])
    nameless.bos_token = None
    with pytest.raises(
        ValueError, match=r"must know its tokens of start and end: got None and '<end_of_text>'. A folder"
    ):
        EmmaProcessor(parts[0], parts[1], nameless, image_seq_length=16)
    with pytest.raises(ValueError, match="must be 'image' or 'last': got 'all'"):
        EmmaProcessor(*parts, instruction_turn="all")


def test_unknown_keywords_warn(processor, caplog):
    with caplog.at_level(logging.WARNING):
        processor(text="hi", paddding=True)
    assert "paddding" in caplog.text
