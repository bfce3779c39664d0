"""The two tokenizers: recorded ids of the authors' code, the row of `<image>`, and the files of the way back."""

import json
import shutil

import pytest
import torch
from support.checkpoints import converted_from, edit, exchange_language_model_for_qwen2
from transformers import AutoTokenizer

from emma_hf import EmmaError, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.conversion import reverse
from emma_hf.conversion.instruction_vocabulary import BPE_NAME, load_instruction_tokenizer
from emma_hf.conversion.tokenizers import instruction_tokenizer, prompt_tokenizer, write_authors_tokenizers


@pytest.mark.parametrize("legacy", [True, False])
def test_recorded_prompt_ids(authors, tmp_path, reference, legacy):
    edit(authors / "tokenizer_config.json", legacy=legacy)
    processor = EmmaProcessor.from_pretrained(converted_from(authors, tmp_path / "out"))
    processor.save_pretrained(tmp_path / "again")
    rows = json.loads((reference / "prompt_tokens.json").read_text())
    rows = [row for row in rows if row["legacy"] == legacy]
    assert len(rows) == 10
    for tokenizes in (processor, EmmaProcessor.from_pretrained(tmp_path / "again")):
        for row in rows:
            ids = []
            for token in row["ids"]:
                ids += [700] * 16 if token == -200 else [token]
            images = [torch.zeros(3, 4, 4, dtype=torch.uint8)] * row["prompt"].count("<image>")
            assert tokenizes(images or None, row["prompt"])["input_ids"] == [ids], row["prompt"]


def test_rows_without_a_token_get_reserved_names(authors):
    tokens = len(AutoTokenizer.from_pretrained(authors, legacy=False))
    tokenizer = prompt_tokenizer(authors, {}, tokens + 3)
    assert tokenizer.convert_ids_to_tokens([tokens, tokens + 2, tokens + 3]) == [
        f"<reserved_{tokens}>", f"<reserved_{tokens + 2}>", "<image>",
    ]  # fmt: skip
    with pytest.raises(
        EmmaError, match=rf"the id after the embedding's {tokens - 1} rows: the tokenizer gives it {tokens}"
    ):
        prompt_tokenizer(authors, {}, tokens - 1)


def test_values_that_a_tokenizer_config_lacks_are_those_of_the_authors(authors):
    edit(authors / "tokenizer_config.json", legacy=..., add_bos_token=..., model_max_length=...)
    tokenizer = prompt_tokenizer(authors, {"tokenizer_model_max_length": 123}, 700)
    assert tokenizer.model_max_length == 123
    assert tokenizer.padding_side == "left"
    assert tokenizer.init_kwargs["legacy"] is True
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def test_the_authors_instruction_vocabulary_comes_before_that_of_clip(authors):
    load_instruction_tokenizer(authors).save_pretrained(authors / "clip")
    (authors / "clip" / "tokenizer.json").write_text("{")
    assert instruction_tokenizer(authors, authors / "clip")("a photo")["input_ids"]
    (authors / BPE_NAME).unlink()
    with pytest.raises(EmmaError, match="clip holds no readable CLIP tokenizer"):
        instruction_tokenizer(authors, authors / "clip")


def test_the_authors_files_are_written_as_they_read_them(converted, reference, tmp_path):
    write_authors_tokenizers(converted, tmp_path)
    original, written = (
        json.loads((folder / "tokenizer_config.json").read_text()) for folder in (reference / "original", tmp_path)
    )
    assert {name: original[name] for name in written} == written
    assert written.keys() >= {"legacy", "bos_token", "eos_token", "model_max_length", "padding_side", "tokenizer_class"}
    assert json.loads((tmp_path / "special_tokens_map.json").read_text()) == {
        name: original[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    assert (tmp_path / "tokenizer.model").read_bytes() == (reference / "original" / "tokenizer.model").read_bytes()


PROMPTS = [
    "USER: What color is the star? ASSISTANT:",
    " It's 12 + 345,\n\n  naïve 模型\t!<|im_end|>",
    "a<|endoftext|> b",
    "",
]


def test_a_byte_level_tokenizer_gives_the_ids_of_transformers_own(authors, tmp_path):
    language_model = exchange_language_model_for_qwen2(authors)
    output = converted_from(authors, tmp_path / "out")
    (tmp_path / "own").mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(authors / name, tmp_path / "own")
    own = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert type(own).__name__ in ("Qwen2Tokenizer", "Qwen2TokenizerFast")
    processor = EmmaProcessor.from_pretrained(output)
    processor.save_pretrained(tmp_path / "again")
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    for tokenizes in (processor, EmmaProcessor.from_pretrained(tmp_path / "again")):
        for prompt in PROMPTS:
            assert tokenizes(text=prompt)["input_ids"] == [own(prompt)["input_ids"]]
        before, after = "USER: ", "\nWhat is it? ASSISTANT:"
        ids = own(before)["input_ids"] + [510] * 16 + own(after)["input_ids"]
        assert tokenizes(image, f"{before}<image>{after}")["input_ids"] == [ids]
    assert processor.tokenizer.model_max_length == 400
    assert processor.tokenizer.pad_token == "<|endoftext|>"
    model = EmmaForConditionalGeneration.from_pretrained(output, dtype=torch.float32).eval()
    ids = torch.tensor(processor(text=PROMPTS[0])["input_ids"])
    with torch.no_grad():
        expected, logits = language_model(ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(logits[..., :510], expected, rtol=0, atol=1e-6)
    with pytest.raises(
        EmmaError, match="`--reverse` writes Llama's tokenizer.model: .*out is a 'qwen2', which has none"
    ):
        reverse(output, tmp_path / "back", progress=False)
