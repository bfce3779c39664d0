"""torchao's quantization. It lies apart from the tests' environments, where every import of Transformers would import it."""

import importlib.util
import re

import pytest
import torch
from support.models import LANGUAGE_LINEARS, kept_features, logits_around
from transformers import TorchAoConfig

from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.model.compat_emma import TRANSFORMERS_5
from emma_hf.tiny import Scene, draw

torchao = pytest.importorskip("torchao.quantization", reason="needs torchao: `make test-torchao`")


def load(**options) -> EmmaForConditionalGeneration:
    return EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_the_linears_of_the_language_model_are_quantized_and_nothing_else(kind, tmp_path):
    processor = EmmaProcessor.from_pretrained(EMMA_TINY)
    inputs = processor(images=draw(Scene.random(3)), text="USER: <image>\nWhich? ASSISTANT:", return_tensors="pt")
    whole = load()
    model = load(quantization_config=TorchAoConfig(getattr(torchao, kind)()))
    found = {name for name, weight in model.named_parameters() if type(weight).__name__ == "Int8Tensor"}
    expected = {name for name, _ in whole.named_parameters() if re.fullmatch(LANGUAGE_LINEARS + r"\.weight", name)}
    assert len(found) == 42
    assert found == expected
    assert {weight.dtype for name, weight in model.named_parameters() if name not in found} == {torch.bfloat16}
    with torch.no_grad():
        before, after = whole.eval()(**inputs).logits, model.eval()(**inputs).logits
    assert 0 < (after - before).abs().max() < 0.05 * before.abs().max()
    if not TRANSFORMERS_5:
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    again = EmmaForConditionalGeneration.from_pretrained(tmp_path, dtype="auto").eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, after)


def test_fewer_visual_tokens():
    processor = EmmaProcessor.from_pretrained(EMMA_TINY, visual_tokens=12)
    inputs = processor(images=draw(Scene.random(3)), text="USER: <image>\nWhich? ASSISTANT:", return_tensors="pt")
    model = load(quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig()), visual_tokens=12).eval()
    with torch.no_grad():
        outputs = model(**inputs)
        expected = kept_features(load().eval(), inputs, 12)
        assert (outputs.image_hidden_states - expected).norm() < 0.01 * expected.norm()
        assert torch.equal(outputs.logits, logits_around(model, inputs, outputs.image_hidden_states))


def test_what_torchao_cannot_run_here_is_told():
    if torch.cuda.is_available() or importlib.util.find_spec("mslk"):
        pytest.skip("here it can")
    config = TorchAoConfig(torchao.Int4WeightOnlyConfig(group_size=64))
    with pytest.raises((ValueError, ImportError), match="A quantization must be one that|Requires mslk"):
        load(quantization_config=config)
