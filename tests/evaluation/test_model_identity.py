"""Two models are told apart by what decides their answers."""

import shutil

from safetensors.torch import load_file, save_file

from emma_hf.evaluation.model_identity import model_hash


def test_another_weight_or_setting_is_another_model(converted, tmp_path):
    found = model_hash(converted)
    copy = shutil.copytree(converted, tmp_path / "copy")
    (copy / "evaluation.json").write_text("{}")
    assert model_hash(copy) == found
    (weights,) = copy.glob("*.safetensors")
    tensors = load_file(weights)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, weights, {"format": "pt"})
    assert model_hash(copy) != found
    shutil.copy(converted / weights.name, weights)
    assert model_hash(copy) == found
    (copy / "generation_config.json").write_text("{}")
    assert model_hash(copy) != found
