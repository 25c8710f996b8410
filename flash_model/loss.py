"""Cross-entropy of a linear head, without the logits of the whole batch.

Shape letters: N tokens (of a block, where it says so), D model, V vocabulary.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flash_model.ops.checks import INTEGERS
from flash_model.ops.heads import accumulation_dtype

LOGITS_AT_ONCE = {"cpu": 2**25, "cuda": 2**28}
"""Elements of a block of logits, by device: 128 MiB of float32, 512 MiB of bfloat16. The gradients add up by block."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the sum of −ln softmax(hidden · weightᵀ)[target] in nats: a float32 scalar (float64 for a float64 hidden).

    hidden: (..., D); weight: (V, D), of the same dtype; targets: (...) integers; mask: (...), zero or False where a
    target does not count and may be any number. Logits exist in hidden's dtype for LOGITS_AT_ONCE / V rows.
    Differentiable in hidden and weight, once. On a GPU a target that counts and is no row of weight makes the sum NaN.
    ValueError where shapes or dtypes do not fit.
    """
    if hidden.ndim == 0:
        raise ValueError("hidden must have shape (..., D): it has ()")
    if weight.ndim != 2 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"weight must have shape (V, D), D = {hidden.shape[-1]}: it has {tuple(weight.shape)}")
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight is {weight.dtype}, hidden {hidden.dtype}: they must be the same")
    for name, tensor in (("targets", targets), ("mask", mask)):
        if tensor is not None and tensor.shape != hidden.shape[:-1]:
            raise ValueError(
                f"{name} must have hidden's leading shape {tuple(hidden.shape[:-1])}: it has {tuple(tensor.shape)}"
            )
    if targets.dtype not in INTEGERS:
        raise ValueError(f"targets must be signed integers or uint8: they are {targets.dtype}")
    hidden_ND, targets_N = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).to(torch.int64)
    counts_N = torch.ones_like(targets_N, dtype=torch.bool) if mask is None else mask.reshape(-1) != 0
    # An argument, so that torch.compile, which may trace the op before it knows of a backward, guards on it.
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    nats, _, _ = torch.ops.flash_model.linear_cross_entropy(
        hidden_ND, weight, targets_N.where(counts_N, 0), counts_N, differentiate
    )
    return nats


@torch.library.custom_op("flash_model::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, counts_N: Tensor, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nats and their gradients with respect to hidden and weight (empty unless `differentiate`).

    Gradients are taken here, block of rows by block, while the logits are there: they are made once. The weight's is
    summed and returned in the accumulation dtype.
    """
    (N, D), V, dtype = hidden_ND.shape, len(weight_VD), accumulation_dtype(hidden_ND)
    cross_entropy_ = _cross_entropy_
    if hidden_ND.is_cuda and dtype == torch.float32 and find_spec("triton"):
        from flash_model.triton_cross_entropy import cross_entropy_

    nats_N = hidden_ND.new_empty(N, dtype=dtype)
    grad_hidden_ND = hidden_ND.new_empty((N, D) if differentiate else 0)
    grad_weight_VD = hidden_ND.new_zeros((V, D) if differentiate else 0, dtype=dtype)
    block = logits_rows(N, V, hidden_ND.device.type)
    # Rows lie a multiple of 128 bytes apart, as fast products want them.
    padded = hidden_ND.new_empty(min(block, N), -(-V // 64) * 64)
    buffer = padded[:, :V]
    if not hidden_ND.is_cuda:
        padded[:, V:] = 0  # bfloat16 products on CPUs with AMX read on into it, and 0 times NaN would be NaN
    for first in range(0, N, block):
        block_ND = hidden_ND[first : first + block]
        logits_NV = buffer[: len(block_ND)]
        rows = slice(first, first + len(block_ND))
        torch.mm(block_ND, weight_VD.T, out=logits_NV)
        nats_N[rows] = cross_entropy_(logits_NV, targets_N[rows], counts_N[rows], differentiate)
        if differentiate:
            torch.mm(logits_NV, weight_VD, out=grad_hidden_ND[first : first + block])
            _add_product(grad_weight_VD, logits_NV.T, block_ND)
    return nats_N.sum(), grad_hidden_ND, grad_weight_VD


def logits_rows(N: int, V: int, device: str) -> int:
    """Return the rows of a block of logits: blocks are of one size as far as that goes, in units of 128 rows.

    N rows in all, V pieces; device: a key of LOGITS_AT_ONCE.
    """
    most = max(1, LOGITS_AT_ONCE[device] // V)
    unit = 128 if most >= 128 else 1
    blocks = max(1, -(-N // (most // unit * unit)))
    return max(1, -(-N // (blocks * unit)) * unit)


def _cross_entropy_(logits_NV: Tensor, targets_N: Tensor, counts_N: Tensor, differentiate: bool) -> Tensor:
    """Return the nats of every row (N,), 0 where it does not count; with `differentiate` logits become gradients."""
    target_N1, ignored_N1 = targets_N[:, None], ~counts_N[:, None]
    log_probs_NV = F.log_softmax(logits_NV, -1, dtype=accumulation_dtype(logits_NV))
    nats_N1 = -log_probs_NV.gather(1, target_N1).masked_fill_(ignored_N1, 0)
    if differentiate:
        probs_NV = log_probs_NV.exp_()
        probs_NV.scatter_add_(1, target_N1, torch.full_like(nats_N1, -1)).masked_fill_(ignored_N1, 0)
        logits_NV.copy_(probs_NV)
    return nats_N1[:, 0]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a · b to `total`, whose dtype may be wider: on a GPU without a rounding between."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@_linear_cross_entropy.register_fake
def _(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, counts_N: Tensor, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(hidden_ND)
    return (
        hidden_ND.new_empty((), dtype=dtype),
        hidden_ND.new_empty(hidden_ND.shape if differentiate else 0),
        hidden_ND.new_empty(weight_VD.shape if differentiate else 0, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, grad_hidden_ND, grad_weight_VD = output
    ctx.mark_non_differentiable(grad_hidden_ND, grad_weight_VD)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
    ctx.dtype, ctx.differentiate = inputs[0].dtype, inputs[4]


def _scale_gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    if not ctx.differentiate:
        raise RuntimeError("linear_cross_entropy was run without gradients, and is asked for them now")
    # In the accumulation dtype: a factor rounded to bfloat16 would be wrong by up to 0.4 % in every weight alike.
    grad_hidden_ND, grad_weight_VD = ((g.to(grad.dtype) * grad).to(ctx.dtype) for g in ctx.saved_tensors)
    return grad_hidden_ND, grad_weight_VD, None, None, None


_linear_cross_entropy.register_autograd(_scale_gradients, setup_context=_setup_context)


@register_flop_formula(torch.ops.flash_model.linear_cross_entropy)
def _flops(
    hidden: Sequence[int], weight: Sequence[int], targets: Any, counts: Any, differentiate: bool, **_: Any
) -> int:
    products = 3 if differentiate else 1
    return products * 2 * hidden[0] * hidden[1] * weight[0]
