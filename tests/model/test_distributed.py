"""Several processes: one whose batch has no picture takes part in every step, and changes nothing."""

import re

import pytest
import torch
from safetensors import safe_open
from support.models import tiny_inputs, tiny_model
from support.processes import WITH_SUPPORT, run_python

from emma_hf.model.compat_emma import TRANSFORMERS_5
from emma_hf.training import prepare

STEP = """
import os, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from support.models import tiny_inputs, tiny_model
from emma_hf.training import prepare

output, engines = sys.argv[1], sys.argv[2:]
# A fork has imported what this process has.
child = os.fork()
rank = int(child == 0)
meeting = f"file://{output}/meeting"
# Without a part for every process in every step they would wait for ever; this time is the test.
dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=100))
for engine in engines:
    model = prepare(tiny_model(), "finetune").train()
    # The second process has text alone.
    inputs = tiny_inputs(model, images=(1, 2) if rank == 0 else (0, 0), words=10 if rank == 0 else 42)
    if engine == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        # As `Trainer` and accelerate wrap: the layers of every tower, then the rest. CLIP stays frozen.
        layers = ("LlamaDecoderLayer", "CLIPEncoderLayer", "EmmaModalityAdaptation")
        for module in list(model.modules()):
            if type(module).__name__ in layers:
                fully_shard(module)
        wrapped = fully_shard(model)
    for _ in range(2):
        wrapped.zero_grad()
        loss = wrapped(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            grads[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    wrapped.eval()
    with torch.no_grad():
        logits = wrapped(**inputs).logits
    if rank == 0:
        torch.save(grads, f"{output}/{engine}.pt")
    print(f"{engine} rank {rank} loss {loss.item():.6f} finite {bool(logits.isfinite().all())}")
dist.destroy_process_group()
if child:
    sys.exit(os.waitpid(child, 0)[1] != 0)
"""


def test_a_process_without_a_picture_does_not_stop_the_others(tmp_path):
    engines = ["ddp", "fully_shard"]
    done = run_python(STEP, tmp_path, *engines, PYTHONPATH=WITH_SUPPORT)
    assert done.returncode == 0, done.stderr
    # The lines of two processes can run into each other.
    said = re.findall(r"(\w+) rank (\d) loss [\d.]+ finite True", done.stdout)
    assert sorted(said) == [(engine, rank) for engine in engines for rank in "01"], done.stdout

    model = prepare(tiny_model(), "finetune").train()
    losses = []
    for images, words in (((1, 2), 10), ((0, 0), 42)):
        inputs = tiny_inputs(model, images=images, words=words)
        losses.append(model(**inputs, labels=inputs["input_ids"]).loss)
    (sum(losses) / 2).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for engine in engines:
        grads = torch.load(tmp_path / f"{engine}.pt", weights_only=True)
        assert grads.keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(
                grads[name], grad, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_one_process_reads_no_black_picture(monkeypatch):
    model = prepare(tiny_model(), "finetune").train()
    inputs = tiny_inputs(model, images=(0,), words=20)
    monkeypatch.setattr(model.model, "get_vision_features", lambda *args: pytest.fail("a picture was read"))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad is None


def test_what_is_not_seen_changes_no_bit(monkeypatch):
    model = tiny_model().train()
    inputs = tiny_inputs(model, images=(0, 0), words=20)
    alone = model(**inputs).logits
    with torch.no_grad():
        # Not even where the black picture would be no number.
        model.model.multi_modal_projector.linear_2.bias.fill_(float("nan"))
    monkeypatch.setattr("emma_hf.model.modeling_emma.requires_synced_forward", lambda model: True)
    together = model(**inputs).logits
    assert torch.equal(alone, together)
    together.sum().backward()
    for parameter in model.model.modality_adaptation.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.skipif(not TRANSFORMERS_5, reason="4.57 keeps no rules of renaming")
def test_rules_that_renamed_nothing_are_not_undone_on_saving(tmp_path):
    from transformers.core_model_loading import WeightRenaming

    # What ZeRO-3 leaves behind on loading: undone, it would put another `model.` into the names.
    model = tiny_model()
    expected = set(model.state_dict())
    model._weight_conversions = [WeightRenaming(r"^model\.language_model\.model", "model.language_model")]
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {name for name in expected if "language_model" in name} <= names


def test_no_weight_is_looked_at_before_its_module_runs(monkeypatch):
    # Under ZeRO-3 a look gathers the weight, and the processes that have a picture do not look there.
    model = prepare(tiny_model(), "finetune").train()
    monkeypatch.setattr("emma_hf.model.modeling_emma.requires_synced_forward", lambda model: True)
    projector = model.model.multi_modal_projector
    running, early = [False], []
    projector.register_forward_pre_hook(lambda *args: running.__setitem__(0, True))
    look, linear = torch.nn.Module.__getattr__, projector.linear_1

    def watched(module, name):
        if module is linear and name in ("weight", "bias") and not running[0]:
            early.append(name)
        return look(module, name)

    monkeypatch.setattr(torch.nn.Module, "__getattr__", watched)
    inputs = tiny_inputs(model, images=(0,), words=20)
    model(**inputs, labels=inputs["input_ids"])
    assert running == [True]
    assert not early
