"""The two tokenizers of a model from the authors' files, and the authors' files from a model."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer

from ..model.errors_emma import EmmaError
from ..storage.folders import read_json, write_json
from .instruction_vocabulary import BPE_NAME, load_instruction_tokenizer, write_merges

# SentencePiece's form (Llama, Mistral), the byte-level form (Qwen2), and what belongs to either.
TOKENIZER_FILES = (
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def prompt_tokenizer(source: Path, authors: dict[str, Any], rows: int) -> Any:
    """The language model's tokenizer, with `<image>` as its last token.

    Args:
        source: folder of the tokenizer: the authors' checkpoint, or its base model.
        authors: config of the authors' checkpoint.
        rows: rows of its embedding, and so the id of `<image>`.

    Raises:
        FileNotFoundError: there is no `tokenizer_config.json`.
        EmmaError: a tokenizer with more tokens than the embedding has rows.
    """
    # From a folder of its own: beside the authors' config.json Transformers would look for their model class.
    with tempfile.TemporaryDirectory() as folder:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, Path(folder) / name)
        path = source / "tokenizer_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{source} lacks tokenizer_config.json. Fetch the tokenizer's files, too.")
        values = read_json(path)
        # Rows of a batch must end together to be continued; the authors pad on the right, for training.
        values["padding_side"] = "left"
        # The length of training; that of a base model's own file can be larger.
        values["model_max_length"] = authors.get("tokenizer_model_max_length") or values.get("model_max_length")
        is_byte_level = not (source / "tokenizer.model").is_file() and (source / "merges.txt").is_file()
        values.setdefault("tokenizer_class", "Qwen2Tokenizer" if is_byte_level else "LlamaTokenizer")
        if "Llama" in values["tokenizer_class"]:
            # The defaults of the Transformers version that the authors use.
            values.setdefault("legacy", True)
            values.setdefault("add_bos_token", True)
        write_json(Path(folder) / "tokenizer_config.json", values)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if "legacy" in values:
        tokenizer.init_kwargs["legacy"] = values["legacy"]
    # As the authors' training does where a base model's tokenizer has none.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    # An embedding can have more rows than the tokenizer has tokens: the rows in between get reserved names.
    tokenizer.add_tokens([f"<reserved_{index}>" for index in range(len(tokenizer), rows)], special_tokens=True)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    if image_token_id != rows:
        raise EmmaError(
            f"`<image>` must be the id after the embedding's {rows} rows: the tokenizer gives it {image_token_id}. Is "
            "this the tokenizer of this checkpoint?"
        )
    return tokenizer


def instruction_tokenizer(source: Path, clip: Path) -> Any:
    """The instruction encoder's tokenizer, from the authors' checkpoint or else from CLIP's."""
    return load_instruction_tokenizer(source / BPE_NAME if (source / BPE_NAME).is_file() else clip)


def write_authors_tokenizers(source: Path, folder: Path) -> None:
    """Write both tokenizers of a model that is saved in `source` to `folder`, as the authors' code reads them."""
    shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    values = read_json(source / "tokenizer_config.json")
    special_tokens = ("bos_token", "eos_token", "unk_token", "pad_token")
    kept = ("add_bos_token", "add_eos_token", *special_tokens, "model_max_length", "legacy")
    values = {name: values[name] for name in kept if name in values}
    write_json(
        folder / "tokenizer_config.json", {**values, "padding_side": "right", "tokenizer_class": "LlamaTokenizer"}
    )
    write_json(folder / "special_tokens_map.json", {name: values[name] for name in special_tokens if name in values})
    write_merges(AutoTokenizer.from_pretrained(source / "instruction_tokenizer"), folder / BPE_NAME)
