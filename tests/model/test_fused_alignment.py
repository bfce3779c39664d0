"""The kernels against float64.

They run on CUDA where there is one, and in Triton's interpreter where `TRITON_INTERPRET=1` is set (`make test-kernels`).
Everything else runs everywhere.
"""

import importlib.util
import re
import sys

import pytest
import torch
from support.kernel_marks import CUDA, DEVICE, needs_kernels

from emma_hf.model import fused_alignment as fused

NAMES = ("F", "grad V", "grad H", "grad Wp", "grad bp", "grad Wa", "grad ba")
REFERENCE = (fused.instruction_projection_reference, fused.visual_alignment_reference)
KERNELS = (fused.instruction_projection, fused.visual_alignment)

# images, N, T, vision width, instruction width
SIZES = [(1, 1, 1, 1, 1), (2, 16, 7, 24, 16), (1, 66, 65, 70, 33), (3, 5, 77, 17, 80)]
REAL = [(1, 576, 77, 1024, 768), (2, 600, 130, 1100, 800)]


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that is not written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def operands(size: tuple[int, ...], dtype: torch.dtype, device: str = DEVICE) -> list[torch.Tensor]:
    """V, H, Wp, bp, Wa, ba and the gradient of F; V and H are parts of longer sequences, as in the model."""
    images, visual, instruction, width, width_in = size
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    return [
        within_poison(normal(images, visual, width)),
        within_poison(normal(images, instruction, width_in)),
        normal(width, width_in, scale=width_in**-0.5),
        normal(width),
        normal(visual, visual + instruction, scale=(visual + instruction) ** -0.5),
        normal(visual),
        normal(images, visual, width),
    ]


def within_poison(tokens: torch.Tensor) -> torch.Tensor:
    """The same tokens, with NaN before, behind and beside them in memory."""
    images, count, width = tokens.shape
    around = tokens.new_full((images, count + 2, width + 2), torch.nan)
    inside = around[:, 1:-1, 1:-1]
    inside.copy_(tokens)
    return inside


def run(operations, tensors: list[torch.Tensor], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """F and the six gradients."""
    project, align = operations
    *leaves, upstream = [tensor.detach().to(dtype or tensor.dtype) for tensor in tensors]
    v, h, wp, bp, wa, ba = leaves = [leaf.requires_grad_() for leaf in leaves]
    out = align(v, project(h, wp, bp), wa, ba)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def assert_as_exact_as_eager(tensors: list[torch.Tensor]) -> None:
    """Against float64 at most twice eager's error; where few numbers leave that to luck, one rounding besides."""
    dtype = tensors[0].dtype
    truth = run(REFERENCE, [tensor.cpu() for tensor in tensors], torch.float64)
    eager, ours = run(REFERENCE, tensors), run(KERNELS, tensors)
    for name, exact, plain, found in zip(NAMES, truth, eager, ours):
        assert (found.dtype, found.shape) == (dtype, exact.shape), name
        allowed, error = ((value.cpu().double() - exact).norm().item() for value in (plain, found))
        luck = torch.finfo(dtype).eps * exact.norm().item() if exact.numel() < 64 else 0
        assert error <= 2 * allowed + luck, f"{name}: {error} against {allowed} of eager"


@needs_kernels
@pytest.mark.parametrize("dtype", fused.DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_output_and_gradients(size, dtype):
    assert_as_exact_as_eager(operands(size, dtype))


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("dtype", fused.DTYPES, ids=str)
@pytest.mark.parametrize("size", REAL, ids=str)
def test_output_and_gradients_of_real_sizes(size, dtype, monkeypatch):
    if not CUDA:
        # The interpreter's time goes by the number of blocks.
        for name in ("FLOAT32_BLOCKS", "SMALL_BLOCKS", "LARGE_BLOCKS"):
            monkeypatch.setattr(fused, name, fused.Blocks(256, 512, 128, warps=8, stages=2))
    assert_as_exact_as_eager(operands(size, dtype))


@needs_kernels
def test_sums_in_several_parts(monkeypatch):
    # One program for each two steps, the last with one.
    monkeypatch.setattr(fused, "STEPS", 2)
    assert_as_exact_as_eager(operands((5, 4, 3, 40, 2), torch.float32))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(dtype):
    v, h, wp, bp, wa, ba, grad = operands((2, 18, 9, 20, 6), dtype)
    turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (v, h)]
    doubled = [torch.stack([bias, bias], -1)[:, 0] for bias in (bp, ba)]
    turned_weights = [weight.t().contiguous().t() for weight in (wp, wa)]
    tensors = [*turned, turned_weights[0], doubled[0], turned_weights[1], doubled[1], grad.transpose(1, 2).mT]
    assert not any(tensor.is_contiguous() for tensor in tensors[:-1])
    plain = run(KERNELS, [v, h, wp, bp, wa, ba, grad])
    for name, one, other in zip(NAMES, run(KERNELS, tensors), plain):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")
    # The gradient of a sum is one number, spread without memory.
    tensors[-1] = torch.ones((), dtype=dtype, device=DEVICE).expand_as(grad)
    assert_as_exact_as_eager(tensors)


@needs_kernels
def test_nothing_beside_an_operand_is_read():
    v, _, _, _, wa, ba, grad = operands((2, 6, 5, 7, 1), torch.float32)
    p, grad = within_poison(torch.randn_like(v[:, :5])), within_poison(grad)
    wa, bias = within_poison(wa[None])[0], within_poison(ba[None, :, None])[0, :, 0]
    leaves = [leaf.requires_grad_() for leaf in (v, p, wa, bias)]
    ours = fused.visual_alignment(*leaves)
    plain = fused.visual_alignment_reference(*leaves)
    torch.testing.assert_close(ours, plain)
    for one, other in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(plain, leaves, grad)):
        torch.testing.assert_close(one, other)


@needs_kernels
def test_a_gradient_that_is_not_needed_is_not_computed(monkeypatch):
    v, h, wp, bp, wa, ba, grad = operands((1, 4, 3, 5, 2), torch.float32)
    monkeypatch.setattr(fused, "_weight_gradient", lambda *args: pytest.fail("a frozen weight's gradient"))
    wp.requires_grad_()
    calls = []
    product = fused._token_product
    monkeypatch.setattr(fused, "_token_product", lambda *args: (calls.append(args[1]), product(*args))[1])
    fused.visual_alignment(v, fused.instruction_projection(h, wp, bp), wa, ba).backward(grad)
    # F has 4 rows. Of the tokens only the 3 of the instruction lead to a weight that learns.
    assert calls == [4, 3]
    assert wp.grad is not None
    assert bp.grad is None


@needs_kernels
def test_the_same_bits_each_time():
    tensors = operands((3, 20, 9, 40, 12), torch.bfloat16)
    for one, other in zip(run(KERNELS, tensors), run(KERNELS, tensors)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [*fused.DTYPES, torch.float64], ids=str)
def test_no_picture(dtype):
    out, *grads = run(KERNELS, operands((0, 4, 3, 5, 2), dtype, "cpu"))
    assert out.shape == (0, 4, 5)
    assert all(grad.dtype == dtype and not grad.any() for grad in grads)


@pytest.mark.slow
def test_the_operations_are_well_made():
    v, h, wp, bp, wa, ba, grad = [tensor.cpu() for tensor in operands((2, 5, 3, 4, 2), torch.float32)]
    leaves = [tensor.clone().requires_grad_() for tensor in (v, h, wp, bp, wa, ba)]
    projected = fused.instruction_projection_reference(h, wp, bp)
    cases = [
        (fused.instruction_projection, (leaves[1], leaves[2], leaves[3])),
        (fused.visual_alignment, (leaves[0], projected.requires_grad_(), leaves[4], leaves[5])),
        (fused.gelu_gradient, (torch.randn_like(projected).detach(), h, wp, bp)),
        (fused.token_gradient, (grad, wa, 5, 8)),
        (fused.weight_gradient, (grad, v, projected.detach())),
    ]
    for operation, arguments in cases:
        # What has no gradient of its own need not be traced with one.
        differentiable = arguments[-1].requires_grad if isinstance(arguments[-1], torch.Tensor) else False
        checks = ("test_schema", "test_faketensor")
        checks += ("test_autograd_registration", "test_aot_dispatch_dynamic") if differentiable else ()
        assert set(torch.library.opcheck(operation, arguments, test_utils=checks).values()) == {"SUCCESS"}


def test_gradients_by_finite_differences():
    v, h, wp, bp, wa, ba, _ = operands((2, 4, 3, 5, 2), torch.float64, "cpu")
    leaves = [tensor.clone().requires_grad_() for tensor in (v, h, wp, bp, wa, ba)]

    def both(v, h, wp, bp, wa, ba):
        return fused.visual_alignment(v, fused.instruction_projection(h, wp, bp), wa, ba)

    assert torch.autograd.gradcheck(both, leaves)


def test_forward_mode_is_refused():
    # PyTorch would give a derivative of zero.
    v, h, wp, bp, wa, ba, _ = operands((2, 4, 3, 5, 2), torch.float64, "cpu")
    projected = fused.instruction_projection_reference(h, wp, bp)
    cases = [
        (lambda h: fused.instruction_projection(h, wp, bp), h),
        (lambda v: fused.visual_alignment(v, projected, wa, ba), v),
        (lambda wa: fused.visual_alignment(v, projected, wa, ba), wa),
        (lambda grad: fused.gelu_gradient(grad, h, wp, bp), projected),
        (lambda grad: fused.token_gradient(grad, wa, 0, 4), v),
        (lambda grad: fused.weight_gradient(grad, v, projected), v),
    ]
    for function, value in cases:
        with pytest.raises(ValueError, match="derivatives in reverse mode alone"):
            torch.func.jvp(function, (value,), (torch.ones_like(value),))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="fusion_implementation='eager'"):
            function(torch.autograd.forward_ad.make_dual(value, torch.ones_like(value)))
        function(value)
    compiled = torch.compile(lambda v: torch.func.jvp(cases[1][0], (v,), (v,)), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError):
        compiled(v)


@pytest.mark.parametrize(
    ("module", "namespace"),
    [("some-model", "emma_hf_model_some_model"), ("模型", "emma_hf_model_u6a21_u578b_"), ("é", "emma_hf_model_ue9_")],
)
def test_two_copies_of_the_file_live_side_by_side(module, namespace):
    # The installed one, and one under another name, as `trust_remote_code` brings it.
    tensors = operands((1, 3, 2, 4, 2), torch.float32, "cpu")
    expected = run(KERNELS, tensors)
    spec = importlib.util.spec_from_file_location(f"emma_hf.model.{module}", fused.__file__)
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy
    try:
        spec.loader.exec_module(copy)
        assert copy.NAMESPACE == namespace != fused.NAMESPACE
        for operations in ((copy.instruction_projection, copy.visual_alignment), KERNELS):
            for one, other in zip(run(operations, tensors), expected):
                assert torch.equal(one, other)
    finally:
        del sys.modules[spec.name]


@pytest.mark.skipif(
    fused.triton is None or fused.INTERPRETED or sys.platform != "linux",
    reason="needs triton, not interpreted, whose compiler needs no GPU (make test-kernels)",
)
@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 64])
def test_the_compiler_makes_what_was_meant(images, monkeypatch, tmp_path):
    """For a GPU that is not there: tensor cores, weights read sixteen bytes at a time, no register spilled."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = []

    def compile_only(kernel, programs, blocks, *arguments, **constants):
        constants.update(UPCAST=False, ROWS=blocks.rows, COLUMNS=blocks.columns, DEPTH=blocks.depth)
        signature, values, attributes = {}, {}, {}
        arguments = iter(arguments)
        for place, name in enumerate(kernel.arg_names):
            value = constants[name] if name in constants else next(arguments)
            if isinstance(value, torch.Tensor):
                signature[name] = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[value.dtype]
            elif name in constants or value == 1:
                signature[name], values[(place,)] = "constexpr", value
            else:
                signature[name] = "i32"
            if isinstance(value, torch.Tensor) or (signature[name] == "i32" and value % 16 == 0):
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
        for architecture, instruction in ((80, "mma.sync"), (90, "wgmma.mma_async")):
            target = GPUTarget("cuda", architecture, 32)
            code = fused.triton.compile(source, target=target, options=options)
            compiled.append((kernel.fn.__name__, architecture))
            assert instruction in code.asm["ptx"], compiled[-1]
            assert "cp.async.cg.shared.global" in code.asm["ptx"], compiled[-1]
            # A piece of 4 or 8 bytes, as of rows that are not aligned, has another name.
            assert not re.search(r"cp\.async\.ca|ld\.local|st\.local", code.asm["ptx"]), compiled[-1]

    monkeypatch.setattr(fused, "_launch", compile_only)
    monkeypatch.setattr(fused, "_in_kernels", lambda tensor: True)
    with torch.device("meta"):
        v = torch.empty(images, 577, 1024, dtype=torch.bfloat16)[:, 1:]
        h = torch.empty(images, 77, 768, dtype=torch.bfloat16)
        wp, bp = torch.empty(1024, 768, dtype=torch.bfloat16), torch.empty(1024, dtype=torch.bfloat16)
        wa, ba = torch.empty(576, 653, dtype=torch.bfloat16), torch.empty(576, dtype=torch.bfloat16)
    p = fused._projection(h, wp, bp)
    fused._projection(h, wp, bp, p)
    wa = fused._aligned(wa)
    f = fused._token_product(wa, 576, v, p, ba)
    fused._token_product(wa[:, 576:].t(), 77, f)
    fused._weight_gradient(f, v, p)
    assert len(compiled) == 10
