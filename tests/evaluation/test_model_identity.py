"""Two models are told apart by what decides their answers."""

import shutil

from emma_hf.evaluation.model_identity import model_hash


def test_another_weight_or_setting_is_another_model(converted, tmp_path):
    found = model_hash(converted)
    copy = shutil.copytree(converted, tmp_path / "copy")
    (copy / "evaluation.json").write_text("{}")
    assert model_hash(copy) == found
    (weights,) = copy.glob("*.safetensors")
    # Other values in tensors of the same names and shapes.
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 :] = bytes(byte ^ 1 for byte in content[len(content) // 2 :])
    weights.write_bytes(content)
    assert model_hash(copy) != found
    shutil.copy(converted / weights.name, weights)
    assert model_hash(copy) == found
    (copy / "generation_config.json").write_text("{}")
    assert model_hash(copy) != found
