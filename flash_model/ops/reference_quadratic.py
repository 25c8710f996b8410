"""FLASH-Quad's attention in plain torch: what the op computes on the CPU, and what kernels are held against.

Section 1 of the paper. Queries are taken in blocks, so that no tensor is larger than (B, BLOCK, T).

Shape letters: B batch, T time, R rows of a block of queries, N keys that it reads, S query/key, E values, H = 2 heads.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_model.ops.checks import check_documents
from flash_model.ops.heads import (
    accumulation_dtype,
    add_toeplitz_adjoint,
    rotated_heads,
    rotated_heads_adjoint,
    silu_adjoint,
    toeplitz,
)
from flash_model.positions import cos_sin

BLOCK = 256


class Inputs(NamedTuple):
    """The op's arguments: tensors as the caller gave them, then the options."""

    uvz: Tensor
    gamma: Tensor
    beta: Tensor
    bias: Tensor
    doc_ids: Tensor | None
    norm_length: int
    causal: bool
    start: int
    rope_base: float


class _Operands(NamedTuple):
    """What the blocks are computed from, in the accumulation dtype."""

    u_BTE: Tensor
    v_BTE: Tensor
    z_BTS: Tensor
    gamma_HS: Tensor
    bias: Tensor
    cos: Tensor
    sin: Tensor
    q_BTS: Tensor
    k_BTS: Tensor
    values_BTE: Tensor


def _prepare(inputs: Inputs) -> _Operands:
    check_documents(inputs.doc_ids)
    dtype = accumulation_dtype(inputs.uvz)
    T, S = inputs.uvz.shape[1], inputs.gamma.shape[1]
    E = (inputs.uvz.shape[2] - S) // 2
    u_BTE, v_BTE, z_BTS = inputs.uvz.to(dtype).split([E, E, S], -1)
    cos, sin = cos_sin(
        inputs.start, T, S // 2, base=inputs.rope_base, block=BLOCK, dtype=dtype, device=inputs.uvz.device
    )
    gamma_HS = inputs.gamma.to(dtype)
    q_BTS, k_BTS = rotated_heads(z_BTS, gamma_HS, inputs.beta.to(dtype), cos, sin)
    return _Operands(
        u_BTE, v_BTE, z_BTS, gamma_HS, inputs.bias.to(dtype), cos, sin, q_BTS, k_BTS, F.silu(v_BTE)
    )  # fmt: skip


def _relu_scores(inputs: Inputs, operands: _Operands) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield every block's rows, the keys that they read, and relu(q kᵀ/n + b) (B, R, N), 0 where a row may not read."""
    T = inputs.uvz.shape[1]
    for first in range(0, T, BLOCK):
        rows = slice(first, min(first + BLOCK, T))
        keys = slice(0, rows.stop if inputs.causal else T)
        bias_RN = toeplitz(operands.bias, first, rows.stop - first, keys.stop)
        q_BRS, k_BNS = operands.q_BTS[:, rows], operands.k_BTS[:, keys]
        relu_BRN = torch.baddbmm(bias_RN, q_BRS, k_BNS.mT, alpha=1 / inputs.norm_length).relu_()
        if inputs.causal:
            relu_BRN.tril_(first)
        if inputs.doc_ids is not None:
            relu_BRN.mul_(inputs.doc_ids[:, rows, None] == inputs.doc_ids[:, None, keys])
        yield rows, keys, relu_BRN


def forward(inputs: Inputs) -> Tensor:
    """Return SiLU(u) ⊙ attended, (B, T, E) in uvz's dtype."""
    operands = _prepare(inputs)
    out = F.silu(operands.u_BTE)
    for rows, keys, relu_BRN in _relu_scores(inputs, operands):
        out[:, rows] *= relu_BRN.square_() @ operands.values_BTE[:, keys]
    return out.to(inputs.uvz.dtype).contiguous()


def backward(grad_out: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of uvz, gamma, beta and bias for grad_out (B, T, E), each in its input's dtype."""
    operands = _prepare(inputs)
    E = grad_out.shape[2]
    grad_out = grad_out.to(operands.u_BTE.dtype)
    grad_attended = F.silu(operands.u_BTE).mul_(grad_out)
    grad_uvz = torch.empty_like(inputs.uvz, dtype=operands.u_BTE.dtype, memory_format=torch.contiguous_format)
    grad_values = torch.zeros_like(operands.values_BTE)
    grad_q, grad_k = torch.zeros_like(operands.q_BTS), torch.zeros_like(operands.k_BTS)
    grad_bias = torch.zeros_like(operands.bias)
    for rows, keys, relu_BRN in _relu_scores(inputs, operands):
        weights_BRN = relu_BRN.square()
        attended_BRE = weights_BRN @ operands.values_BTE[:, keys]
        grad_uvz[:, rows, :E] = silu_adjoint(grad_out[:, rows] * attended_BRE, operands.u_BTE[:, rows])
        grad_values[:, keys] += weights_BRN.mT @ grad_attended[:, rows]
        grad_weights = grad_attended[:, rows] @ operands.values_BTE[:, keys].mT
        grad_scores = grad_weights.mul_(relu_BRN).mul_(2)
        add_toeplitz_adjoint(grad_bias, grad_scores.sum(0), rows.start)
        grad_q[:, rows] = grad_scores @ operands.k_BTS[:, keys]
        grad_k[:, keys] += grad_scores.mT @ operands.q_BTS[:, rows]
    grad_heads = torch.stack([grad_q, grad_k]).div_(inputs.norm_length)
    grad_z, grad_gamma, grad_beta = rotated_heads_adjoint(
        grad_heads, operands.z_BTS, operands.gamma_HS, operands.cos, operands.sin
    )
    grad_uvz[..., E : 2 * E] = silu_adjoint(grad_values, operands.v_BTE)
    grad_uvz[..., 2 * E :] = grad_z
    return (
        grad_uvz.to(inputs.uvz.dtype),
        grad_gamma.to(inputs.gamma.dtype),
        grad_beta.to(inputs.beta.dtype),
        grad_bias.to(inputs.bias.dtype),
    )
