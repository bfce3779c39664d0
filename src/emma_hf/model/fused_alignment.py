"""The modality adaptation in two kernels, each beside the plain PyTorch that says what it must compute.

    P = GELU(H Wp^T + bp)     instruction projection
    F = Wa [V ; P] + ba       visual alignment, on the token axis

Plain PyTorch joins V and P, turns the result so that its tokens come last, multiplies, adds and turns back. Here the
sum over tokens runs first over those of V and then over those of P, where they lie. Everything is summed in float32
and rounded once. Backward passes use no atomics: the same inputs give the same bits.

Each operation is a `torch.library.custom_op`. On CUDA it runs in Triton. On a CPU it is the reference, or, where
`TRITON_INTERPRET=1` was set before triton was imported, what runs on CUDA in Triton's interpreter.
"""

import math
import re
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.nn import functional

from .errors_emma import EmmaError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Two copies of this file can live in one process, the installed one and one from the Hub; each has its own operations.
# A folder's name can hold any letter, of which the namespace of an operation takes the ASCII ones.
NAMESPACE = re.sub(r"\W", lambda c: "_" if c[0].isascii() else f"u{ord(c[0]):x}_", __name__, flags=re.ASCII)

# Programs that keep a GPU busy, and the fewest blocks of the sum worth a program of its own, in the gradient of Wa.
PROGRAMS = 256
STEPS = 8


class Blocks(NamedTuple):
    """What one program computes: rows x columns numbers, each a sum in steps of `depth`; and how it is run."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


FLOAT32_BLOCKS = Blocks(64, 64, 32, warps=8, stages=3)
SMALL_BLOCKS = Blocks(64, 64, 64, warps=4, stages=4)
LARGE_BLOCKS = Blocks(128, 128, 64, warps=8, stages=3)


def instruction_projection_reference(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """P (images, T, vision width) of H (images, T, instruction width): `GELU(H Wp^T + bp)`, the exact GELU."""
    return functional.gelu(functional.linear(features, weight, bias))


def visual_alignment_reference(
    vision_features: torch.Tensor, projected: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """F (images, N, width) of V (images, N, width) and P (images, T, width): `Wa [V ; P] + ba`."""
    tokens = torch.cat([vision_features, projected], dim=1)
    return functional.linear(tokens.transpose(1, 2), weight, bias).transpose(1, 2)


def visual_alignment_of_rows(
    vision_features: torch.Tensor,
    projected: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """Rows of F (images, K, width), each image its own `rows` (images, K): `Wa[S, :] [V ; P] + ba[S]`."""
    tokens = torch.cat([vision_features, projected], dim=1)
    return torch.baddbmm(bias[rows].unsqueeze(-1), weight[rows], tokens)


if triton is not None:

    @triton.jit
    def _multiply_add(a, b, total, UPCAST: tl.constexpr):
        """`total + a b`, in float32. The interpreter cannot multiply bfloat16."""
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        return tl.dot(a, b, total, input_precision="ieee")

    @triton.jit
    def _rounded(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
        """x, float32, in `dtype`. The interpreter cuts bfloat16 off, so that it is first rounded to nearest even."""
        if UPCAST and dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            bits += 0x7FFF + ((bits >> 16) & 1)
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
        return x.to(dtype)

    @triton.jit
    def _projection_kernel(
        h_ptr, w_ptr, b_ptr, grad_ptr, out_ptr,
        rows, tokens, width_in, width_out, readable_in,
        h_image, h_token, h_width, w_row, w_column, b_row, grad_image, grad_token, grad_width,
        BACKWARD: tl.constexpr, UPCAST: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        """`out = GELU(A)`, or `out = grad * GELU'(A)` where BACKWARD, with `A = H Wp^T + bp`.

        Rows are the tokens of all images; out is contiguous.
        """
        row_blocks = tl.cdiv(rows, ROWS)
        row = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(0) // row_blocks * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH)
        image = (row // tokens).to(tl.int64)
        token = row % tokens
        in_row, in_column = row < rows, column < width_out
        h_ptrs = h_ptr + (image * h_image + token * h_token)[:, None] + depth[None, :] * h_width
        w_ptrs = w_ptr + column[None, :] * w_row + depth[:, None] * w_column
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, width_in, DEPTH):
            h = tl.load(h_ptrs, mask=in_row[:, None] & (start + depth < width_in)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(start + depth < readable_in)[:, None] & in_column[None, :], other=0.0)
            total = _multiply_add(h, w, total, UPCAST)
            h_ptrs += DEPTH * h_width
            w_ptrs += DEPTH * w_column
        total += tl.load(b_ptr + column * b_row, mask=in_column, other=0.0).to(tl.float32)[None, :]
        # GELU(x) = x C(x), with the normal distribution's C; its derivative is C(x) + x c(x).
        cumulative = 0.5 * (1.0 + tl.erf(total * 0.7071067811865476))
        inside = in_row[:, None] & in_column[None, :]
        if BACKWARD:
            density = 0.3989422804014327 * tl.exp(-0.5 * total * total)
            grad_offsets = (image * grad_image + token * grad_token)[:, None] + column[None, :] * grad_width
            grad = tl.load(grad_ptr + grad_offsets, mask=inside, other=0.0).to(tl.float32)
            result = grad * (cumulative + total * density)
        else:
            result = total * cumulative
        out_ptrs = out_ptr + row.to(tl.int64)[:, None] * width_out + column[None, :]
        tl.store(out_ptrs, _rounded(result, out_ptr.dtype.element_ty, UPCAST), mask=inside)

    @triton.jit
    def _token_product_kernel(
        a_ptr, x_ptr, y_ptr, bias_ptr, out_ptr,
        rows, x_tokens, y_tokens, width, readable_rows, readable_y,
        a_row, a_token, x_image, x_token, x_width, y_image, y_token, y_width, bias_row,
        HAS_Y: tl.constexpr, UPCAST: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        """`out = A x` or, where HAS_Y, `out = A [x ; y] + bias`, for each image; out is contiguous.

        `readable_rows` and `readable_y` count the padding of A too: a multiple of 16 lets whole vectors be read.
        """
        row_blocks, column_blocks = tl.cdiv(rows, ROWS), tl.cdiv(width, COLUMNS)
        block = tl.program_id(0)
        row = block % row_blocks * ROWS + tl.arange(0, ROWS)
        column = block // row_blocks % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
        image = (block // row_blocks // column_blocks).to(tl.int64)
        depth = tl.arange(0, DEPTH)
        in_row, in_column = row < readable_rows, column < width
        a_ptrs = a_ptr + row[:, None] * a_row + depth[None, :] * a_token
        x_ptrs = x_ptr + image * x_image + depth[:, None] * x_token + column[None, :] * x_width
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, x_tokens, DEPTH):
            in_depth = start + depth < x_tokens
            a = tl.load(a_ptrs, mask=in_row[:, None] & in_depth[None, :], other=0.0)
            x = tl.load(x_ptrs, mask=in_depth[:, None] & in_column[None, :], other=0.0)
            total = _multiply_add(a, x, total, UPCAST)
            a_ptrs += DEPTH * a_token
            x_ptrs += DEPTH * x_token
        if HAS_Y:
            a_ptrs = a_ptr + row[:, None] * a_row + (x_tokens + depth)[None, :] * a_token
            y_ptrs = y_ptr + image * y_image + depth[:, None] * y_token + column[None, :] * y_width
            for start in range(0, y_tokens, DEPTH):
                a = tl.load(a_ptrs, mask=in_row[:, None] & (start + depth < readable_y)[None, :], other=0.0)
                y = tl.load(y_ptrs, mask=(start + depth < y_tokens)[:, None] & in_column[None, :], other=0.0)
                total = _multiply_add(a, y, total, UPCAST)
                a_ptrs += DEPTH * a_token
                y_ptrs += DEPTH * y_token
            total += tl.load(bias_ptr + row * bias_row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        out_ptrs = out_ptr + image * rows * width + row[:, None] * width + column[None, :]
        inside = (row < rows)[:, None] & in_column[None, :]
        tl.store(out_ptrs, _rounded(total, out_ptr.dtype.element_ty, UPCAST), mask=inside)

    @triton.jit
    def _sum_of_products(
        g_ptr, x_ptr, row, rows, token, tokens, first, last, steps, width,
        g_image, g_token, g_width, x_image, x_token, x_width,
        UPCAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        """`g x^T` summed over images and width, from step `first` to `last`; each image has `steps`."""
        depth = tl.arange(0, DEPTH)
        g_rows = g_ptr + row[:, None] * g_token
        x_rows = x_ptr + token[None, :] * x_token
        in_row, in_token = (row < rows)[:, None], (token < tokens)[None, :]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(first, last):
            image = (step // steps).to(tl.int64)
            column = step % steps * DEPTH + depth
            in_width = column < width
            g = tl.load(
                g_rows + image * g_image + column[None, :] * g_width, mask=in_row & in_width[None, :], other=0.0
            )
            x_ptrs = x_rows + image * x_image + column[:, None] * x_width
            x = tl.load(x_ptrs, mask=in_token & in_width[:, None], other=0.0)
            total = _multiply_add(g, x, total, UPCAST)
        return total

    @triton.jit
    def _weight_gradient_kernel(
        grad_ptr, v_ptr, p_ptr, out_ptr,
        visual, instruction, width, all_steps, steps, steps_each,
        grad_image, grad_token, grad_width, v_image, v_token, v_width, p_image, p_token, p_width,
        UPCAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        """One part of the sum `G [V ; P]^T` over images and width: the gradient of Wa.

        out is (parts, visual, visual + instruction), contiguous.
        """
        row_blocks, v_blocks = tl.cdiv(visual, ROWS), tl.cdiv(visual, COLUMNS)
        column_blocks = v_blocks + tl.cdiv(instruction, COLUMNS)
        block = tl.program_id(0)
        row = block % row_blocks * ROWS + tl.arange(0, ROWS)
        column_block = block // row_blocks % column_blocks
        part = block // row_blocks // column_blocks
        first = part * steps_each
        last = tl.minimum(first + steps_each, all_steps)
        if column_block < v_blocks:
            token = column_block * COLUMNS + tl.arange(0, COLUMNS)
            total = _sum_of_products(
                grad_ptr, v_ptr, row, visual, token, visual, first, last, steps, width,
                grad_image, grad_token, grad_width, v_image, v_token, v_width, UPCAST, ROWS, COLUMNS, DEPTH,
            )  # fmt: skip
            column, end = token, visual
        else:
            token = (column_block - v_blocks) * COLUMNS + tl.arange(0, COLUMNS)
            total = _sum_of_products(
                grad_ptr, p_ptr, row, visual, token, instruction, first, last, steps, width,
                grad_image, grad_token, grad_width, p_image, p_token, p_width, UPCAST, ROWS, COLUMNS, DEPTH,
            )  # fmt: skip
            column, end = visual + token, visual + instruction
        out_row = part * visual + row
        out_ptrs = out_ptr + out_row.to(tl.int64)[:, None] * (visual + instruction) + column[None, :]
        tl.store(out_ptrs, total, mask=(row < visual)[:, None] & (column < end)[None, :])

    INTERPRETED = not isinstance(_projection_kernel, triton.JITFunction)
else:
    INTERPRETED = False


def _blocks(dtype: torch.dtype, rows: int, columns: int, copies: int = 1) -> Blocks:
    """Blocks for `copies` results of rows x columns numbers: small ones where large ones would leave a GPU idle."""
    if dtype == torch.float32:
        return FLOAT32_BLOCKS
    large = math.ceil(rows / LARGE_BLOCKS.rows) * math.ceil(columns / LARGE_BLOCKS.columns) * copies
    return LARGE_BLOCKS if large >= PROGRAMS // 2 else SMALL_BLOCKS


def _launch(kernel: Any, programs: int, blocks: Blocks, *arguments: Any, **constants: bool) -> None:
    """Run a kernel on the device of its first argument, on the current stream."""
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](
            *arguments,
            **constants,
            UPCAST=INTERPRETED,
            ROWS=blocks.rows,
            COLUMNS=blocks.columns,
            DEPTH=blocks.depth,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )


def _aligned(weight: torch.Tensor) -> torch.Tensor:
    """The weight, its rows filled up with zeros where they do not all begin at a multiple of 16 bytes.

    Rows of 653 numbers, the released model's, could only be read one by one.
    """
    if weight.stride(1) == 1 and weight.stride(0) * weight.element_size() % 16 == 0:
        return weight
    return functional.pad(weight, (0, -weight.shape[1] % 16))


def has_forward_derivatives() -> bool:
    """Whether derivatives are computed in forward mode (`torch.func.jvp`, `jacfwd`).

    A custom operation has no rule for them, and PyTorch then takes them for zero without a word.
    """
    return forward_ad._current_level >= 0


def refuse_forward_derivatives() -> None:
    """Raise `EmmaError` in forward-mode differentiation."""
    if has_forward_derivatives():
        raise EmmaError(
            "The fused operations have derivatives in reverse mode alone: got a call inside `torch.func.jvp` or "
            "another forward mode. Use fusion_implementation='eager', or the `…_reference` functions."
        )


def _in_kernels(tensor: torch.Tensor) -> bool:
    """Whether the kernels compute this, not the reference. An empty result needs none."""
    refuse_forward_derivatives()
    return (tensor.is_cuda or INTERPRETED) and tensor.dtype in DTYPES and tensor.numel() > 0


def _projection(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor | None = None
) -> torch.Tensor:
    """GELU(A), or `grad * GELU'(A)` where there is a `grad`, with `A = H Wp^T + bp`: (images, T, vision width)."""
    (images, tokens, width_in), width_out = features.shape, weight.shape[0]
    weight = _aligned(weight)
    out = features.new_empty(images, tokens, width_out)
    blocks = _blocks(features.dtype, images * tokens, width_out)
    upstream = out if grad is None else grad
    programs = math.ceil(images * tokens / blocks.rows) * math.ceil(width_out / blocks.columns)
    _launch(
        _projection_kernel, programs, blocks, features, weight, bias, upstream, out,
        images * tokens, tokens, width_in, width_out, weight.shape[1],
        *features.stride(), *weight.stride(), *bias.stride(), *upstream.stride(), BACKWARD=grad is not None,
    )  # fmt: skip
    return out


def _token_product(
    matrix: torch.Tensor,
    rows: int,
    first: torch.Tensor,
    second: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`A [x ; y] + bias`, or `A x` alone, for each image: (images, rows, width).

    Args:
        matrix: A, of at least as many rows and columns as are used; those beyond are zeros.
        rows: number of rows of the result.
        first: x (images, tokens, width).
        second: y (images, tokens, width).
        bias: (rows,), with `second`.
    """
    images, x_tokens, width = first.shape
    out = first.new_empty(images, rows, width)
    blocks = _blocks(first.dtype, rows, width, images)
    y, y_bias = (first, matrix[:, 0]) if second is None or bias is None else (second, bias)
    programs = images * math.ceil(rows / blocks.rows) * math.ceil(width / blocks.columns)
    _launch(
        _token_product_kernel, programs, blocks, matrix, first, y, y_bias, out,
        rows, x_tokens, y.shape[1], width, matrix.shape[0], matrix.shape[1] - x_tokens,
        *matrix.stride(), *first.stride(), *y.stride(), *y_bias.stride(), HAS_Y=second is not None,
    )  # fmt: skip
    return out


def _weight_gradient(grad: torch.Tensor, vision_features: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
    """Gradient of Wa (N, N + T). Parts of the sum are kept in float32 and added in a fixed order."""
    (images, visual, width), instruction = vision_features.shape, projected.shape[1]
    # The sum is long, so that parts of it keep a GPU busy whatever the blocks; large ones read less.
    blocks = _blocks(grad.dtype, visual, width, images)
    steps = math.ceil(width / blocks.depth)
    tiles = math.ceil(visual / blocks.rows) * (
        math.ceil(visual / blocks.columns) + math.ceil(instruction / blocks.columns)
    )
    parts = max(1, min(PROGRAMS // tiles, images * steps // STEPS))
    steps_each = math.ceil(images * steps / parts)
    parts = math.ceil(images * steps / steps_each)
    sums = grad.new_empty(parts, visual, visual + instruction, dtype=torch.float32)
    _launch(
        _weight_gradient_kernel, tiles * parts, blocks, grad, vision_features, projected, sums,
        visual, instruction, width, images * steps, steps, steps_each,
        *grad.stride(), *vision_features.stride(), *projected.stride(),
    )  # fmt: skip
    return sums.sum(0).to(grad.dtype)


@torch.library.custom_op(f"{NAMESPACE}::instruction_projection", mutates_args=(), device_types=("cpu", "cuda"))
def instruction_projection(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """P (images, T, vision width), contiguous: `GELU(H Wp^T + bp)`.

    Args:
        features: H (images, T, instruction width), of any strides; float32, float16 or bfloat16 on CUDA.
        weight: Wp (vision width, instruction width), of the same dtype.
        bias: bp (vision width,), of the same dtype.
    """
    if _in_kernels(features):
        return _projection(features, weight, bias)
    return instruction_projection_reference(features, weight, bias)


@instruction_projection.register_fake
def _instruction_projection_shape(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    refuse_forward_derivatives()
    return features.new_empty(*features.shape[:2], weight.shape[0])


@torch.library.custom_op(f"{NAMESPACE}::gelu_gradient", mutates_args=(), device_types=("cpu", "cuda"))
def gelu_gradient(grad: torch.Tensor, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Gradient of `A = H Wp^T + bp`, whose GELU is P: `grad * GELU'(A)`, (images, T, vision width), contiguous.

    A is computed anew, which costs less than keeping it.
    """
    if _in_kernels(grad):
        return _projection(features, weight, bias, grad)
    before = functional.linear(features, weight, bias)
    return torch.ops.aten.gelu_backward(grad.contiguous(), before)


@gelu_gradient.register_fake
def _gelu_gradient_shape(
    grad: torch.Tensor, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _save_projection(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _projection_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    features, weight, bias = ctx.saved_tensors
    needs_features, needs_weight, needs_bias = ctx.needs_input_grad
    # Behind the GELU stand plain products of two matrices, which the libraries of PyTorch do best.
    grad = gelu_gradient(grad, features, weight, bias)
    with torch.autocast(grad.device.type, enabled=False):
        grad_features = grad @ weight if needs_features else None
        grad_weight = grad.flatten(0, 1).t() @ features.flatten(0, 1) if needs_weight else None
        grad_bias = grad.sum((0, 1)) if needs_bias else None
    return grad_features, grad_weight, grad_bias


instruction_projection.register_autograd(_projection_backward, setup_context=_save_projection)


@torch.library.custom_op(f"{NAMESPACE}::visual_alignment", mutates_args=(), device_types=("cpu", "cuda"))
def visual_alignment(
    vision_features: torch.Tensor, projected: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """F (images, N, width), contiguous: `Wa [V ; P] + ba`.

    Args:
        vision_features: V (images, N, width), of any strides; float32, float16 or bfloat16 on CUDA.
        projected: P (images, T, width), of the same dtype.
        weight: Wa (N, N + T), of the same dtype.
        bias: ba (N,), of the same dtype.
    """
    if _in_kernels(vision_features):
        return _token_product(_aligned(weight), weight.shape[0], vision_features, projected, bias)
    return visual_alignment_reference(vision_features, projected, weight, bias).contiguous()


@visual_alignment.register_fake
def _visual_alignment_shape(
    vision_features: torch.Tensor, projected: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    refuse_forward_derivatives()
    return torch.empty_like(vision_features, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::token_gradient", mutates_args=(), device_types=("cpu", "cuda"))
def token_gradient(grad: torch.Tensor, weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Gradient of the tokens `start` to `stop` of [V ; P]: (images, stop - start, width), contiguous.

    Args:
        grad: gradient of F, (images, N, width).
        weight: Wa (N, N + T).
        start: first token.
        stop: one after the last token.
    """
    if _in_kernels(grad):
        return _token_product(_aligned(weight)[:, start:].t(), stop - start, grad)
    return torch.matmul(weight[:, start:stop].t(), grad).contiguous()


@token_gradient.register_fake
def _token_gradient_shape(grad: torch.Tensor, weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], stop - start, grad.shape[2])


@torch.library.custom_op(f"{NAMESPACE}::weight_gradient", mutates_args=(), device_types=("cpu", "cuda"))
def weight_gradient(grad: torch.Tensor, vision_features: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
    """Gradient of Wa (N, N + T), contiguous, for that of F (images, N, width)."""
    if _in_kernels(grad):
        return _weight_gradient(grad, vision_features, projected)
    tokens = torch.cat([vision_features, projected], dim=1)
    return torch.einsum("ind,itd->nt", grad, tokens).contiguous()


@weight_gradient.register_fake
def _weight_gradient_shape(grad: torch.Tensor, vision_features: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
    visual = vision_features.shape[1]
    return grad.new_empty(visual, visual + projected.shape[1])


def _save_alignment(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    vision_features, projected, weight, _ = inputs
    ctx.save_for_backward(vision_features, projected, weight)


def _alignment_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    vision_features, projected, weight = ctx.saved_tensors
    needs_vision, needs_projected, needs_weight, needs_bias = ctx.needs_input_grad
    visual, tokens = weight.shape
    grad_vision = token_gradient(grad, weight, 0, visual) if needs_vision else None
    grad_projected = token_gradient(grad, weight, visual, tokens) if needs_projected else None
    grad_weight = weight_gradient(grad, vision_features, projected) if needs_weight else None
    # By PyTorch, which adds in pairs: one number after the other, as in the kernels, is less exact in float32.
    grad_bias = grad.sum((0, 2)) if needs_bias else None
    return grad_vision, grad_projected, grad_weight, grad_bias


visual_alignment.register_autograd(_alignment_backward, setup_context=_save_alignment)


__all__ = [
    "instruction_projection",
    "instruction_projection_reference",
    "visual_alignment",
    "visual_alignment_of_rows",
    "visual_alignment_reference",
]
