"""Which model answered: a hash that tells two models apart without reading all their weights."""

import hashlib
from pathlib import Path

# Besides each file's header and size, so many blocks spread over it: weights of the same shapes differ in them.
BLOCKS, BLOCK_BYTES = 64, 4096
# What decides an answer beside the weights; other files of a folder may change.
SETTINGS = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "tokenizer_config.json",
)


def model_hash(folder: Path) -> str:
    """SHA-256 of a model's settings, its weights' index, and of each weight file its size and blocks spread over it.

    Args:
        folder: of a converted model.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for path in sorted({*(folder / name for name in SETTINGS), *folder.glob("*.safetensors.index.json")}):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\0".encode())
        with open(path, "rb") as file:
            for block in range(BLOCKS):
                file.seek(max(0, size - BLOCK_BYTES) * block // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]


__all__ = ["model_hash"]
