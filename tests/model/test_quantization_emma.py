"""4-bit and 8-bit loading: what is quantized, saved exactly, trained, merged, and refused."""

import re
import shutil

import pytest
import torch
from support.checkpoints import edit
from support.models import LANGUAGE_LINEARS, kept_features, logits_around, tiny_config, tiny_model
from torch import nn
from transformers import BitsAndBytesConfig

from emma_hf import EMMA_TINY, EmmaError, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.cli import main
from emma_hf.conversion import convert
from emma_hf.model import quantization_emma
from emma_hf.model.compat_emma import TRANSFORMERS_5
from emma_hf.model.quantization_emma import NOT_QUANTIZED, bitsandbytes_config, check_quantizable
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.evaluation import answers
from emma_hf.tiny.scenes import Scene

bitsandbytes = pytest.importorskip("bitsandbytes")

QUANTIZERS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "int8 without outliers": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
FOUR_BIT = ("nf4", "nf4, double", "fp4")


def load(name: str, folder=EMMA_TINY, **values) -> EmmaForConditionalGeneration:
    config = BitsAndBytesConfig(**{**QUANTIZERS[name], "bnb_4bit_compute_dtype": torch.bfloat16, **values})
    return EmmaForConditionalGeneration.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def inputs():
    processor = EmmaProcessor.from_pretrained(EMMA_TINY)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the star?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(images=draw(Scene.random(3)), text=prompt, return_tensors="pt")


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def quantized_modules(model) -> set[str]:
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_linears_of_the_language_model_are_quantized_and_nothing_else(name):
    model = load(name)
    linears = {
        key
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(LANGUAGE_LINEARS, key)
    }
    assert len(linears) == 42
    assert quantized_modules(model) == linears
    for key, weight in model.named_parameters():
        if key.removesuffix(".weight") in linears:
            assert weight.dtype == (torch.uint8 if name in FOUR_BIT else torch.int8), key
        else:
            assert weight.dtype == torch.bfloat16, key


def test_a_list_of_the_user_is_added_to():
    model = load("nf4", llm_int8_skip_modules=["down_proj", "lm_head"])
    assert not any("down_proj" in name for name in quantized_modules(model))
    assert len(quantized_modules(model)) == 36
    skipped = model.config.quantization_config.llm_int8_skip_modules
    assert skipped[:2] == ["down_proj", "lm_head"]
    assert set(skipped) == {"down_proj", *NOT_QUANTIZED}
    assert len(skipped) == len(set(skipped))


def test_the_config_of_the_caller_is_left_as_it_was():
    config = BitsAndBytesConfig(load_in_8bit=True)
    EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, quantization_config=config)
    assert config.llm_int8_skip_modules is None


@pytest.mark.parametrize("values", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_shorthands_and_dictionaries_are_configs(values, inputs):
    expected = EmmaForConditionalGeneration.from_pretrained(
        EMMA_TINY, quantization_config=BitsAndBytesConfig(**values), dtype=torch.bfloat16
    )
    short = EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, **values, dtype=torch.bfloat16)
    written = {**values, "quant_method": "bitsandbytes"}
    spelt = EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, quantization_config=written, dtype=torch.bfloat16)
    for model in (short, spelt):
        assert quantized_modules(model) == quantized_modules(expected)
        assert torch.equal(logits(model, inputs), logits(expected, inputs))


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a forward pass"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_saving_is_exact(name, ran, tmp_path, inputs):
    """Also after a forward pass, in which bitsandbytes arranges 4-bit weights anew on some CPUs."""
    model = load(name)
    stored = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    before = logits(model, inputs) if ran else None
    model.save_pretrained(tmp_path / "once")
    again = EmmaForConditionalGeneration.from_pretrained(tmp_path / "once", dtype="auto")
    assert quantized_modules(again) == quantized_modules(model)
    found = {key: value for key, value in again.state_dict().items() if isinstance(value, torch.Tensor)}
    assert found.keys() == stored.keys()
    for key, value in stored.items():
        assert value.dtype == found[key].dtype, key
        assert torch.equal(value, found[key]), key
    after = logits(again, inputs)
    assert torch.equal(after, logits(model, inputs))
    assert before is None or torch.equal(after, before)
    again.save_pretrained(tmp_path / "twice")
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("once", "twice")]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", FOUR_BIT)
def test_weights_that_ran_are_dequantized_as_they_were_loaded(name, inputs):
    fresh, ran = load(name).dequantize(), load(name)
    logits(ran, inputs)
    ran = ran.dequantize()
    assert not quantized_modules(ran)
    for (key, weight), expected in zip(ran.named_parameters(), fresh.parameters()):
        assert torch.equal(weight, expected), key


def test_another_bitsandbytes_arranges_nothing(monkeypatch, inputs):
    monkeypatch.setattr(quantization_emma, "_exact_linear", lambda: None)
    model = load("nf4, double")
    before = model.state_dict()["model.language_model.layers.0.mlp.up_proj.weight.absmax"].clone()
    logits(model, inputs)
    state = model.model.language_model.layers[0].mlp.up_proj.weight.quant_state
    assert not getattr(state, "packing_format_for_cpu", False)
    assert torch.equal(state.absmax, before)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_an_adapter_learns_after_an_evaluation(name, inputs):
    """The arrangement for fast reading has no gradient."""
    peft = pytest.importorskip("peft")
    from emma_hf.training import LORA_TARGETS

    def gradients(evaluate: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = peft.get_peft_model(
            load(name), peft.LoraConfig(r=4, target_modules=LORA_TARGETS, init_lora_weights=False)
        )
        if evaluate:
            logits(model, inputs)
        model.train()
        model(**inputs, labels=inputs["input_ids"].clamp(max=599)).loss.backward()
        return {key: weight.grad for key, weight in model.named_parameters() if weight.requires_grad}

    expected, found = gradients(False), gradients(True)
    assert len(expected) == 84
    assert all(grad is not None and grad.abs().max() > 0 for grad in expected.values())
    for key, grad in expected.items():
        assert torch.equal(found[key], grad), key


@pytest.mark.parametrize("name", FOUR_BIT)
def test_merging_after_an_evaluation_is_merging(name, inputs):
    peft = pytest.importorskip("peft")
    from emma_hf.training import LORA_TARGETS

    def merged(evaluate: bool):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            load(name), peft.LoraConfig(r=4, target_modules=LORA_TARGETS, init_lora_weights=False)
        )
        if evaluate:
            logits(model, inputs)
        return model.merge_and_unload()

    expected, found = merged(False), merged(True)
    for (key, weight), other in zip(found.state_dict().items(), expected.state_dict().values()):
        assert not isinstance(weight, torch.Tensor) or torch.equal(weight, other), key


@pytest.mark.parametrize(
    "values", [{"load_in_4bit": True}, {"load_in_8bit": True}, {"quant_method": "gptq", "bits": 4}]
)
def test_a_config_that_calls_unquantized_weights_quantized_is_named(trainable, tmp_path, values):
    folder = shutil.copytree(trainable, tmp_path / "copy")
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", **values})
    if not TRANSFORMERS_5 and "load_in_8bit" in values:
        # This version quantizes them.
        loaded = EmmaForConditionalGeneration.from_pretrained(folder)
        assert type(loaded.model.language_model.layers[0].mlp.up_proj.weight).__name__ == "Int8Params"
        return
    message = "The weights must be quantized as config.json says: .*copy has `model.* in torch.float32. If the"
    if not TRANSFORMERS_5:
        message = "Each weight must be stored in the form that the config says: .*copy lacks some .* If the weights are"
    if "bits" in values:
        message = "Quantized weights need the package of their method: .*copy asks for one that is not installed"
    with pytest.raises(EmmaError, match=message):
        EmmaForConditionalGeneration.from_pretrained(folder)


def test_sizes_that_cannot_be_packed_are_named(tmp_path):
    config = tiny_config()
    EmmaForConditionalGeneration(config).save_pretrained(tmp_path)
    message = (
        "4-bit loading needs layers whose sizes are multiples of 64: `model.language_model.layers.0.self_attn.q_proj` has "
        f"{config.text_config.hidden_size} inputs and"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        EmmaForConditionalGeneration.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )


def test_shorthand_and_config_together_are_refused():
    with pytest.raises(ValueError, match="short for a `quantization_config`: got both"):
        EmmaForConditionalGeneration.from_pretrained(
            EMMA_TINY, load_in_8bit=True, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_ask_quantizes(bits, tmp_path, capfd):
    picture = tmp_path / "scene.png"
    draw(Scene.random(3)).save(picture)
    assert main(["ask", "--quantization", bits, str(picture), "What colour is the star?"]) == 0
    said = capfd.readouterr().out.strip()
    model = EmmaForConditionalGeneration.from_pretrained(
        EMMA_TINY, quantization_config=bitsandbytes_config(bits), dtype="auto"
    )
    processor = EmmaProcessor.from_pretrained(EMMA_TINY)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the star?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=draw(Scene.random(3)), text=prompt, return_tensors="pt")
    ids = model.eval().generate(**inputs.to(torch.bfloat16), max_new_tokens=20, do_sample=False)
    assert said == processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_a_quantized_conversion_loads_quantized(reference, tmp_path):
    source = [reference / "original", tmp_path / "out", reference / "original" / "clip"]
    with pytest.raises(ValueError, match="sizes are multiples of 64"):
        convert(*source, quantization="4bit", progress=False)
    # Nothing is left of what failed.
    assert not list(tmp_path.iterdir())
    convert(*source, quantization="8bit", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model = EmmaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    assert len(quantized_modules(model)) == 7 * model.config.text_config.num_hidden_layers
    EmmaProcessor.from_pretrained(tmp_path / "out")


def test_a_missing_package_names_the_extra(monkeypatch):
    config = BitsAndBytesConfig(load_in_4bit=True)
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda **_: False)
    with pytest.raises(ImportError, match=re.escape('Install it with `pip install "emma-hf[quantization]"`')):
        EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, quantization_config=config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "--quantization", "3bit", "PHOTO", "Who?"], "`quantization` must be 4bit or 8bit: got '3bit'."),
        (["convert", "a", "b", "--reverse", "--quantization", "4bit"], "The authors' layout has no quantized form"),
    ],
)
def test_mistakes_are_told(arguments, message, photo, capsys):
    assert main([str(photo) if word == "PHOTO" else word for word in arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nf4, double", "int8"])
def test_every_way_to_generate(name, inputs):
    model = load(name).eval()
    greedy = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **greedy)
    for options in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**inputs, **greedy, **options), expected), options
    assistant = EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, dtype=torch.bfloat16).eval()
    assert torch.equal(model.generate(**inputs, **greedy, assistant_model=assistant), expected)
    # After "ASSISTANT:" the prompt's own "USER:" is found, and behind it the picture, which must not be proposed.
    assert torch.equal(model.generate(**inputs, **greedy, prompt_lookup_num_tokens=2), expected)
    features = {"vision_features": model.get_vision_features(inputs["pixel_values"].bfloat16())}
    words = {key: value for key, value in inputs.items() if key != "pixel_values"}
    assert torch.equal(model.generate(**words, **features, **greedy), expected)
    sampled = []
    for _ in range(2):
        torch.manual_seed(1)
        sampled.append(model.generate(**inputs, max_new_tokens=6, do_sample=True, temperature=3.0))
    assert torch.equal(*sampled)
    beams = model.generate(**inputs, **greedy, num_beams=3, return_dict_in_generate=True, output_scores=True)
    assert torch.isfinite(beams.sequences_scores).all()


@pytest.mark.parametrize("name", ["nf4, double", "int8"])
def test_fewer_visual_tokens(name):
    prompt = "USER: <image>\nWhat colour is the star? ASSISTANT:"
    processor = EmmaProcessor.from_pretrained(EMMA_TINY, visual_tokens=12)
    inputs = processor(images=draw(Scene.random(3)), text=prompt, return_tensors="pt")
    model = load(name).eval()
    with torch.no_grad():
        expected = kept_features(model, inputs, 12)
        model.config.visual_tokens = 12
        outputs = model(**inputs)
        assert (outputs.image_hidden_states - expected).norm() < 0.01 * expected.norm()
        assert torch.equal(outputs.logits, logits_around(model, inputs, outputs.image_hidden_states))


@pytest.mark.parametrize("name", ["nf4, double", "int8"])
def test_padded_rows_answer_like_single_ones(name):
    processor, model = EmmaProcessor.from_pretrained(EMMA_TINY), load(name).eval()
    scenes = [Scene.random(seed) for seed in range(4)]
    asked = [(scene, text) for scene, text in zip(scenes, ("How many things are there?", "Describe the picture.") * 2)]
    assert answers(model, processor, asked) == [answers(model, processor, [one])[0] for one in asked]


def test_a_device_map_places_it():
    model = EmmaForConditionalGeneration.from_pretrained(
        EMMA_TINY, quantization_config=bitsandbytes_config("4bit"), device_map={"": "cpu"}
    )
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}
    assert len(quantized_modules(model)) == 42


@pytest.mark.parametrize(
    ("entry", "left"),
    [
        ("model.language_model.layers.0.mlp.gate_proj", True),
        ("model.language_model.layers.0.mlp", True),
        ("gate_proj", True),
        # Inside the path: 4.57 finds it there, 5 does not.
        ("mlp", not TRANSFORMERS_5),
        # A regular expression in 5 alone.
        (r"model\.language_model\.layers\.\d+\.mlp", TRANSFORMERS_5),
        ("model.language_model.layers.1", False),
    ],
)
def test_an_entry_of_the_skip_list_counts_as_this_version_matches_it(entry, left):
    # The others can be packed; one of these layers cannot.
    model = tiny_model(text={"hidden_size": 64, "intermediate_size": 96})
    for layer in model.model.language_model.layers[1:]:
        layer.mlp = torch.nn.Identity()
    others = [f"model.language_model.layers.0.mlp.{name}" for name in ("up_proj", "down_proj")]
    config = {"load_in_4bit": True, "llm_int8_skip_modules": [*others, entry]}
    if left:
        check_quantizable(model.model.language_model, config)
    else:
        with pytest.raises(ValueError, match=r"multiples of 64: `model.language_model.layers.0.mlp.gate_proj`"):
            check_quantizable(model.model.language_model, config)


def test_layers_are_found_whatever_a_language_model_calls_them():
    text = {"model_type": "opt", "hidden_size": 64, "ffn_dim": 96, "word_embed_proj_dim": 64, "vocab_size": 120}
    model = tiny_model(text=text)
    with pytest.raises(ValueError, match=r"multiples of 64: `model.language_model.decoder.layers.0.fc1`"):
        check_quantizable(model.model.language_model, {"load_in_4bit": True})
