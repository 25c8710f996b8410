"""Softmax cross-entropy of rows of logits, and its gradient in their place: the kernel of `linear_cross_entropy`."""

# Kernels are Triton's, not Python's, to check.
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs, no-warn-unreachable
# mypy: disable-error-code="assignment,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

LAUNCH = (32_768, 32)
"""Columns at a time and warps of a program, for a large vocabulary. A row that is taken at once is read only once."""


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    counts_ptr,
    nats_ptr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    DIFFERENTIATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row. Columns V … STRIDE − 1 are padding: read, never used, so that accesses stay aligned."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * STRIDE
    columns = tl.arange(0, BLOCK)
    if tl.load(counts_ptr + row) != 0:
        target = tl.load(targets_ptr + row)
        target_logit = tl.load(logits_ptr + target, (target >= 0) & (target < V), other=float("nan")).to(tl.float32)
        if BLOCKS == 1:
            x = tl.load(logits_ptr + columns, columns < STRIDE, other=0).to(tl.float32)
            x = tl.where(columns < V, x, -float("inf"))
            highest = tl.max(x, 0)
            powers = tl.exp2((x - highest) * LOG2_E)
            total = tl.sum(powers, 0)
            if DIFFERENTIATE:
                gradient = powers * (1 / total) - tl.where(columns == target, 1.0, 0.0)
                tl.store(logits_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), columns < STRIDE)
        else:
            # Every lane keeps a maximum and a sum of its own: the lanes meet once, not at every block.
            lane_max = tl.full([BLOCK], -1.0e30, tl.float32)
            lane_sum = tl.zeros([BLOCK], tl.float32)
            for block in range(BLOCKS):
                column = block * BLOCK + columns
                x = tl.load(logits_ptr + column, column < STRIDE, other=0).to(tl.float32)
                x = tl.where(column < V, x, -float("inf"))
                rise = x - lane_max
                factor = tl.exp2(-tl.abs(rise) * LOG2_E)
                lane_sum = tl.where(rise > 0, lane_sum * factor + 1, lane_sum + factor)
                lane_max = tl.maximum(lane_max, x)
            highest = tl.max(lane_max, 0)
            total = tl.sum(lane_sum * tl.exp2((lane_max - highest) * LOG2_E), 0)
            if DIFFERENTIATE:
                scale = 1 / total
                for done in range(BLOCKS):
                    # Backwards: what was read last is still in the cache.
                    column = (BLOCKS - 1 - done) * BLOCK + columns
                    x = tl.load(logits_ptr + column, column < STRIDE, other=0).to(tl.float32)
                    gradient = tl.exp2((x - highest) * LOG2_E) * scale - tl.where(column == target, 1.0, 0.0)
                    tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), column < STRIDE)
        tl.store(nats_ptr + row, highest + tl.log(total) - target_logit)
    else:
        tl.store(nats_ptr + row, 0.0)
        if DIFFERENTIATE:
            for block in range(BLOCKS):
                column = block * BLOCK + columns
                tl.store(logits_ptr + column, tl.zeros_like(columns).to(logits_ptr.dtype.element_ty), column < STRIDE)


def cross_entropy_(logits_NV: Tensor, targets_N: Tensor, counts_N: Tensor, differentiate: bool) -> Tensor:
    """Return −ln softmax(logits)[target] of every row (N,) in float32, 0 where it does not count.

    logits_NV: (N, V), float32 or bfloat16; its rows may lie apart: what is between them is overwritten. With
    `differentiate` the gradient takes the logits' place. targets_N: (N,) integers; where one counts and is no column,
    the row's nats are NaN. counts_N: (N,) bool.
    """
    N, V = logits_NV.shape
    nats_N = logits_NV.new_empty(N, dtype=torch.float32)
    block, warps = LAUNCH
    while block >= 2 * V and warps > 1:
        block, warps = block // 2, warps // 2
    _cross_entropy_kernel[(N,)](
        logits_NV,
        targets_N,
        counts_N,
        nats_N,
        V=V,
        STRIDE=logits_NV.stride(0),
        DIFFERENTIATE=differentiate,
        BLOCK=block,
        num_warps=warps,
    )
    return nats_N
