"""Kernels of `add_norm_linear`: the sum and its norm in one pass, and both gradients in one."""

# Kernels are Triton's, not Python's, to check.
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs, no-warn-unreachable
# mypy: disable-error-code="assignment,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1056
"""Programs that share the rows in backward: 8 for each multiprocessor of an H100. What is summed in which order, and so
the bits, depends on it and not on the device."""


@triton.jit
def add_norm_kernel(
    x_ptr, update_ptr, gain_ptr, shift_ptr, total_ptr, normed_ptr, mean_ptr, scale_ptr, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, CENTER: tl.constexpr, HAS_UPDATE: tl.constexpr,
):  # fmt: skip
    """total = x + update, where there is one; its norm; mean and scale (N,) of each row. Grid: (N,)."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < D
    place = row.to(tl.int64) * D + column
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        x += tl.load(update_ptr + place, mask=inside, other=0.0).to(tl.float32)
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


@triton.jit(do_not_specialize=["rows", "span"])
def add_norm_backward_kernel(
    grad_normed_ptr, grad_total_ptr, total_ptr, mean_ptr, scale_ptr, gain_ptr, shift_ptr, grad_ptr, normed_ptr,
    partial_ptr, rows, span,
    D: tl.constexpr, BLOCK: tl.constexpr, CENTER: tl.constexpr, HAS_GRAD_TOTAL: tl.constexpr,
):  # fmt: skip
    """The gradient of total, and the norm itself once more. partial (programs, 2, D): sums of gain's and shift's."""
    column = tl.arange(0, BLOCK)
    inside = column < D
    gain = tl.load(gain_ptr + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + column, mask=inside, other=0.0).to(tl.float32)
    gain_sum = tl.zeros([BLOCK], tl.float32)
    shift_sum = tl.zeros([BLOCK], tl.float32)
    start = tl.program_id(0) * span
    place = start.to(tl.int64) * D + column
    for row in range(start, tl.minimum(start + span, rows)):
        grad_normed = tl.load(grad_normed_ptr + place, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(total_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad = tl.zeros([BLOCK], tl.float32)
        if HAS_GRAD_TOTAL:
            grad = tl.load(grad_total_ptr + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        if CENTER:
            x = tl.where(inside, x - tl.load(mean_ptr + row), 0.0)
        x *= scale
        tl.store(normed_ptr + place, (x * gain + shift).to(normed_ptr.dtype.element_ty), mask=inside)
        gain_sum += grad_normed * x
        shift_sum += grad_normed
        scaled = grad_normed * gain
        along = scaled - x * (tl.sum(scaled * x, 0) / D)
        if CENTER:
            along -= tl.sum(scaled, 0) / D
        tl.store(grad_ptr + place, (grad + scale * along).to(grad_ptr.dtype.element_ty), mask=inside)
        place += D
    partial = partial_ptr + tl.program_id(0) * 2 * D + column
    tl.store(partial, gain_sum, mask=inside)
    tl.store(partial + D, shift_sum, mask=inside)


def _launch(D: int) -> dict[str, int]:
    block = triton.next_power_of_2(D)
    return {"D": D, "BLOCK": block, "num_warps": min(16, max(4, block // 1024))}


def forward(
    x: Tensor, update: Tensor | None, gain: Tensor, shift: Tensor, *, eps: float, center: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x + update (without an update an empty tensor), its norm, and of each row mean and scale, float32.

    x and update: (N, D), contiguous, bfloat16 or float32; gain, shift: (D,).
    """
    N, D = x.shape
    total = torch.empty_like(x) if update is not None else x.new_empty(0)
    normed = torch.empty_like(x)
    mean, scale = (x.new_empty(N, dtype=torch.float32) for _ in range(2))
    if N:
        add_norm_kernel[(N,)](
            x, update, gain, shift, total, normed, mean, scale, eps,
            CENTER=center, HAS_UPDATE=update is not None, **_launch(D),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradient of total (N, D), the norm (N, D) again, and the gradients of gain and shift (D,), float32."""
    N, D = total.shape
    grad, normed = torch.empty_like(total), torch.empty_like(total)
    programs = max(1, min(PROGRAMS, N))
    partial = total.new_empty(programs, 2, D, dtype=torch.float32)
    add_norm_backward_kernel[(programs,)](
        grad_normed, grad_total, total, mean, scale, gain, shift, grad, normed, partial, N, triton.cdiv(N, programs),
        CENTER=center, HAS_GRAD_TOTAL=grad_total is not None, **_launch(D),
    )  # fmt: skip
    return grad, normed, partial[:, 0].sum(0), partial[:, 1].sum(0)
