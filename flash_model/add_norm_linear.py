"""What stands before an attention op, as one op: add the last update, normalise, project.

Shape letters: N tokens, D model, P projected.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flash_model.norms import normalize

HAS_TRITON = find_spec("triton") is not None


def add_norm_linear(
    x: Tensor,
    update: Tensor | None,
    update_bias: Tensor | None,
    gain: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor]:
    """Return x + update + update_bias, and normalize(that) · weightᵀ + bias.

    x, update: (..., D), update None: nothing is added, nor its bias, and x itself returned; update_bias (or None),
    gain, shift: (D,); weight: (P, D); bias: (P,) or None; all of one dtype. On a GPU, in bfloat16 and float32, sum and
    norm take one pass each way, with update_bias' gradient in it, and the sum is all that is kept for backward: the
    norm is made again there, on the way.
    """
    if not _has_kernels(x):
        if update is not None and update_bias is not None:
            update = update + update_bias
        total = x if update is None else x + update
        return total, F.linear(normalize(total, gain, shift, center=center, eps=eps), weight, bias)
    flat = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, update))
    total, projected, _, _ = torch.ops.flash_model.add_norm_linear(
        *flat, update_bias, gain, shift, weight, bias, eps, center
    )
    return x if update is None else total.view(x.shape), projected.view(*x.shape[:-1], len(weight))


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float32) and HAS_TRITON


@torch.library.custom_op("flash_model::add_norm_linear", mutates_args=())
def _add_norm_linear(
    x_ND: Tensor,
    update_ND: Tensor | None,
    update_bias_D: Tensor | None,
    gain_D: Tensor,
    shift_D: Tensor,
    weight_PD: Tensor,
    bias_P: Tensor | None,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sum (empty where there is no update), the projection, and of each row mean and scale, float32."""
    from flash_model import triton_add_norm

    update_ND = None if update_ND is None else update_ND.contiguous()
    total_ND, normed_ND, mean_N, scale_N = triton_add_norm.forward(
        x_ND.contiguous(), update_ND, update_bias_D, gain_D, shift_D, eps=eps, center=center
    )
    return total_ND, F.linear(normed_ND, weight_PD, _aligned(bias_P)), mean_N, scale_N


def _aligned(vector: Tensor | None) -> Tensor | None:
    """Return the vector at an address that is a multiple of 16 bytes, copied if need be.

    In DeepSpeed's flat buffers a parameter lies behind others of any length; cuBLAS then takes kernels of years ago for
    the whole product.
    """
    return vector if vector is None or vector.data_ptr() % 16 == 0 else vector.clone()


@_add_norm_linear.register_fake
def _(
    x_ND: Tensor, update_ND: Tensor | None, update_bias_D: Any, gain_D: Any, shift_D: Any, weight_PD: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N = len(x_ND)
    total_ND = x_ND.new_empty(0 if update_ND is None else x_ND.shape)
    rows = (x_ND.new_empty(N, dtype=torch.float32) for _ in range(2))
    return total_ND, x_ND.new_empty(N, len(weight_PD)), *rows  # type: ignore[return-value]


@torch.library.custom_op("flash_model::add_norm_linear_backward", mutates_args=())
def _add_norm_linear_backward(
    grad_projected_NP: Tensor,
    grad_total_ND: Tensor | None,
    total_ND: Tensor,
    mean_N: Tensor,
    scale_N: Tensor,
    gain_D: Tensor,
    shift_D: Tensor,
    weight_PD: Tensor,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of total, of gain, shift and update_bias (3, D), and of weight, in their inputs' dtype."""
    from flash_model import triton_add_norm

    grad_total_ND = None if grad_total_ND is None else grad_total_ND.contiguous()
    grad_ND, normed_ND, sums_3D = triton_add_norm.backward(
        grad_projected_NP @ weight_PD, grad_total_ND, total_ND.contiguous(), mean_N, scale_N, gain_D, shift_D,
        center=center,
    )  # fmt: skip
    return grad_ND, sums_3D.to(gain_D.dtype), grad_projected_NP.T @ normed_ND


@_add_norm_linear_backward.register_fake
def _(
    grad_projected_NP: Tensor,
    grad_total_ND: Tensor | None,
    total_ND: Tensor,
    mean_N: Tensor,
    scale_N: Tensor,
    gain_D: Tensor,
    shift_D: Tensor,
    weight_PD: Tensor,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sums_3D = gain_D.new_empty(3, len(gain_D))
    return total_ND.new_empty(total_ND.shape), sums_3D, weight_PD.new_empty(weight_PD.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_ND, update_ND, _, gain_D, shift_D, weight_PD, *_, center = inputs
    total_ND, _, mean_N, scale_N = output
    ctx.save_for_backward(x_ND if update_ND is None else total_ND, mean_N, scale_N, gain_D, shift_D, weight_PD)
    ctx.center, ctx.has_update = center, update_ND is not None
    ctx.mark_non_differentiable(mean_N, scale_N, *(() if ctx.has_update else (total_ND,)))
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_total_ND: Tensor | None, grad_projected_NP: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    has_update, has_update_bias = ctx.has_update, ctx.needs_input_grad[2]
    if grad_projected_NP is None:
        grad_update_ND = grad_total_ND if has_update else None
        grad_update_bias_D = grad_update_ND.sum(0) if has_update_bias and grad_update_ND is not None else None
        return grad_total_ND, grad_update_ND, grad_update_bias_D, *(None,) * 6
    grad_ND, sums_3D, grad_weight_PD = torch.ops.flash_model.add_norm_linear_backward(
        grad_projected_NP, grad_total_ND if has_update else None, *ctx.saved_tensors, ctx.center
    )
    grad_gain_D, grad_shift_D, grad_update_bias_D = sums_3D
    grad_bias_P = grad_projected_NP.sum(0) if ctx.needs_input_grad[6] else None
    grad_update = (grad_ND if has_update else None, grad_update_bias_D if has_update and has_update_bias else None)
    return grad_ND, *grad_update, grad_gain_D, grad_shift_D, grad_weight_PD, grad_bias_P, None, None


_add_norm_linear.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.flash_model.add_norm_linear)
def _forward_flops(
    x: Sequence[int], update: Any, update_bias: Any, gain: Any, shift: Any, weight: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * x[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.flash_model.add_norm_linear_backward)
def _backward_flops(grad: Sequence[int], *args: Any, **_: Any) -> int:
    weight = args[6]
    return 4 * grad[0] * weight[0] * weight[1]
