"""Liger's kernels in EMMA: which parts they reach, and loss and gradients against the plain ones.

Those that Triton's interpreter can run do so where `TRITON_INTERPRET=1` is set; of the norms and the MLPs, which it
cannot run, the tests see there that they are called. On CUDA everything runs.
"""

import copy
import importlib.util
import os
import sys

import pytest
import torch
from support.models import tiny_inputs, tiny_model
from support.rows import save_rows
from torch import nn
from transformers import TrainingArguments
from transformers.models.llama import modeling_llama

from emma_hf.data import ConversationDataset, DataCollator
from emma_hf.integrations.liger import apply_liger_kernel_to_emma, register_with_liger
from emma_hf.training import prepare
from emma_hf.training.trainer import EmmaTrainer

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
INSTALLED = importlib.util.find_spec("liger_kernel") is not None and importlib.util.find_spec("triton") is not None
needs_liger = pytest.mark.skipif(
    not INSTALLED or not (CUDA or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs liger-kernel and triton, and a CUDA device or TRITON_INTERPRET=1 (make test-kernels)",
)
# What runs on this device.
RUNNING = {} if CUDA else {"rms_norm": False, "swiglu": False}
# The interpreter takes seconds for the rotations of a step; not every test needs them.
QUICK = RUNNING if CUDA else {**RUNNING, "rope": False}


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Liger's change of the function that all Llama models share ends with the test."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)


def batch_of(model: nn.Module, words: int = 11) -> dict[str, torch.Tensor]:
    """Rows with two, one and no pictures; labels with ignored stretches, the last token of a row among the learned."""
    inputs = tiny_inputs(model, images=(2, 1, 0), words=words)
    labels = inputs["input_ids"].clone()
    labels[labels == model.config.image_token_index] = -100
    labels[:, :3] = -100
    labels[1, -4:-2] = -100
    return {name: value.to(DEVICE) for name, value in {**inputs, "labels": labels}.items()}


def gradients(model: nn.Module, **batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    # Not one: the gradient from above takes part.
    (loss * 0.7).backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: tuple, other: tuple) -> None:
    torch.testing.assert_close(one[0], other[0], atol=1e-6, rtol=1e-5)
    assert one[1].keys() == other[1].keys()
    assert "lm_head.weight" in one[1]
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, atol=1e-5, rtol=1e-4)


def plain_linear_loss(hidden_states, head, labels, num_items_in_batch=None, **kwargs):
    logits = head.weight @ hidden_states[:, :-1].flatten(0, 1).T
    total = nn.functional.cross_entropy(logits.T, labels[:, 1:].flatten(), reduction="sum")
    return total / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)


@pytest.mark.parametrize("items", [None, 40])
def test_a_linear_loss_replaces_the_logits_in_training_only(items):
    model = tiny_model().to(DEVICE).train()
    batch = batch_of(model)
    more = {} if items is None else {"num_items_in_batch": torch.tensor(items, device=DEVICE)}
    expected = gradients(model, **batch, **more)
    model.linear_loss = plain_linear_loss
    called = []
    model.lm_head.register_forward_hook(lambda *args: called.append(args))
    assert_same(expected, gradients(model, **batch, **more))
    assert model(**batch).logits is None
    assert not called
    assert model(**batch, skip_logits=False).logits is not None
    assert called
    called.clear()
    model.eval()
    outputs = model(**batch, **more)
    assert outputs.logits.shape[:2] == batch["input_ids"].shape
    assert called
    torch.testing.assert_close(outputs.loss, expected[0])
    assert model(**batch, skip_logits=True).logits is None
    batch.pop("labels")
    assert model.train()(**batch).logits is not None


def test_without_liger_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    for name in [name for name in sys.modules if name.startswith("liger_kernel.")]:
        monkeypatch.delitem(sys.modules, name)
    expected = r'Liger\'s kernels need the packages liger-kernel and triton: .*`pip install "emma-hf\[liger\]"`'
    with pytest.raises(ImportError, match=expected):
        apply_liger_kernel_to_emma(tiny_model())
    with pytest.raises(ImportError, match=expected):
        register_with_liger()


def test_without_liger_training_arguments_that_ask_for_it_raise(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    for name in [name for name in sys.modules if name.startswith("liger_kernel.")]:
        monkeypatch.delitem(sys.modules, name)
    args = TrainingArguments(output_dir=str(tmp_path), use_liger_kernel=True, use_cpu=True, report_to=[])
    with pytest.raises(ImportError, match=r"emma-hf\[liger\]"):
        EmmaTrainer(model=tiny_model(), args=args)


@pytest.mark.skipif(CUDA or not INSTALLED, reason="needs liger-kernel and triton, and no GPU")
def test_without_a_gpu_nothing_is_changed(monkeypatch):
    # Triton reads the variable when it is first imported: the other tests need it as it was.
    import liger_kernel.transformers  # noqa: F401

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    model = tiny_model()
    with pytest.raises(ValueError, match="run on a GPU: there is none here"):
        apply_liger_kernel_to_emma(model)
    assert model.linear_loss is None
    assert "forward" not in vars(model.model.language_model.norm)


@needs_liger
@pytest.mark.parametrize(("family", "items"), [("llama", None), ("llama", 40), ("mistral", None), ("qwen2", 40)])
def test_loss_and_gradients_are_the_plain_ones(family, items):
    text = {"model_type": family, "num_key_value_heads": 2}
    model = tiny_model(text=text).to(DEVICE).train()
    batch = batch_of(model)
    more = {} if items is None else {"num_items_in_batch": torch.tensor(items, device=DEVICE)}
    expected = gradients(model, **batch, **more)
    shared = sys.modules[type(model.model.language_model).__module__]
    plain = shared.apply_rotary_pos_emb
    try:
        apply_liger_kernel_to_emma(model, **RUNNING)
        assert shared.apply_rotary_pos_emb is not plain
        assert_same(expected, gradients(model, **batch, **more))
        assert model(**batch).logits is None
    finally:
        shared.apply_rotary_pos_emb = plain


@needs_liger
def test_the_sum_of_the_heads_gradient_has_its_own_dtype():
    model = tiny_model(text={"vocab_size": 120}).to(DEVICE).train()
    batch = batch_of(model)
    expected = gradients(model, **batch)[1]["lm_head.weight"]
    model = model.bfloat16()
    batch = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}
    for dtype in (None, torch.float32):
        apply_liger_kernel_to_emma(model, rope=False, rms_norm=False, swiglu=False, accum_dtype=dtype)
        gradient = gradients(model, **batch)[1]["lm_head.weight"]
        assert gradient.dtype == torch.bfloat16
        assert (gradient.float() - expected).norm() < 0.05 * expected.norm()


@needs_liger
def test_norms_and_mlps_of_the_language_model_alone_are_exchanged():
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP

    model, other = tiny_model(), tiny_model()
    classes = modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP
    rotary = modeling_llama.apply_rotary_pos_emb
    apply_liger_kernel_to_emma(model)
    exchanged = {name: module for name, module in model.named_modules() if "forward" in vars(module)}
    layers = range(model.config.text_config.num_hidden_layers)
    norms = [f"layers.{layer}.{kind}_layernorm" for layer in layers for kind in ("input", "post_attention")]
    mlps = [f"layers.{layer}.mlp" for layer in layers]
    assert sorted(exchanged) == sorted(f"model.language_model.{name}" for name in [*norms, *mlps, "norm"])
    for name, module in exchanged.items():
        kind = LigerSwiGLUMLP if name.endswith("mlp") else LigerRMSNorm
        assert module.forward.__func__ is kind.forward
        if kind is LigerRMSNorm:
            assert module.variance_epsilon == model.config.text_config.rms_norm_eps
    # Another model, made before or after, has its own; the rotary function is the one thing that is shared.
    assert (modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP) == classes
    assert modeling_llama.apply_rotary_pos_emb is not rotary
    for plain in (other, tiny_model()):
        assert plain.linear_loss is None
        assert not [module for module in plain.modules() if "forward" in vars(module)]
    assert model.state_dict().keys() == other.state_dict().keys()


@needs_liger
def test_parts_can_be_left_out():
    model = tiny_model()
    rotary = modeling_llama.apply_rotary_pos_emb
    apply_liger_kernel_to_emma(model, rope=False, rms_norm=False, swiglu=False, fused_linear_cross_entropy=False)
    assert modeling_llama.apply_rotary_pos_emb is rotary
    assert model.linear_loss is None
    assert not [module for module in model.modules() if "forward" in vars(module)]


@needs_liger
def test_what_liger_cannot_compute_is_refused():
    for text, expected in (
        (
            {"hidden_act": "gelu"},
            "computes the activation 'silu' only: this language model has 'gelu'. Pass `swiglu=False`",
        ),
        ({"model_type": "gpt_neox"}, "it has no kernels for 'gpt_neox'"),
    ):
        with pytest.raises(ValueError, match=expected):
            apply_liger_kernel_to_emma(tiny_model(text=text))
    with pytest.raises(ValueError, match="must be an EmmaForConditionalGeneration, or hold one: got EmmaModel"):
        apply_liger_kernel_to_emma(tiny_model().model)


@needs_liger
@pytest.mark.parametrize("first", ["peft", "liger"])
def test_an_adapter_gets_the_plain_gradients(first):
    def adapted(before, after):
        torch.manual_seed(0)
        model = tiny_model().to(DEVICE)
        before(model)
        model = prepare(model, "lora", lora_r=2, lora_alpha=4, lora_dropout=0.0)
        after(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.sin(torch.arange(parameter.numel()) * 0.3).view_as(parameter) * 0.1)
        return model.train()

    def nothing(model):
        pass

    def kernels(model):
        apply_liger_kernel_to_emma(model, **QUICK)

    plain = adapted(nothing, nothing)
    batch = batch_of(plain)
    expected = gradients(plain, **batch)
    model = adapted(nothing, kernels) if first == "peft" else adapted(kernels, nothing)
    loss, found = gradients(model, **batch)
    torch.testing.assert_close(loss, expected[0])
    assert found.keys() == expected[1].keys()
    assert any("lora_A" in name for name in found)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
    assert model(**batch).logits is None


@needs_liger
def test_an_adapted_or_spread_head_is_refused():
    from peft import LoraConfig, get_peft_model

    model = tiny_model().to(DEVICE).train()
    batch = batch_of(model)
    apply_liger_kernel_to_emma(model, **RUNNING)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    expected = "must be a plain linear layer, whole on one device: got Linear .*`fused_linear_cross_entropy=False`"
    with pytest.raises(ValueError, match=expected):
        model(**batch)
    with pytest.raises(ValueError, match=expected):
        apply_liger_kernel_to_emma(model, **RUNNING)
    # It trains with the other kernels.
    apply_liger_kernel_to_emma(model, **RUNNING, fused_linear_cross_entropy=False)
    assert model(**batch).logits is not None


@needs_liger
def test_trainer_applies_it_and_learns_the_same(trainable, processor, reference, tmp_path):
    from emma_hf import EmmaForConditionalGeneration

    dataset = ConversationDataset(save_rows(tmp_path / "rows.json"), processor, reference / "images")
    losses = []
    for liger in (False, True):
        args = TrainingArguments(
            output_dir=str(tmp_path / str(liger)), use_liger_kernel=liger, liger_kernel_config=QUICK, max_steps=2,
            per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=1e-3, logging_steps=1,
            prediction_loss_only=True, report_to=[], save_strategy="no", use_cpu=not CUDA, dataloader_pin_memory=False,
        )  # fmt: skip
        model = prepare(EmmaForConditionalGeneration.from_pretrained(trainable, dtype=torch.float32), "finetune")
        trainer = EmmaTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            eval_dataset=[dataset[0]],
            data_collator=DataCollator(processor),
        )
        trainer.train()
        assert (model.linear_loss is not None) == liger
        history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        losses.append([*history, trainer.evaluate()["eval_loss"]])
    assert len(losses[0]) == 3
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), atol=1e-3, rtol=1e-4)


@needs_liger
def test_a_copy_has_its_own_kernels():
    model = tiny_model().to(DEVICE).train()
    apply_liger_kernel_to_emma(model)
    copied = copy.deepcopy(model)
    for layer in copied.model.language_model.layers:
        assert layer.mlp.forward.__self__ is layer.mlp
    assert copied.linear_loss is not None
