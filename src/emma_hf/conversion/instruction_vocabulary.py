"""The instruction tokenizer from the files in which CLIP's vocabulary is published, and back."""

import gzip
import json
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, CLIPTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..model.errors_emma import EmmaError

# OpenAI's file holds more merges than its models use: 49,152 entries less 256 bytes twice and two special tokens.
USED_MERGES = 49152 - 256 - 2
BPE_NAME = "bpe_simple_vocab_16e6.txt.gz"
START, END = "<start_of_text>", "<end_of_text>"


def load_instruction_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """CLIP's tokenizer from any form in which its vocabulary is published.

    Args:
        source: `bpe_simple_vocab_16e6.txt.gz` or a folder that holds it (the authors' checkpoint), or a folder with
            `tokenizer.json`, or with `vocab.json` and `merges.txt` (a CLIP checkpoint).

    Raises:
        FileNotFoundError: none of these files.
        EmmaError: a damaged file.
    """
    file = source / BPE_NAME if source.is_dir() else source
    if file.is_file():
        return _from_merges(_read_merges(file))
    if (source / "tokenizer.json").is_file() or (
        (source / "vocab.json").is_file() and (source / "merges.txt").is_file()
    ):
        try:
            return AutoTokenizer.from_pretrained(source)
        except Exception as error:
            # The tokenizers library raises bare exceptions about damaged files.
            raise EmmaError(f"{source} holds no readable CLIP tokenizer ({error}). Fetch its files again.") from error
    raise FileNotFoundError(
        f"{source} holds no instruction vocabulary: expected {BPE_NAME}, tokenizer.json, or vocab.json and merges.txt."
    )


def write_merges(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write a tokenizer's merges as `bpe_simple_vocab_16e6.txt.gz`, which the authors' code reads."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.backend_tokenizer.model.save(folder)
        lines = (Path(folder) / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
    # No time stamp, so that the same merges give the same file.
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *lines]).encode("utf-8"), mtime=0))


def _read_merges(path: Path) -> list[str]:
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, ValueError) as error:
        raise EmmaError(f"{path} is not a readable vocabulary ({error}). Fetch it again.") from error
    merges = [line for line in lines[1 : USED_MERGES + 1] if line]
    if not merges or any(len(merge.split(" ")) != 2 for merge in merges):
        raise EmmaError(f"{path} must hold one merge of two parts per line, after a header. Fetch it again.")
    return merges


def _from_merges(merges: list[str]) -> PreTrainedTokenizerBase:
    # The order of OpenAI's `tokenizer.py`: the byte letters, the same at the end of a word, the merged pairs.
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {token: index for index, token in enumerate([*tokens, START, END])}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        # Without it Transformers 4.57 guesses the class from the folder's name.
        (Path(folder) / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}', encoding="utf-8")
        return CLIPTokenizerFast.from_pretrained(folder, bos_token=START, eos_token=END, unk_token=END, pad_token=END)
