"""The code files that travel next to the weights, and the classes that `trust_remote_code` loads from them."""

import os
import shutil
from pathlib import Path

# Every Python file that travels. A Hub folder is flat: each of these imports only its siblings, torch, transformers,
# safetensors, numpy and Pillow; anything else is imported in a `try` in the file that uses it.
HUB_FILES = (
    "configuration_emma.py",
    "modeling_emma.py",
    "processing_emma.py",
    "image_processing_emma.py",
    "instruction_emma.py",
    "batches_emma.py",
    "chat_template_emma.py",
    "clip_towers_emma.py",
    "code_files_emma.py",
    "compat_emma.py",
    "errors_emma.py",
    "fused_alignment.py",
    "fusion_emma.py",
    "image_encoding_emma.py",
    "language_models_emma.py",
    "loading_emma.py",
    "quantization_emma.py",
    "token_selection_emma.py",
)

# `AutoModelForVision2Seq` exists in Transformers 4.57 alone, `AutoModelForMultimodalLM` in 5 alone; a version does not
# read the names that it does not know.
AUTO_MAP = {
    "AutoConfig": "configuration_emma.EmmaConfig",
    "AutoModel": "modeling_emma.EmmaModel",
    "AutoModelForImageTextToText": "modeling_emma.EmmaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_emma.EmmaForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_emma.EmmaForConditionalGeneration",
    "AutoProcessor": "processing_emma.EmmaProcessor",
    "AutoImageProcessor": "image_processing_emma.EmmaImageProcessor",
}


def copy_code_files(folder: str | os.PathLike) -> None:
    """Copy into `folder` the code files that lie beside this one.

    In the package these are all `HUB_FILES`; in a process that loaded a model from the Hub, the files that its model
    or processor needed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in HUB_FILES:
        source = Path(__file__).with_name(name)
        if source.exists() and source.parent.resolve() != folder.resolve():
            shutil.copyfile(source, folder / name)


__all__ = ["AUTO_MAP", "HUB_FILES", "copy_code_files"]
