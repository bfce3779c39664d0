"""Attention by sub-model, kernels of the Hub, a static cache with compiled decoding: no option changes an answer."""

import importlib.util
import json

import pytest
import torch
from support.models import tiny_inputs, tiny_model
from transformers.generation import CompileConfig
from transformers.utils.import_utils import is_kernels_available

from emma_hf import EmmaForConditionalGeneration
from emma_hf.model.compat_emma import TRANSFORMERS_5

FAMILIES = ("vision_config", "instruction_config", "text_config")


@torch.no_grad()
def logits_of(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


# Transformers compiles this attention when it first runs.
@pytest.mark.slow
@pytest.mark.parametrize("part", [*FAMILIES, "all"])
def test_flex_attention_by_part_gives_the_logits_of_eager(part):
    model = tiny_model()
    inputs = tiny_inputs(model, (2, 1, 0))
    model.set_attn_implementation("eager")
    expected = logits_of(model, inputs)
    chosen = dict.fromkeys(FAMILIES if part == "all" else [part], "flex_attention")
    model.set_attn_implementation(chosen)
    parts = (model.model.vision_tower, model.model.instruction_encoder, model.model.language_model)
    found = [module.config._attn_implementation for module in parts]
    assert found == [chosen.get(name, "eager") for name in FAMILIES]
    torch.testing.assert_close(logits_of(model, inputs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_instruction_encoder_stays_causal_under_flex_attention():
    model = tiny_model()
    model.set_attn_implementation({"instruction_config": "flex_attention"})
    ids = tiny_inputs(model)["instruction_input_ids"]
    changed = ids.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % model.config.instruction_config.vocab_size
    with torch.no_grad():
        one, other = (model.get_instruction_features(given) for given in (ids, changed))
    torch.testing.assert_close(one[:, :40], other[:, :40])
    assert not torch.allclose(one[:, 40:], other[:, 40:], atol=1e-2)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")
@pytest.mark.parametrize("route", ["from_pretrained", "set"])
def test_flash_attention_that_is_not_installed_says_so(converted, route):
    def choose() -> None:
        if route == "set":
            tiny_model().set_attn_implementation("flash_attention_2")
        else:
            EmmaForConditionalGeneration.from_pretrained(converted, attn_implementation="flash_attention_2")

    with pytest.raises(ImportError, match="FlashAttention2 has been toggled on.*install"):
        choose()


@pytest.mark.skipif(not TRANSFORMERS_5, reason="Transformers 4.57 imports kernels and says so itself")
@pytest.mark.skipif(is_kernels_available(), reason="kernels is installed")
def test_kernels_of_the_hub_without_their_package_say_so(converted):
    with pytest.raises(ValueError, match=r"Kernels are not available\. Please install a compatible version"):
        EmmaForConditionalGeneration.from_pretrained(converted, use_kernels=True)


NORM = """
import torch

CALLS = []


class CountedRMSNorm(torch.nn.Module):
    can_torch_compile = True
    has_backward = True
    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states):
        CALLS.append(hidden_states.shape)
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
"""


@pytest.mark.skipif(
    not TRANSFORMERS_5 or not is_kernels_available(),
    reason="needs Transformers 5 and the version of kernels that it asks for",
)
def test_a_local_kernel_is_called_in_the_language_model(tmp_path):
    from kernels import LocalLayerRepository, Mode, use_kernel_mapping

    folder = tmp_path / "counted-norm" / "build" / "torch-cpu"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("from . import layers\n")
    (folder / "layers.py").write_text(NORM)
    metadata = {"name": "counted-norm", "id": "counted_norm", "version": 1, "license": "Apache-2.0"}
    metadata |= {"python-depends": [], "backend": {"type": "cpu"}}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    repository = LocalLayerRepository(tmp_path / "counted-norm", layer_name="CountedRMSNorm")
    model = tiny_model()
    inputs = tiny_inputs(model)
    expected = logits_of(model, inputs)
    with use_kernel_mapping({"RMSNorm": {"cpu": {Mode.INFERENCE: repository}}}, inherit_mapping=False):
        model.set_use_kernels(True)
    assert model.use_kernels
    norm = model.model.language_model.norm
    calls = norm.forward.__func__.__globals__["CALLS"]
    torch.testing.assert_close(logits_of(model, inputs), expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2 * model.config.text_config.num_hidden_layers + 1
    # CLIP's norms are not the language model's, and stay.
    bound = {name: vars(module).get("forward") for name, module in model.named_modules()}
    changed = [name for name, forward in bound.items() if forward and forward.__globals__.get("CALLS") is calls]
    assert len(changed) == len(calls)
    assert all(name.startswith("model.language_model.") for name in changed)


@pytest.mark.slow
def test_compiled_decoding_with_a_static_cache_compiles_once():
    from torch._dynamo.utils import counters

    model = tiny_model(text={"max_position_embeddings": 256})
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    # On a GPU `generate` compiles by itself; elsewhere only if told.
    everywhere = CompileConfig()
    everywhere._compile_all_devices = True
    torch.compiler.reset()
    counters.clear()
    # The longest first: a longer prompt would need a larger cache.
    for seed, (images, words) in enumerate([((2,), 14), ((1,), 8), ((0,), 11), ((2,), 9), ((1,), 23)]):
        inputs = tiny_inputs(model, images, seed=seed, words=words)
        settings = {"max_new_tokens": 6, "do_sample": False}
        expected = model.generate(**inputs, **settings)
        found = model.generate(**inputs, **settings, cache_implementation="static", compile_config=everywhere)
        assert found.tolist() == expected.tolist()
        assert counters["stats"]["unique_graphs"] == 1, f"recompiled at prompt {seed}"
    assert counters["frames"]["ok"] == 1
    assert not counters["graph_break"]
