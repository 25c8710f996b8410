"""Cross-entropy of a linear head, without the logits of the whole batch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_model.ops.heads import accumulation_dtype

LOGITS_AT_ONCE = 2**25  # elements: 128 MiB of float32


class _LinearCrossEntropy(torch.autograd.Function):
    """Its gradients are taken in the forward pass, chunk by chunk, while the logits are there: they are made once."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, mask_N: Tensor) -> Tensor:
        dtype = accumulation_dtype(hidden_ND)
        total = torch.zeros((), dtype=dtype, device=hidden_ND.device)
        differentiate = any(ctx.needs_input_grad[:2])
        if differentiate:
            grad_hidden_ND = torch.empty_like(hidden_ND)
            grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype)
        size = max(1, LOGITS_AT_ONCE // len(weight_VD))
        for first in range(0, len(hidden_ND), size):
            rows = slice(first, first + size)
            target_N1, keep_N1 = targets_N[rows, None], mask_N[rows, None].to(dtype)
            log_probs_NV = F.log_softmax((hidden_ND[rows] @ weight_VD.T).to(dtype), -1)
            total -= (log_probs_NV.gather(1, target_N1) * keep_N1).sum()
            if differentiate:
                grad_logits_NV = log_probs_NV.exp_().scatter_add_(1, target_N1, torch.full_like(keep_N1, -1))
                grad_logits_NV = grad_logits_NV.mul_(keep_N1).to(hidden_ND.dtype)
                grad_hidden_ND[rows] = grad_logits_NV @ weight_VD
                grad_weight_VD += grad_logits_NV.T @ hidden_ND[rows]
        if differentiate:
            ctx.save_for_backward(grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        return (
            grad_hidden_ND * grad.to(grad_hidden_ND.dtype),
            grad_weight_VD * grad.to(grad_weight_VD.dtype),
            None,
            None,
        )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the sum of −ln softmax(hidden · weightᵀ)[target] in nats: a float32 scalar (float64 for a float64 hidden).

    hidden: (..., D); weight: (V, D); targets: (...) integers; mask: (...), zero or False where a target does not count
    and may be any number. Logits exist for 2^25 / V rows at a time. Differentiable in hidden and weight.
    """
    hidden_ND, targets_N = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).to(torch.int64)
    counts_N = torch.ones_like(targets_N, dtype=torch.bool) if mask is None else mask.reshape(-1) != 0
    return _LinearCrossEntropy.apply(hidden_ND, weight, targets_N.where(counts_N, 0), counts_N)
