"""Kernels of `add_norm_linear`: the sum and its norm in one pass, and both gradients in one."""

# Kernels are Triton's, not Python's, to check.
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs, no-warn-unreachable
# mypy: disable-error-code="assignment,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 528
"""Programs that share the rows in backward: 4 for each multiprocessor of an H100. What is summed in which order, and so
the bits, depends on it and not on the device."""


@triton.jit
def add_norm_kernel(
    x_ptr, update_ptr, update_bias_ptr, gain_ptr, shift_ptr, total_ptr, normed_ptr, mean_ptr, scale_ptr, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, CENTER: tl.constexpr, HAS_UPDATE: tl.constexpr,
):  # fmt: skip
    """total = x + update + update_bias, what there is of it; its norm; mean and scale (N,) of each row. Grid: (N,)."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < D
    place = row.to(tl.int64) * D + column
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        x += tl.load(update_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if update_bias_ptr is not None:
            x += tl.load(update_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + place, rounded, mask=inside)
        x = rounded.to(tl.float32)
    mean = 0.0
    if CENTER:
        mean = tl.sum(x, 0) / D
        x = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(scale_ptr + row, scale)
    gain = tl.load(gain_ptr + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_ptr + place, (x * scale * gain + shift).to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add2(a, b, c, d):
    return a + c, b + d


@triton.jit(do_not_specialize=["rows", "span"])
def add_norm_backward_kernel(
    grad_normed_ptr, grad_total_ptr, total_ptr, mean_ptr, scale_ptr, gain_ptr, shift_ptr, grad_ptr, normed_ptr,
    partial_ptr, rows, span,
    D: tl.constexpr, BLOCK: tl.constexpr, CENTER: tl.constexpr, HAS_GRAD_TOTAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of total, and the norm itself once more.

    partial (programs, 3, D): sums over the rows, gradients of gain, shift and update_bias. Grid: (programs,).
    """
    column = tl.arange(0, BLOCK)
    inside = column < D
    gain = tl.load(gain_ptr + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + column, mask=inside, other=0.0).to(tl.float32)
    gain_sum = tl.zeros([BLOCK], tl.float32)
    shift_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    start = tl.program_id(0) * span
    place = start.to(tl.int64) * D + column
    # One number a row is not fetched ahead by the loop's own stages.
    next_scale = tl.load(scale_ptr + tl.minimum(start, rows - 1))
    next_mean = tl.load(mean_ptr + tl.minimum(start, rows - 1))
    for row in tl.range(start, tl.minimum(start + span, rows), num_stages=STAGES):
        scale, mean = next_scale, next_mean
        next_scale = tl.load(scale_ptr + tl.minimum(row + 1, rows - 1))
        next_mean = tl.load(mean_ptr + tl.minimum(row + 1, rows - 1))
        grad_normed = tl.load(grad_normed_ptr + place, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(total_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad = tl.zeros([BLOCK], tl.float32)
        if HAS_GRAD_TOTAL:
            grad = tl.load(grad_total_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if CENTER:
            x = tl.where(inside, x - mean, 0.0)
        x *= scale
        tl.store(normed_ptr + place, (x * gain + shift).to(normed_ptr.dtype.element_ty), mask=inside)
        gain_sum += grad_normed * x
        shift_sum += grad_normed
        scaled = grad_normed * gain
        if CENTER:
            along_x, along_one = tl.reduce((scaled * x, scaled), 0, _add2)
            scaled -= x * (along_x / D) + along_one / D
        else:
            scaled -= x * (tl.sum(scaled * x, 0) / D)
        grad = tl.where(inside, grad + scale * scaled, 0.0).to(grad_ptr.dtype.element_ty)
        bias_sum += grad.to(tl.float32)
        tl.store(grad_ptr + place, grad, mask=inside)
        place += D
    partial = partial_ptr + tl.program_id(0) * 3 * D + column
    tl.store(partial, gain_sum, mask=inside)
    tl.store(partial + D, shift_sum, mask=inside)
    tl.store(partial + 2 * D, bias_sum, mask=inside)


def _launch(D: int, columns_per_warp: int) -> dict[str, int]:
    block = triton.next_power_of_2(D)
    return {"D": D, "BLOCK": block, "num_warps": min(16, max(1, block // columns_per_warp))}


def forward(
    x: Tensor,
    update: Tensor | None,
    update_bias: Tensor | None,
    gain: Tensor,
    shift: Tensor,
    *,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x + update + update_bias (without an update an empty tensor), its norm, and of each row mean and scale,
    float32.

    x and update: (N, D), contiguous, bfloat16 or float32; update_bias, gain, shift: (D,).
    """
    N, D = x.shape
    total = torch.empty_like(x) if update is not None else x.new_empty(0)
    normed = torch.empty_like(x)
    mean, scale = (x.new_empty(N, dtype=torch.float32) for _ in range(2))
    if N:
        add_norm_kernel[(N,)](
            x, update, update_bias, gain, shift, total, normed, mean, scale, eps,
            CENTER=center, HAS_UPDATE=update is not None, **_launch(D, 256 if D <= 1024 else 1024),
        )  # fmt: skip
    return total, normed, mean, scale


def backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    scale: Tensor,
    gain: Tensor,
    shift: Tensor,
    *,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of total (N, D), the norm (N, D) again, and the gradients (3, D) of gain, shift and
    update_bias, float32.
    """
    N, D = total.shape
    grad, normed = torch.empty_like(total), torch.empty_like(total)
    if not N:
        return grad, normed, total.new_zeros(3, D, dtype=torch.float32)
    programs = min(PROGRAMS, N)
    partial = total.new_empty(programs, 3, D, dtype=torch.float32)
    add_norm_backward_kernel[(programs,)](
        grad_normed, grad_total, total, mean, scale, gain, shift, grad, normed, partial, N, triton.cdiv(N, programs),
        CENTER=center, HAS_GRAD_TOTAL=grad_total is not None, STAGES=3, **_launch(D, 512),
    )  # fmt: skip
    return grad, normed, partial.sum(0)
