"""The weights of a folder, and changes to the authors' checkpoint."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from emma_hf.conversion import convert


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def converted_from(authors: Path, output: Path, **kwargs) -> Path:
    return convert(authors, output, clip=authors / "clip", progress=False, **kwargs)


def edit(path: Path, **changes) -> None:
    """Change the values of a JSON file; `...` removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
