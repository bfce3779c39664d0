"""Stages: what they train, bit for bit, and their errors."""

import copy

import pytest
import torch
from support.models import tiny_inputs, tiny_model
from transformers import TrainingArguments

from emma_hf.training import LORA_TARGETS, STAGES, parameter_groups, prepare

FUSION = {
    "modality_adaptation.instruction_projection.weight",
    "modality_adaptation.instruction_projection.bias",
    "modality_adaptation.visual_alignment.weight",
    "modality_adaptation.visual_alignment.bias",
    "multi_modal_projector.linear_1.weight",
    "multi_modal_projector.linear_1.bias",
    "multi_modal_projector.linear_2.weight",
    "multi_modal_projector.linear_2.bias",
}


def moved_by_a_step(model) -> set[str]:
    """Names of the weights that a step of training changed, in any bit."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    inputs = tiny_inputs(model, images=(1, 2), words=10)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, 1e-2))
    model.train()
    # Twice: LoRA's first matrix has no gradient until the second has moved.
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def test_pretraining_moves_projector_and_adaptation_alone():
    model = prepare(tiny_model(), "pretrain")
    assert moved_by_a_step(model) == {f"model.{name}" for name in FUSION}


def test_finetuning_moves_everything_but_clip():
    model = prepare(tiny_model(), "finetune")
    towers = ("model.vision_tower.", "model.instruction_encoder.")
    expected = {name for name, _ in model.named_parameters() if not name.startswith(towers)}
    assert moved_by_a_step(model) == expected
    assert {f"model.{name}" for name in FUSION} < expected


def test_a_learned_offset_freezes_what_the_authors_freeze():
    model = prepare(tiny_model(visual_offset=True), "pretrain")
    expected = {f"model.{name}" for name in FUSION if name.startswith("multi_modal_projector")}
    assert moved_by_a_step(model) == expected | {"model.modality_adaptation.visual_offset"}


def test_lora_moves_its_adapter_and_the_fusion_alone():
    model = prepare(tiny_model(), "lora", lora_r=4, lora_alpha=8)
    moved = moved_by_a_step(model)
    adapter = {name for name in moved if "lora_" in name}
    assert len(adapter) == 3 * 7 * 2
    assert all(".language_model.layers." in name for name in adapter)
    saved = {
        f"base_model.model.model.{module}.modules_to_save.default.{weight}"
        for module, weight in (name.split(".", 1) for name in FUSION)
    }
    assert moved - adapter == saved


def test_frozen_towers_keep_no_activations():
    model = prepare(tiny_model(), "pretrain").train()
    inputs = tiny_inputs(model)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        features = model.get_vision_features(inputs["pixel_values"])
        instruction = model.get_instruction_features(inputs["instruction_input_ids"])
    assert not kept
    assert not features.requires_grad
    assert not instruction.requires_grad


def test_the_fusion_has_a_rate_of_its_own():
    model = prepare(tiny_model(), "finetune")
    groups = parameter_groups(model, 2e-4, 2e-5, weight_decay=0.1, decays=lambda name: not name.endswith("bias"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = {}
    for group in groups:
        for parameter in group["params"]:
            seen[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    assert set(seen) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, (rate, decay) in seen.items():
        assert rate == (2e-5 if name.removeprefix("model.") in FUSION else 2e-4), name
        assert decay == (0.0 if name.endswith("bias") else 0.1), name


def test_the_authors_hyper_parameters():
    rates = {
        name: (stage.learning_rate, stage.projector_learning_rate, stage.batch_size) for name, stage in STAGES.items()
    }
    assert rates == {
        "pretrain": (1e-3, 1e-3, 256),
        "finetune": (2e-5, 2e-5, 128),
        "lora": (2e-4, 2e-5, 128),
        "qlora": (2e-4, 2e-5, 128),
    }
    assert STAGES["pretrain"].template == "plain"
    args = TrainingArguments(output_dir="unused", report_to="none", **STAGES["lora"].training_arguments())
    assert (args.learning_rate, args.lr_scheduler_type, args.weight_decay) == (2e-4, "cosine", 0.0)
    assert args.get_warmup_steps(1000) == 30


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("sft", {}, "must be one of 'pretrain', 'finetune', 'lora', 'qlora': got 'sft'"),
        ("qlora", {}, "needs a quantized model: got one in full precision"),
        (
            "lora",
            {"lora_targets": "query"},
            r"'query' matches none. They are called like 'model.language_model.layers.0",
        ),
        ("lora", {"lora_targets": ["q_proj"]}, r"CLIP stays frozen: \['q_proj'\] also matches 'model.vision_tower"),
    ],
)
def test_stages_that_cannot_be_are_refused(stage, options, message):
    model = tiny_model()
    before = copy.deepcopy([parameter.requires_grad for parameter in model.parameters()])
    with pytest.raises(ValueError, match=message):
        prepare(model, stage, **options)
    if stage != "lora":
        assert before == [parameter.requires_grad for parameter in model.parameters()]


def test_nothing_to_train_is_said():
    model = tiny_model().requires_grad_(False)
    with pytest.raises(ValueError, match="No weight of this model is trained. Call"):
        parameter_groups(model, 1e-3, 1e-3)


def test_the_targets_are_the_language_models():
    import re

    matched = [name for name, _ in tiny_model().named_modules() if re.fullmatch(LORA_TARGETS, name)]
    assert len(matched) == 3 * 7
    assert all(name.startswith("model.language_model.layers.") for name in matched)
