"""Mixed chunk attention, the public op: checks, registration, derivative, FLOP count.

`flash_model::mixed_chunk` and its backward are `torch.library` ops on plain tensors. Whether they run the reference or
the Triton kernels is decided when they are called (dispatch.py) and is one of their arguments.
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flash_model.flops import mixed_chunk_flops
from flash_model.ops import dispatch, reference
from flash_model.ops.checks import INTEGERS, check_chunk_size, check_projection
from flash_model.ops.heads import accumulation_dtype
from flash_model.ops.state import AttentionState


@overload
def mixed_chunk_attention(
    uvz: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bias: Tensor,
    *,
    chunk_size: int = ...,
    causal: bool = ...,
    doc_ids: Tensor | None = ...,
    start: int = ...,
    state: AttentionState | None = ...,
    projection_bias: Tensor | None = ...,
    return_state: Literal[False] = ...,
    rope_base: float = ...,
) -> Tensor: ...


@overload
def mixed_chunk_attention(
    uvz: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bias: Tensor,
    *,
    chunk_size: int = ...,
    causal: bool = ...,
    doc_ids: Tensor | None = ...,
    start: int = ...,
    state: AttentionState | None = ...,
    projection_bias: Tensor | None = ...,
    return_state: Literal[True],
    rope_base: float = ...,
) -> tuple[Tensor, AttentionState]: ...


def mixed_chunk_attention(
    uvz: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bias: Tensor,
    *,
    chunk_size: int = 256,
    causal: bool = True,
    doc_ids: Tensor | None = None,
    start: int = 0,
    state: AttentionState | None = None,
    projection_bias: Tensor | None = None,
    return_state: bool = False,
    rope_base: float = 10000.0,
) -> Tensor | tuple[Tensor, AttentionState]:
    """Gated mixed chunk attention of FLASH (Hua et al. 2022): SiLU(u) ⊙ (local + global).

    Args:
        uvz: (B, T, 2E + S), float64, float32 or bfloat16: the input projection before its SiLU, split into u, v, z.
            Any B, T ≥ 1.
        gamma, beta: (4, S): scale and offset of quad_q, quad_k, lin_q, lin_k. May be float32 beside a bfloat16 uvz.
        bias: (2C − 1,): the bias of query i on key j of a chunk is bias[j − i + C − 1].
        chunk_size: C in tokens, a power of two. A short last chunk divides by C all the same, and counts as one.
        causal: a token reads its own chunk up to itself, and the mean over earlier chunks; else its own chunk and the
            mean over all.
        doc_ids: (B, T) integers that do not decrease along T (only looked at on the CPU): nothing is read across
            documents. None: one document, numbered 0.
        start: position of the first token, a multiple of C.
        state: of the piece of the sequence before this one (causal only); tokens of another document ignore it. Its
            count is at most start / C (only looked at on the CPU).
        projection_bias: (2E + S,), the bias that uvz already contains, detached there. Its gradient, the sum of uvz's
            over all tokens, comes with uvz's and saves a pass over it.
        return_state: also return the state after the last token; T must then be a multiple of C.
        rope_base: base of the rotary angles.

    Returns:
        (B, T, E) in uvz's dtype; with `return_state`, that and the AttentionState. Sums are taken in float32 (float64
        for a float64 uvz). Gradients reach uvz, gamma, beta, bias and state.sum, also through the returned sum.

    Raises:
        ValueError: an argument has an impossible shape, dtype, device or value, or there are more than 65,535 chunks
            and the kernels run.
    """
    check_chunk_size(chunk_size)
    check_projection(
        uvz,
        gamma,
        beta,
        bias,
        doc_ids,
        heads=4,
        bias_length=2 * chunk_size - 1,
        bias_rule="2·chunk_size − 1",
        rope_base=rope_base,
        projection_bias=projection_bias,
    )
    _check_state(uvz, gamma, chunk_size, causal, start, state, return_state)
    S = gamma.shape[1]
    kernel = dispatch.use_kernel(
        "mixed_chunk_attention", uvz.device.type, uvz.dtype, (uvz.shape[2] - S) // 2, S, chunk_size
    )
    out, left_sum, left_count, left_doc_id, _ = torch.ops.flash_model.mixed_chunk(
        uvz,
        gamma,
        beta,
        bias,
        projection_bias,
        doc_ids,
        None if state is None else state.sum,
        None if state is None else state.count.to(torch.int64),
        None if state is None else state.doc_id.to(torch.int64),
        chunk_size,
        causal,
        start,
        rope_base,
        return_state,
        kernel,
    )
    if not return_state:
        return out
    return out, AttentionState(left_sum, left_count, left_doc_id, _is_single(uvz, doc_ids, state))


def _is_single(uvz: Tensor, doc_ids: Tensor | None, state: AttentionState | None) -> Tensor | None:
    first = uvz.new_zeros(len(uvz), dtype=torch.int64) if doc_ids is None else doc_ids[:, 0]
    single = torch.ones_like(first, dtype=torch.bool) if doc_ids is None else first == doc_ids[:, -1]
    if state is None:
        return single
    if state.single is None:
        return None
    return single & ((state.count == 0) | (state.single & (state.doc_id == first)))


def _check_state(
    uvz: Tensor,
    gamma: Tensor,
    chunk_size: int,
    causal: bool,
    start: int,
    state: AttentionState | None,
    return_state: bool,
) -> None:
    B, T, width = uvz.shape
    S = gamma.shape[1]
    if start < 0 or start % chunk_size:
        raise ValueError(f"start must be a multiple of chunk_size {chunk_size}, not negative: it is {start}")
    if not causal and (state is not None or return_state):
        raise ValueError("state and return_state need causal=True: a bidirectional sequence cannot be read in pieces")
    if return_state and T % chunk_size:
        raise ValueError(f"return_state needs T to be a multiple of chunk_size {chunk_size}: T is {T}")
    if state is None:
        return
    expected = (B, S, (width - S) // 2)
    if state.sum.shape != expected:
        raise ValueError(f"state.sum must have shape (B, S, E) = {expected}: it has {tuple(state.sum.shape)}")
    if not state.sum.is_floating_point():
        raise ValueError(f"state.sum must be floating point: it is {state.sum.dtype}")
    for name, tensor in (("count", state.count), ("doc_id", state.doc_id)):
        if tensor.shape != (B,):
            raise ValueError(f"state.{name} must have shape (B,) = ({B},): it has {tuple(tensor.shape)}")
        if tensor.dtype not in INTEGERS:
            raise ValueError(f"state.{name} must be signed integers or uint8: they are {tensor.dtype}")
    for name, tensor in (("sum", state.sum), ("count", state.count), ("doc_id", state.doc_id)):
        if tensor.device != uvz.device:
            raise ValueError(f"state.{name} is on {tensor.device}, uvz on {uvz.device}")


@torch.library.custom_op("flash_model::mixed_chunk", mutates_args=())
def _mixed_chunk(
    uvz: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bias: Tensor,
    projection_bias: Tensor | None,
    doc_ids: Tensor | None,
    state_sum: Tensor | None,
    state_count: Tensor | None,
    state_doc_id: Tensor | None,
    chunk_size: int,
    causal: bool,
    start: int,
    rope_base: float,
    return_state: bool,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = reference.Inputs(
        uvz, gamma, beta, bias, doc_ids, state_sum, state_count, state_doc_id, chunk_size, causal, start, rope_base
    )
    if kernel:
        from flash_model.ops import triton_mixed_chunk

        return triton_mixed_chunk.forward(inputs, return_state=return_state)
    out, *left = reference.forward(inputs)
    if not return_state:
        left = [x.new_empty(0) for x in left]
    return out, left[0], left[1].clone(), left[2].clone(), uvz.new_empty(0)


@_mixed_chunk.register_fake
def _(
    uvz: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor, projection_bias: Tensor | None, doc_ids: Tensor | None,
    state_sum: Any, state_count: Any, state_doc_id: Any, chunk_size: int, causal: bool, start: int, rope_base: float,
    return_state: bool, kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, width = uvz.shape
    S = gamma.shape[1]
    E = (width - S) // 2
    ids = uvz.new_empty(B if return_state else 0, dtype=torch.int64)
    left = uvz.new_empty((B, S, E) if return_state else (0,), dtype=accumulation_dtype(uvz))
    states = uvz.new_empty(0)
    if kernel:
        states = uvz.new_empty(states_shape(B, T, S, E, chunk_size, causal, doc_ids is not None))
    return uvz.new_empty(B, T, E), left, ids, torch.empty_like(ids), states


def states_shape(B: int, T: int, S: int, E: int, chunk_size: int, causal: bool, docs: bool) -> tuple[int, ...]:
    """Shape of the states that the kernels keep for backward: for each chunk, and for each route on which it reads."""
    if not causal and not docs:
        return B, 1, S, E
    return B, -(-T // chunk_size), S if causal else 2 * S, E


@torch.library.custom_op("flash_model::mixed_chunk_backward", mutates_args=())
def _mixed_chunk_backward(
    grad_out: Tensor,
    grad_left: Tensor | None,
    uvz: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bias: Tensor,
    doc_ids: Tensor | None,
    state_sum: Tensor | None,
    state_count: Tensor | None,
    state_doc_id: Tensor | None,
    out: Tensor,
    states: Tensor,
    chunk_size: int,
    causal: bool,
    start: int,
    rope_base: float,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = reference.Inputs(
        uvz, gamma, beta, bias, doc_ids, state_sum, state_count, state_doc_id, chunk_size, causal, start, rope_base
    )
    if kernel:
        from flash_model.ops import triton_mixed_chunk

        return triton_mixed_chunk.backward(grad_out, grad_left, inputs, out, states)
    grads = reference.backward(grad_out, grad_left, inputs)
    return (*grads, grads[0].sum((0, 1), dtype=accumulation_dtype(uvz)))


@_mixed_chunk_backward.register_fake
def _(
    grad_out: Tensor,
    grad_left: Tensor | None,
    uvz: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bias: Tensor,
    doc_ids: Tensor | None,
    state_sum: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_state = uvz.new_empty(0, dtype=accumulation_dtype(uvz))
    if state_sum is not None:
        grad_state = state_sum.new_empty(state_sum.shape)
    grads = [x.new_empty(x.shape) for x in (uvz, gamma, beta, bias)]
    return *grads, grad_state, uvz.new_empty(uvz.shape[2], dtype=accumulation_dtype(uvz))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    uvz, gamma, beta, bias, projection_bias, *others = inputs
    causal, return_state = others[5], others[8]
    ctx.save_for_backward(uvz, gamma, beta, bias, *others[:4], output[0], output[4])
    ctx.options = (*others[4:8], others[9])
    ctx.projection_bias_dtype = None if projection_bias is None else projection_bias.dtype
    ctx.mark_non_differentiable(*output[2 if causal and return_state else 1 :])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_out: Tensor | None, grad_left: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(saved[8])
    uvz, gamma, beta, bias, state, token_sums = torch.ops.flash_model.mixed_chunk_backward(
        grad_out, grad_left, *saved, *ctx.options
    )
    projection_bias = None if ctx.projection_bias_dtype is None else token_sums.to(ctx.projection_bias_dtype)
    return (uvz, gamma, beta, bias, projection_bias, None, None if saved[5] is None else state, *(None,) * 8)


_mixed_chunk.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.flash_model.mixed_chunk)
def _forward_flops(uvz: Sequence[int], gamma: Sequence[int], *args: Any, **_: Any) -> int:
    B, T, width = uvz
    S = gamma[1]
    chunk_size, causal = args[7], args[8]
    return mixed_chunk_flops(B * T, T, S, (width - S) // 2, chunk_size, causal)


@register_flop_formula(torch.ops.flash_model.mixed_chunk_backward)
def _backward_flops(
    grad_out: Any, grad_left: Any, uvz: Sequence[int], gamma: Sequence[int], *args: Any, **_: Any
) -> int:
    B, T, width = uvz
    S = gamma[1]
    chunk_size, causal = args[8], args[9]
    return 2 * mixed_chunk_flops(B * T, T, S, (width - S) // 2, chunk_size, causal)
