"""Names of weights in the authors' files, in CLIP's and in this package's: the tables, and renaming by them."""

import re
from collections.abc import Mapping
from pathlib import Path

from ..model.errors_emma import EmmaError
from ..storage.tensors import StoredTensor

# A table maps patterns of complete names to new names. The first pattern that matches decides, so a special rule stands
# above a general one. Weights whose new name is None are left out on purpose.
LANGUAGE_MODEL_KEYS = {
    # A table that old checkpoints store and every Transformers computes.
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": None,
    # Stale copies: the authors' loader takes the towers from CLIP and the fusion weights from vision_tower.bin.
    r"model\.vision_tower\..+": None,
    r"model\.(embed_tokens|norm|layers)\.(.+)": r"model.language_model.\1.\2",
    r"model\.mm_projector\.0\.(weight|bias)": r"model.multi_modal_projector.linear_1.\1",
    r"model\.mm_projector\.2\.(weight|bias)": r"model.multi_modal_projector.linear_2.\1",
    r"lm_head\.weight": r"lm_head.weight",
}
FUSION_KEYS = {
    # The frozen towers, where the state dict of all of `vision_tower` was saved: they come from CLIP.
    r"(?:model\.vision_tower\.)?(?:vision_tower|text_encoder)\..+": None,
    r"(?:model\.vision_tower\.)?text_projection\.(weight|bias)": r"model.modality_adaptation.instruction_projection.\1",
    r"(?:model\.vision_tower\.)?image_text_infusion\.(weight|bias)": r"model.modality_adaptation.visual_alignment.\1",
    r"(?:model\.vision_tower\.)?learnable_tokens": r"model.modality_adaptation.visual_offset",
}
CLIP_KEYS = {
    r"(?:vision|text)_model\.embeddings\.position_ids": None,
    # CLIP's contrastive head.
    r"logit_scale|(?:visual|text)_projection\.weight": None,
    r"vision_model\.(.+)": r"model.vision_tower.vision_model.\1",
    r"text_model\.(.+)": r"model.instruction_encoder.text_model.\1",
}
# From this package's names back to the three files. Each weight of the model is in one of them.
REVERSE_LANGUAGE_MODEL_KEYS = {
    r"model\.language_model\.(.+)": r"model.\1",
    r"model\.multi_modal_projector\.linear_1\.(.+)": r"model.mm_projector.0.\1",
    r"model\.multi_modal_projector\.linear_2\.(.+)": r"model.mm_projector.2.\1",
    r"lm_head\.weight": r"lm_head.weight",
}
REVERSE_FUSION_KEYS = {
    r"model\.modality_adaptation\.instruction_projection\.(.+)": r"model.vision_tower.text_projection.\1",
    r"model\.modality_adaptation\.visual_alignment\.(.+)": r"model.vision_tower.image_text_infusion.\1",
    r"model\.modality_adaptation\.visual_offset": r"model.vision_tower.learnable_tokens",
}
REVERSE_CLIP_KEYS = {
    r"model\.vision_tower\.(vision_model\..+)": r"\1",
    r"model\.instruction_encoder\.(text_model\..+)": r"\1",
}


def rename_keys(
    tensors: Mapping[str, StoredTensor], table: Mapping[str, str | None], source: Path
) -> dict[str, StoredTensor]:
    """The tensors under their new names.

    Args:
        source: file or folder of the tensors, for the error.

    Raises:
        EmmaError: a name that no pattern of the table matches.
    """
    renamed = {}
    for name, tensor in tensors.items():
        pattern = next((pattern for pattern in table if re.fullmatch(pattern, name)), None)
        if pattern is None:
            raise EmmaError(
                f"{source} holds a weight that no key table knows: {name!r}. Is it a checkpoint of the authors' code?"
            )
        replacement = table[pattern]
        if replacement is not None:
            renamed[re.sub(pattern, replacement, name)] = tensor
    return renamed


def select_and_rename(tensors: Mapping[str, StoredTensor], table: Mapping[str, str]) -> dict[str, StoredTensor]:
    """The tensors whose names a pattern of the table matches, under their new names."""
    return {
        re.sub(pattern, replacement, name): tensor
        for name, tensor in tensors.items()
        for pattern, replacement in table.items()
        if re.fullmatch(pattern, name)
    }
