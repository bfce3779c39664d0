"""When the kernels compute the modality adaptation, and that it changes nothing.

Tests that need the kernels run on CUDA where there is one, and in Triton's interpreter where `TRITON_INTERPRET=1` is
set (`make test-kernels`).
"""

from functools import partial

import pytest
import torch
from support.kernel_marks import DEVICE, needs_cuda, needs_kernels
from support.models import tiny_config, tiny_inputs, tiny_model
from torch import nn

from emma_hf import EmmaForConditionalGeneration
from emma_hf.model import fused_alignment as fused
from emma_hf.model import fusion_emma
from emma_hf.model.modeling_emma import EmmaModalityAdaptation


@pytest.fixture
def available(monkeypatch):
    """As on a machine whose kernels run on every device; the operations are their references where there is none."""
    monkeypatch.setattr(fusion_emma, "triton", fused.triton or object())
    monkeypatch.setattr(fusion_emma, "_device_runs_kernels", lambda kind, index: True)


def adaptation(dtype: torch.dtype = torch.float32, implementation: str = "auto", **kwargs) -> EmmaModalityAdaptation:
    torch.manual_seed(0)
    module = EmmaModalityAdaptation(tiny_config(fusion_implementation=implementation, **kwargs))
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0, 0.2)
    return module.to(dtype)


def features(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """V and H of two pictures, in the sizes of `tiny_config`."""
    generator = torch.Generator().manual_seed(0)
    v, h = torch.randn(2, 16, 32, generator=generator), torch.randn(2, 77, 16, generator=generator)
    return v.to(device), h.to(device)


@pytest.mark.skipif(fused.INTERPRETED, reason="the kernels run on a CPU here")
def test_auto_is_eager_on_a_cpu(monkeypatch):
    monkeypatch.setattr("emma_hf.model.modeling_emma.fused_adaptation", lambda *args: pytest.fail("the kernels ran"))
    module = adaptation()
    v, h = features()
    expected = torch.cat([v, nn.functional.gelu(module.instruction_projection(h))], 1).transpose(1, 2)
    expected = nn.functional.linear(expected, module.visual_alignment.weight, module.visual_alignment.bias)
    assert torch.equal(module(v, h), expected.transpose(1, 2))


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_the_module_compiles_whole(available, fuse, offset):
    module = adaptation(implementation="auto" if fuse else "eager", visual_offset=offset)
    v, h = features()
    v.requires_grad_()
    plain = adaptation(implementation="eager", visual_offset=offset)
    plain(v, h).square().sum().backward()
    expected = [v.grad.clone(), *(parameter.grad for parameter in plain.parameters())]
    v.grad = None
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(v, h), plain(v, h))
    compiled(v, h).square().sum().backward()
    for found, exact in zip([v.grad, *(parameter.grad for parameter in module.parameters())], expected):
        torch.testing.assert_close(found, exact, atol=1e-4, rtol=1e-4)
    assert any(fused.NAMESPACE in target for target in targets) == fuse


def test_an_exported_program_does_not_need_the_kernels(available):
    program = torch.export.export(adaptation(), features())
    assert fused.NAMESPACE not in str(program.graph)


@needs_kernels
@pytest.mark.parametrize("dtype", fused.DTYPES, ids=str)
def test_auto_does_not_change_an_answer(dtype):
    model = tiny_model(visual_offset=True).to(DEVICE, dtype)
    inputs = {name: value.to(DEVICE) for name, value in tiny_inputs(model, images=(1, 2)).items()}
    exact = tiny_model(visual_offset=True, fusion_implementation="eager").to(dtype).double()
    truth = exact(**{name: value.cpu() for name, value in inputs.items()}).logits
    # Its own layers are rounded to the dtype in both, and only the part between them differs.
    errors = []
    for implementation in ("eager", "auto"):
        model.config.fusion_implementation = implementation
        with torch.no_grad():
            errors.append((model(**inputs).logits.cpu().double() - truth).norm().item())
    assert errors[1] <= 1.1 * errors[0]
    assert errors[1] != errors[0]


@needs_kernels
def test_gradient_checkpointing():
    module, (v, h) = adaptation(implementation="triton").to(DEVICE), features(DEVICE)
    grads = []
    for again in (False, True):
        module.zero_grad()
        run = partial(torch.utils.checkpoint.checkpoint, module, use_reentrant=False) if again else module
        out = run(v, h)
        out.square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads))


@needs_kernels
def test_autocast_is_heeded():
    module, (v, h) = adaptation(implementation="triton").to(DEVICE), features(DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = module(v, h)
        module.config.fusion_implementation = "eager"
        plain = module(v, h)
    assert out.dtype == plain.dtype == torch.bfloat16
    exact = module.double()(v.double(), h.double())
    assert (out - exact).norm() <= 2 * (plain - exact).norm()
    out.square().sum().backward()
    assert module.visual_alignment.weight.grad.isfinite().all()


@needs_cuda
def test_capture_in_a_graph():
    module, (v, h) = adaptation(torch.bfloat16, "triton").to(DEVICE), features(DEVICE)
    v, h = v.bfloat16(), h.bfloat16()
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        module(v, h)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(v, h)
        for scale in (1, 2):
            v.mul_(scale)
            graph.replay()
            assert torch.equal(out, module(v, h))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_on_a_gpu(dtype):
    module, (v, h) = adaptation(dtype, "triton").to(DEVICE), features(DEVICE)
    expected = module(v, h)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(v, h), expected)


class Unsafe(nn.Parameter):
    """Stands for the weight of a quantizer, which is a class of its own."""


def wrapped_by_peft(module: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["instruction_projection"], r=2), module)


def quantized_by_bitsandbytes(module: nn.Module) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    module.instruction_projection = bitsandbytes.nn.Linear8bitLt(16, 32)


def with_quantized_weight(module: nn.Module) -> None:
    module.instruction_projection.weight = Unsafe(module.instruction_projection.weight.data)


def hooked(module: nn.Module) -> None:
    module.visual_alignment.register_forward_hook(lambda *args: None)


def offloaded(module: nn.Module) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(module.visual_alignment, ModelHook())


def in_float64(module: nn.Module) -> None:
    module.double()


def elsewhere(module: nn.Module) -> None:
    module.visual_alignment.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            wrapped_by_peft,
            r"`instruction_projection` must be a plain Linear: got peft\.[\w.]+\.Linear; merge or unwrap it",
        ),
        (
            quantized_by_bitsandbytes,
            r"must be a plain Linear: got bitsandbytes\.[\w.]+\.Linear8bitLt; merge or unwrap it",
        ),
        (with_quantized_weight, "`instruction_projection` must have plain weights: got Unsafe; load it unquantized"),
        (hooked, r"`visual_alignment` must be called for its hooks \(offloading, ZeRO-3, yours\); remove them"),
        (offloaded, r"`visual_alignment` must be called for its hooks \(offloading, ZeRO-3, yours\); remove them"),
        (in_float64, "float32, float16 or bfloat16: `instruction_projection` has torch.float64; convert them"),
        (elsewhere, "weights and features must be on one device: `visual_alignment` is on meta; move it"),
    ],
)
def test_what_cannot_be_fused(available, change, message):
    module, (v, h) = adaptation(), features()
    assert fusion_emma.should_use_kernels("auto", module, v, h)
    change(module)
    assert not fusion_emma.should_use_kernels("auto", module, v, h)
    with pytest.raises(ValueError, match=f"fusion_implementation='triton' cannot run: .*{message}; or use 'auto'"):
        fusion_emma.should_use_kernels("triton", module, v, h)


def test_auto_with_an_adapter_is_eager(available):
    module, (v, h) = adaptation(), features()
    wrapped_by_peft(module)
    expected = fused.visual_alignment_reference(
        v, nn.functional.gelu(module.instruction_projection(h)), *module.visual_alignment.parameters()
    )
    assert torch.equal(module(v, h), expected)


@pytest.mark.skipif(fused.INTERPRETED, reason="the kernels run on a CPU here")
def test_a_wrong_device_is_named(monkeypatch):
    monkeypatch.setattr(fusion_emma, "triton", fused.triton or object())
    module = adaptation(implementation="triton")
    with pytest.raises(
        ValueError, match="needs a CUDA device of compute capability 8.0 or newer, and the features are on cpu; move"
    ):
        module(*features())


def test_features_on_two_devices_are_named(available):
    v, h = features()
    with pytest.raises(ValueError, match="both features must be on one device: got cpu and meta"):
        fusion_emma.should_use_kernels("triton", adaptation(), v, h.to("meta"))


def test_a_missing_package_is_named_before_any_weight_is_made(monkeypatch):
    monkeypatch.setattr(fusion_emma, "triton", None)
    monkeypatch.setattr("emma_hf.model.modeling_emma.EmmaVisionTower", None)
    message = r"needs the package triton, which is not installed: install it with `pip install \"emma-hf\[kernels\]\"`"
    with pytest.raises(ImportError, match=message):
        EmmaForConditionalGeneration(tiny_config(fusion_implementation="triton"))
    assert not fusion_emma.should_use_kernels("auto", adaptation(), *features())
