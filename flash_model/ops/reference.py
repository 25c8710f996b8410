"""Mixed chunk attention in plain torch: what the op computes on the CPU, and what kernels are held against.

Section 2 of the paper. Time and memory are linear in T, and backward recomputes what it needs from the inputs.

Shape letters: B batch, T time, G chunks, C chunk, S query/key, E values, H = 4 heads (quad_q, quad_k, lin_q, lin_k).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_model.ops.checks import check_documents
from flash_model.ops.documents import Reading, plan_reading
from flash_model.ops.heads import (
    accumulation_dtype,
    add_toeplitz_adjoint,
    rotated_heads,
    rotated_heads_adjoint,
    silu_adjoint,
    toeplitz,
)
from flash_model.positions import cos_sin


class Inputs(NamedTuple):
    """The op's arguments: tensors as the caller gave them, then the options."""

    uvz: Tensor
    gamma: Tensor
    beta: Tensor
    bias: Tensor
    doc_ids: Tensor | None
    state_sum: Tensor | None
    state_count: Tensor | None
    state_doc_id: Tensor | None
    chunk_size: int
    causal: bool
    start: int
    rope_base: float


class _Pass(NamedTuple):
    """Everything that one forward pass computes, padded to whole chunks, in the accumulation dtype."""

    u_BTE: Tensor
    v_BTE: Tensor
    z_BTS: Tensor
    gamma_HS: Tensor
    cos: Tensor
    sin: Tensor
    quad_q: Tensor  # (B, G, C, S), like the other three heads
    quad_k: Tensor
    lin_q: Tensor
    lin_k: Tensor
    values_BGCE: Tensor
    reading: Reading
    mask: Tensor | None  # (B, G, C, C) bool: pairs of one document, causal or not; None: there is one document
    relu_BGCC: Tensor
    weights_BGCC: Tensor
    arrivals: list[Tensor]  # (B, G, S, E) for every route
    left: Tensor  # (B, S, E)
    attended_BTE: Tensor


def _check_count(inputs: Inputs) -> None:
    """Raise ValueError if the state saw more chunks than stand before `start`; on the CPU alone, like documents."""
    count, before = inputs.state_count, inputs.start // inputs.chunk_size
    if count is not None and count.device.type == "cpu" and bool(((count < 0) | (count > before)).any()):
        raise ValueError(
            f"state.count must be 0 to start / chunk_size = {before}, the chunks before this piece: it is "
            f"{count.tolist()}; is start {inputs.start} the position of the piece's first token?"
        )


def _attend(inputs: Inputs) -> _Pass:
    uvz, C = inputs.uvz, inputs.chunk_size
    check_documents(inputs.doc_ids)
    _check_count(inputs)
    dtype = accumulation_dtype(uvz)
    B, T, width = uvz.shape
    S = inputs.gamma.shape[1]
    E, G = (width - S) // 2, -(-T // C)
    if T % C:
        uvz = F.pad(uvz, (0, 0, 0, G * C - T))
    u_BTE, v_BTE, z_BTS = uvz.to(dtype).split([E, E, S], -1)

    cos, sin = cos_sin(inputs.start, G * C, S // 2, base=inputs.rope_base, block=C, dtype=dtype, device=uvz.device)
    gamma_HS = inputs.gamma.to(dtype)
    heads_HBTS = rotated_heads(z_BTS, gamma_HS, inputs.beta.to(dtype), cos, sin)
    quad_q, quad_k, lin_q, lin_k = heads_HBTS.view(4, B, G, C, S)
    values_BGCE = F.silu(v_BTE).view(B, G, C, E)

    entering = None
    if inputs.state_count is not None and inputs.state_doc_id is not None:
        entering = (inputs.state_count, inputs.state_doc_id)
    reading = plan_reading(inputs.doc_ids, entering, (B, G, C), causal=inputs.causal, dtype=dtype, device=uvz.device)
    mask = reading.same.tril() if reading.same is not None and inputs.causal else reading.same

    bias_CC = toeplitz(inputs.bias.to(dtype), 0, C, C)
    scores = torch.baddbmm(bias_CC, quad_q.flatten(0, 1), quad_k.flatten(0, 1).mT, alpha=1 / C)
    relu_BGCC = scores.relu_().view(B, G, C, C)
    if mask is not None:
        relu_BGCC.mul_(mask)
    elif inputs.causal:
        relu_BGCC.tril_()
    weights_BGCC = relu_BGCC.square()
    if reading.own is not None and mask is not None:
        weights_BGCC.addcmul_((lin_q * reading.own) @ lin_k.mT, mask)

    attended_BGCE = weights_BGCC @ values_BGCE
    arrivals: list[Tensor] = []
    left = []
    initial = None if inputs.state_sum is None else inputs.state_sum.to(dtype)
    for route in reading.routes:
        arriving_BGSE, left_BSE = route.carry((lin_k * route.write).mT @ values_BGCE, initial)
        attended_BGCE.add_((lin_q * route.read) @ arriving_BGSE)
        arrivals.append(arriving_BGSE)
        left.append(left_BSE)
    return _Pass(
        u_BTE, v_BTE, z_BTS, gamma_HS, cos, sin, quad_q, quad_k, lin_q, lin_k, values_BGCE,
        reading, mask, relu_BGCC, weights_BGCC, arrivals, left[0], attended_BGCE.view(B, G * C, E),
    )  # fmt: skip


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return SiLU(u) ⊙ attended (B, T, E) in uvz's dtype, and the sum, count and document of the state that leaves."""
    done = _attend(inputs)
    out = F.silu(done.u_BTE).mul_(done.attended_BTE)[:, : inputs.uvz.shape[1]]
    return out.to(inputs.uvz.dtype).contiguous(), done.left, done.reading.left_count, done.reading.left_doc_id


def backward(
    grad_out: Tensor, grad_left: Tensor | None, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of uvz, gamma, beta, bias and the sum of the state that entered, each in its input's dtype.

    grad_out: (B, T, E). grad_left: (B, S, E), the gradient of the sum of the state that leaves, or None. Where no state
    entered, its gradient is an empty tensor: an op cannot return none.
    """
    done = _attend(inputs)
    B, G, C, E = done.values_BGCE.shape
    T, dtype = inputs.uvz.shape[1], done.values_BGCE.dtype
    grad_out = grad_out.to(dtype)
    if T % C:
        grad_out = F.pad(grad_out, (0, 0, 0, G * C - T))

    grad_uvz = inputs.uvz.new_empty(B, T, inputs.uvz.shape[2], dtype=dtype)
    grad_uvz[..., :E] = silu_adjoint(grad_out * done.attended_BTE, done.u_BTE)[:, :T]
    grad_BGCE = F.silu(done.u_BTE).mul_(grad_out).view(B, G, C, E)

    grad_heads = torch.empty(4, B, G, C, done.quad_q.shape[-1], dtype=dtype, device=grad_out.device)
    grad_quad_q, grad_quad_k, grad_lin_q, grad_lin_k = grad_heads
    grad_weights = grad_BGCE @ done.values_BGCE.mT
    grad_values = done.weights_BGCC.mT @ grad_BGCE
    if done.reading.own is not None and done.mask is not None:
        grad_own = grad_weights * done.mask
        torch.mul(grad_own @ done.lin_k, done.reading.own, out=grad_lin_q)
        torch.matmul(grad_own.mT, done.lin_q * done.reading.own, out=grad_lin_k)
    else:
        grad_heads[2:].zero_()
    grad_scores = grad_weights.mul_(done.relu_BGCC).mul_(2)
    grad_bias = torch.zeros(2 * C - 1, dtype=dtype, device=grad_out.device)
    add_toeplitz_adjoint(grad_bias, grad_scores.sum((0, 1)), 0)
    torch.matmul(grad_scores, done.quad_k, out=grad_quad_q)
    torch.matmul(grad_scores.mT, done.quad_q, out=grad_quad_k)
    grad_heads[:2].mul_(1 / C)

    grad_state = grad_out.new_empty(0)
    for route, arriving_BGSE in zip(done.reading.routes, done.arrivals, strict=True):
        grad_lin_q.addcmul_(grad_BGCE @ arriving_BGSE.mT, route.read)
        grad_arriving = (done.lin_q * route.read).mT @ grad_BGCE
        grad_sums, grad_initial = route.carry_adjoint(grad_arriving, None if grad_left is None else grad_left.to(dtype))
        grad_lin_k.addcmul_(done.values_BGCE @ grad_sums.mT, route.write)
        grad_values.add_((done.lin_k * route.write) @ grad_sums)
        if inputs.state_sum is not None:
            grad_state = grad_initial.to(inputs.state_sum.dtype).contiguous()

    grad_uvz[..., E : 2 * E] = silu_adjoint(grad_values.view(B, G * C, E), done.v_BTE)[:, :T]
    grad_z, grad_gamma, grad_beta = rotated_heads_adjoint(
        grad_heads.view(4, B, G * C, -1), done.z_BTS, done.gamma_HS, done.cos, done.sin
    )
    grad_uvz[..., 2 * E :] = grad_z[:, :T]
    return (
        grad_uvz.to(inputs.uvz.dtype),
        grad_gamma.to(inputs.gamma.dtype),
        grad_beta.to(inputs.beta.dtype),
        grad_bias.to(inputs.bias.dtype),
        grad_state,
    )
