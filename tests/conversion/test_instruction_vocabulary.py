"""CLIP's vocabulary from each form in which it is published, and back to the authors' file."""

import gzip
import json

import pytest
from support.checkpoints import converted_from

from emma_hf import EmmaError, EmmaProcessor
from emma_hf.conversion.instruction_vocabulary import BPE_NAME, load_instruction_tokenizer, write_merges
from emma_hf.model.instruction_emma import encode_instruction


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_the_instruction_vocabulary_can_come_from_clip(authors, tmp_path, reference, form):
    tokenizer = load_instruction_tokenizer(authors)
    (authors / BPE_NAME).unlink()
    if form == "tokenizer.json":
        tokenizer.save_pretrained(authors / "clip")
        for name in ("vocab.json", "merges.txt"):
            (authors / "clip" / name).unlink(missing_ok=True)
    else:
        tokenizer.backend_tokenizer.model.save(str(authors / "clip"))
        specials = {"bos_token": "<start_of_text>", "eos_token": "<end_of_text>", "unk_token": "<end_of_text>"}
        (authors / "clip" / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "CLIPTokenizer", "pad_token": "<end_of_text>", **specials})
        )
    processor = EmmaProcessor.from_pretrained(converted_from(authors, tmp_path / "out"))
    for line in (reference / "instruction_tokens.jsonl").read_text().splitlines()[::7]:
        row = json.loads(line)
        assert encode_instruction(processor.instruction_tokenizer, row["text"]) == row["ids"]


def test_a_folder_without_a_vocabulary_is_named(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds no instruction vocabulary: expected bpe_simple.*and merges.txt"):
        load_instruction_tokenizer(tmp_path)


# Without the time of day, which would give each test process other names of these cases.
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "is not a readable vocabulary"),
        (gzip.compress(b"\xff", mtime=0), "is not a readable vocabulary"),
        (gzip.compress(b"header only", mtime=0), "must hold one merge of two parts per line"),
        (gzip.compress(b"header\na b\na b c", mtime=0), "must hold one merge of two parts per line"),
    ],
)
def test_a_damaged_vocabulary_is_named(tmp_path, content, message):
    (tmp_path / BPE_NAME).write_bytes(content)
    with pytest.raises(EmmaError, match=f"{BPE_NAME} {message}"):
        load_instruction_tokenizer(tmp_path)


def test_a_damaged_tokenizer_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(EmmaError, match="holds no readable CLIP tokenizer .*Fetch its files again"):
        load_instruction_tokenizer(tmp_path)


def test_the_merges_are_written_as_they_were_read(authors, tmp_path):
    write_merges(load_instruction_tokenizer(authors), tmp_path / BPE_NAME)
    original, written = (
        gzip.decompress((folder / BPE_NAME).read_bytes()).decode().split("\n") for folder in (authors, tmp_path)
    )
    assert written[1:48895] == original[1:48895]
