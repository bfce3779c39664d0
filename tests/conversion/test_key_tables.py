"""Renaming by the tables, and that the tables of the two ways are inverse to each other."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import weights

from emma_hf import EmmaError
from emma_hf.conversion import key_tables
from emma_hf.conversion.key_tables import rename_keys, select_and_rename
from emma_hf.storage.tensors import MemoryTensor


def named(*names: str) -> dict[str, MemoryTensor]:
    return {name: MemoryTensor(torch.tensor(float(number))) for number, name in enumerate(names)}


def test_the_first_pattern_that_matches_a_complete_name_decides():
    tensors = named("a.1", "a.skip", "b")
    table = {r"a\.skip": None, r"a\.(.+)": r"new.\1", "b": "c"}
    renamed = rename_keys(tensors, table, Path("folder"))
    assert renamed == {"new.1": tensors["a.1"], "c": tensors["b"]}
    with pytest.raises(EmmaError, match="folder holds a weight that no key table knows: 'b.x'"):
        rename_keys(named("b.x"), table, Path("folder"))


def test_only_what_matches_is_selected():
    tensors = named("a.1", "b", "ab")
    assert select_and_rename(tensors, {r"a\.(.+)": r"\1", "b": "c"}) == {"1": tensors["a.1"], "c": tensors["b"]}


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ("LANGUAGE_MODEL_KEYS", "model.layers.3.self_attn.rotary_emb.inv_freq"),
        ("LANGUAGE_MODEL_KEYS", "model.vision_tower.text_projection.weight"),
        ("CLIP_KEYS", "vision_model.embeddings.position_ids"),
        ("CLIP_KEYS", "text_model.embeddings.position_ids"),
        ("CLIP_KEYS", "logit_scale"),
        ("CLIP_KEYS", "visual_projection.weight"),
        ("CLIP_KEYS", "text_projection.weight"),
    ],
)
def test_what_the_model_does_not_use_is_left_out(table, name):
    assert rename_keys(named(name), getattr(key_tables, table), Path("folder")) == {}


def test_each_weight_of_the_model_goes_back_to_one_file(converted):
    tensors = named(*weights(converted))
    ways = {
        name: (getattr(key_tables, name), select_and_rename(tensors, getattr(key_tables, f"REVERSE_{name}")))
        for name in ("LANGUAGE_MODEL_KEYS", "FUSION_KEYS", "CLIP_KEYS")
    }
    assert sum(len(back) for _, back in ways.values()) == len(tensors)
    again = {}
    for table, back in ways.values():
        again |= rename_keys(back, table, Path("folder"))
    assert again == tensors
