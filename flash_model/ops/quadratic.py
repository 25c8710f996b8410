"""FLASH-Quad's attention, the public op: checks, registration, derivative, FLOP count."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flash_model.flops import quadratic_flops
from flash_model.ops import dispatch
from flash_model.ops import reference_quadratic as reference
from flash_model.ops.checks import check_projection


def quadratic_attention(
    uvz: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bias: Tensor,
    *,
    norm_length: int,
    causal: bool = True,
    doc_ids: Tensor | None = None,
    start: int = 0,
    rope_base: float = 10000.0,
) -> Tensor:
    """Gated attention of FLASH-Quad (Hua et al. 2022) over the whole sequence: SiLU(u) ⊙ (relu(q kᵀ/n + b)² v).

    Args:
        uvz: (B, T, 2E + S), float64, float32 or bfloat16: the input projection before its SiLU, split into u, v, z.
        gamma, beta: (2, S): scale and offset of q and k. May be float32 beside a bfloat16 uvz.
        bias: (2L − 1,) with L ≥ T: the bias of query i on key j is bias[j − i + L − 1].
        norm_length: n, the training length, whatever T is.
        causal: a token reads itself and what is before it; else everything.
        doc_ids: (B, T) integers that do not decrease along T (only looked at on the CPU): nothing is read across
            documents. None: one document.
        start: position of the first token.
        rope_base: base of the rotary angles.

    Returns:
        (B, T, E) in uvz's dtype. Sums are taken in float32 (float64 for a float64 uvz).

    Raises:
        ValueError: an argument has an impossible shape, dtype, device or value; T is beyond the extent L of the bias;
            there are more than 65,535 sequences and the kernels run.
    """
    if bias.ndim != 1 or len(bias) % 2 == 0:
        raise ValueError(f"bias must have shape (2L − 1,): it has {tuple(bias.shape)}")
    check_projection(
        uvz, gamma, beta, bias, doc_ids, heads=2, bias_length=len(bias), bias_rule="2L − 1", rope_base=rope_base
    )
    T, L = uvz.shape[1], (len(bias) + 1) // 2
    if T > L:
        raise ValueError(
            f"uvz has T = {T} tokens, beyond the extent L = {L} of the bias: FLASH-Quad cannot read further"
        )
    if norm_length < 1:
        raise ValueError(f"norm_length must be positive: it is {norm_length}")
    if start < 0:
        raise ValueError(f"start must not be negative: it is {start}")
    S = gamma.shape[1]
    kernel = dispatch.use_kernel("quadratic_attention", uvz.device.type, uvz.dtype, (uvz.shape[2] - S) // 2, S)
    return torch.ops.flash_model.quadratic(
        uvz, gamma, beta, bias, doc_ids, norm_length, causal, start, rope_base, kernel
    )


@torch.library.custom_op("flash_model::quadratic", mutates_args=())
def _quadratic(
    uvz: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bias: Tensor,
    doc_ids: Tensor | None,
    norm_length: int,
    causal: bool,
    start: int,
    rope_base: float,
    kernel: bool,
) -> Tensor:
    inputs = reference.Inputs(uvz, gamma, beta, bias, doc_ids, norm_length, causal, start, rope_base)
    if kernel:
        from flash_model.ops import triton_quadratic

        return triton_quadratic.forward(inputs)
    return reference.forward(inputs)


@_quadratic.register_fake
def _(uvz: Tensor, gamma: Tensor, *_: Any) -> Tensor:
    return uvz.new_empty(*uvz.shape[:2], (uvz.shape[2] - gamma.shape[1]) // 2)


@torch.library.custom_op("flash_model::quadratic_backward", mutates_args=())
def _quadratic_backward(
    grad_out: Tensor,
    uvz: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bias: Tensor,
    doc_ids: Tensor | None,
    out: Tensor,
    norm_length: int,
    causal: bool,
    start: int,
    rope_base: float,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = reference.Inputs(uvz, gamma, beta, bias, doc_ids, norm_length, causal, start, rope_base)
    if kernel:
        from flash_model.ops import triton_quadratic

        return triton_quadratic.backward(grad_out, inputs, out)
    return reference.backward(grad_out, inputs)


@_quadratic_backward.register_fake
def _(
    grad_out: Tensor, uvz: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        uvz.new_empty(uvz.shape),
        gamma.new_empty(gamma.shape),
        beta.new_empty(beta.shape),
        bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5], output)
    ctx.options = inputs[5:]


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.flash_model.quadratic_backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, *(None for _ in ctx.options))


_quadratic.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.flash_model.quadratic)
def _forward_flops(uvz: Sequence[int], gamma: Sequence[int], *args: Any, **_: Any) -> int:
    B, T, width = uvz
    S, causal = gamma[1], args[4]
    return quadratic_flops(B * T, T, S, (width - S) // 2, causal)


@register_flop_formula(torch.ops.flash_model.quadratic_backward)
def _backward_flops(grad_out: Any, uvz: Sequence[int], gamma: Sequence[int], *args: Any, **_: Any) -> int:
    B, T, width = uvz
    S, causal = gamma[1], args[5]
    return 2 * quadratic_flops(B * T, T, S, (width - S) // 2, causal)
