"""FLASH-Quad's attention on Triton kernels: the same functions as reference_quadratic.py.

Scores are made a strip at a time, STRIP queries (backward: STRIP keys) against all that they meet, and used up by plain
matrix products before the next strip: memory grows with B · T · STRIP, never with T². Writing a strip costs less than
making its scores again for every tile of values: 128 columns of q and k stand against E of values.

No atomics: what strips share is added up in their order, so the bits of two runs are the same.

Shape letters: B batch, T time, P = T padded, S query/key, E values; R, K rows and keys of a strip. A row is a query.
"""

from collections.abc import Iterator
from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_model.ops import triton_quadratic_kernels as kernels
from flash_model.ops.reference_quadratic import Inputs
from flash_model.ops.triton_math import INTERPRETED
from flash_model.positions import cos_sin

STRIP = 2048
MOST_SEQUENCES = 65_535  # a grid's second and third dimension hold no more
_PADDING = kernels.GRAIN.value
_SCORE_PROGRAMS = 2048  # several times what a GPU runs at once


class Launch(NamedTuple):
    """A kernel's tile, its step along the dimension that is summed over, its warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self, width: int) -> dict[str, Any]:
        """Keyword arguments of a launch whose columns divide `width`."""
        blocks = {"ROWS": self.rows, "COLUMNS": gcd(self.columns, width), "DEPTH": self.depth}
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages}


# Chosen once, by timing on an H100, never at run time. Rows and columns are at most 256, the padding of a sequence.
LAUNCHES: dict[torch.dtype, dict[str, Launch]] = {
    torch.bfloat16: {
        "scores": Launch(64, 64, 64, 4, 2),
        "attend": Launch(128, 256, 64, 8, 3),
        "score_grads": Launch(256, 128, 64, 8, 4),
        "key_grads": Launch(128, 256, 64, 8, 4),
        "query_grads": Launch(64, 128, 64, 4, 3),
    },
    torch.float32: {
        "scores": Launch(64, 64, 16, 8, 2),
        "attend": Launch(64, 64, 16, 8, 2),
        "score_grads": Launch(64, 64, 16, 8, 2),
        "key_grads": Launch(64, 64, 16, 8, 2),
        "query_grads": Launch(64, 64, 16, 8, 2),
    },
}


class _Strip(NamedTuple):
    """Which scores are in memory at a time."""

    row0: int
    rows: int
    key0: int
    keys: int


class _Call(NamedTuple):
    """Sizes and operands of a call: q, k (B·P, S) and values (B·P, E), 0 in the padding; bias (2P,): key − row + P."""

    inputs: Inputs
    B: int
    T: int
    P: int
    E: int
    S: int
    q: Tensor
    k: Tensor
    values: Tensor
    bias: Tensor
    cos: Tensor
    sin: Tensor

    def strips_of_rows(self) -> Iterator[_Strip]:
        """Yield strips of rows, each with all keys that they read."""
        for row0 in range(0, self.P, STRIP):
            rows = min(STRIP, self.P - row0)
            yield _Strip(row0, rows, 0, row0 + rows if self.inputs.causal else self.P)

    def strips_of_keys(self) -> Iterator[_Strip]:
        """Yield strips of keys, each with all rows that read them."""
        for key0 in range(0, self.P, STRIP):
            row0 = key0 if self.inputs.causal else 0
            yield _Strip(row0, self.P - row0, key0, min(STRIP, self.P - key0))


def forward(inputs: Inputs) -> Tensor:
    """Return SiLU(u) ⊙ attended, (B, T, E) in uvz's dtype, bfloat16 or float32."""
    call = _prepare(inputs)
    out = inputs.uvz.new_empty(call.B, call.T, call.E)
    weights = call.values.new_empty(call.B, min(STRIP, call.P), call.P)
    for strip in call.strips_of_rows():
        _write_scores(call, strip, weights)
        _attend(call, strip, weights, out)
    return out


def backward(grad_out: Tensor, inputs: Inputs, out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of uvz, gamma, beta and bias for grad_out (B, T, E), each in its input's dtype.

    `out` is what `forward` returned: what was attended is read back from it.
    """
    call = _prepare(inputs)
    B, T, P = call.B, call.T, call.P
    grad_uvz = torch.empty_like(call.inputs.uvz)
    grad_attended = _gate_backward(call, grad_out.contiguous(), out.contiguous(), grad_uvz)
    weights = call.values.new_empty(B, P, min(STRIP, P))
    grad_scores = torch.empty_like(weights)
    grad_heads = weights.new_empty(2, B * P, call.S, dtype=torch.float32)
    diagonals = weights.new_zeros(triton.cdiv(P, STRIP), B, 2 * P, dtype=torch.float32)
    for strip, sums in zip(call.strips_of_keys(), diagonals, strict=True):
        _write_scores(call, strip, weights)
        _write_score_grads(call, strip, grad_attended, weights, grad_scores)
        _write_key_grads(call, strip, grad_attended, weights, grad_scores, grad_uvz, grad_heads[1])
        _add_query_grads(call, strip, grad_scores, grad_heads[0])
        _write_diagonals(call, strip, grad_scores, sums)
    grad_gamma, grad_beta = _heads_backward(call, grad_heads, grad_uvz)
    grad_bias = torch.zeros_like(inputs.bias, dtype=torch.float32)
    grad_bias[_reached(inputs.bias, T)] = diagonals.sum((0, 1))[P - T + 1 : P + T]
    return (
        grad_uvz,
        grad_gamma.to(inputs.gamma.dtype),
        grad_beta.to(inputs.beta.dtype),
        grad_bias.to(inputs.bias.dtype),
    )


def _reached(bias: Tensor, T: int) -> slice:
    """The part of bias (2L − 1,) that T tokens read."""
    centre = len(bias) // 2
    return slice(centre - T + 1, centre + T)


@lru_cache(maxsize=8)
def _angles(start: int, T: int, half: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    return cos_sin(start, T, half, base=base, block=256, dtype=torch.float32, device=device)


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def _prepare(inputs: Inputs) -> _Call:
    if len(inputs.uvz) > MOST_SEQUENCES:
        raise ValueError(
            f"uvz holds {len(inputs.uvz):,} sequences: the kernels take at most {MOST_SEQUENCES:,} in one call; split "
            "the batch, or set FLASH_OP=reference"
        )
    docs = None if inputs.doc_ids is None else inputs.doc_ids.contiguous()
    inputs = inputs._replace(
        uvz=inputs.uvz.contiguous(), gamma=inputs.gamma.contiguous(), beta=inputs.beta.contiguous(), doc_ids=docs
    )
    uvz = inputs.uvz
    B, T, width = uvz.shape
    S = inputs.gamma.shape[1]
    E, P = (width - S) // 2, triton.cdiv(T, _PADDING) * _PADDING
    dtype = torch.float32 if INTERPRETED else uvz.dtype
    cos, sin = _angles(inputs.start, T, S // 2, inputs.rope_base, uvz.device)
    heads, values = uvz.new_empty(2, B * P, S, dtype=dtype), uvz.new_empty(B * P, E, dtype=dtype)
    rows, columns = 32, gcd(E, 256)
    kernels.prepare_kernel[(B * P // rows, 1 + E // columns)](
        uvz, inputs.gamma, inputs.beta, cos, sin, heads, values, T, P, heads.stride(0),
        E=E, S=S, PAIRS=triton.next_power_of_2(S // 2), ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
    bias = F.pad(inputs.bias[_reached(inputs.bias, T)].float(), (P - T + 1, P - T))
    return _Call(inputs, B, T, P, E, S, heads[0], heads[1], values, bias, cos, sin)


def _write_scores(call: _Call, strip: _Strip, weights: Tensor) -> None:
    """Write relu(q kᵀ/n + b)² of a strip, 0 where a row may not read."""
    launch = LAUNCHES[weights.dtype]["scores"]
    docs = call.inputs.doc_ids
    tiles = (strip.rows // launch.rows, strip.keys // launch.columns)
    turns = min(call.B, triton.cdiv(_SCORE_PROGRAMS, tiles[0] * tiles[1]))
    kernels.scores_kernel[(*tiles, turns)](
        _descriptor(call.q, launch.rows, launch.depth), _descriptor(call.k, launch.columns, launch.depth), call.bias,
        call.bias if docs is None else docs, weights,
        call.B, call.T, call.P, strip.row0, strip.key0, weights.shape[1], weights.shape[2], 1 / call.inputs.norm_length,
        S=call.S, CAUSAL=call.inputs.causal, DOCS=docs is not None, **launch.options(launch.columns),
    )  # fmt: skip


def _attend(call: _Call, strip: _Strip, weights: Tensor, out: Tensor) -> None:
    """Write the rows of a strip of out (B, T, E)."""
    launch = LAUNCHES[weights.dtype]["attend"]
    options = launch.options(call.E)
    row_tiles = strip.rows // launch.rows
    kernels.attend_kernel[(call.B * row_tiles * (call.E // options["COLUMNS"]),)](
        _descriptor(weights.view(-1, call.P), launch.rows, launch.depth),
        _descriptor(call.values, launch.depth, options["COLUMNS"]), call.inputs.uvz, out,
        call.T, call.P, strip.row0, weights.shape[1], row_tiles,
        E=call.E, S=call.S, CAUSAL=call.inputs.causal, **options,
    )  # fmt: skip


def _gate_backward(call: _Call, grad_out: Tensor, out: Tensor, grad_uvz: Tensor) -> Tensor:
    """Write the gradient of u, return that of what was attended (B·P, E), 0 in the padding."""
    grad_attended = torch.empty_like(call.values)
    rows, columns = 32, gcd(call.E, 256)
    kernels.gate_backward_kernel[(call.B * call.P // rows, call.E // columns)](
        grad_out, out, call.inputs.uvz, grad_uvz, grad_attended, call.T, call.P,
        E=call.E, S=call.S, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
    return grad_attended


def _write_score_grads(call: _Call, strip: _Strip, grad_attended: Tensor, weights: Tensor, grad_scores: Tensor) -> None:
    """Write the gradient of q kᵀ/n + b of a strip of keys."""
    launch = LAUNCHES[weights.dtype]["score_grads"]
    row_tiles, key_tiles = strip.rows // launch.rows, strip.keys // launch.columns
    kernels.score_grads_kernel[(call.B * row_tiles * key_tiles,)](
        _descriptor(grad_attended, launch.rows, launch.depth), _descriptor(call.values, launch.columns, launch.depth),
        weights, grad_scores,
        call.P, strip.row0, strip.key0, weights.shape[1], weights.shape[2], row_tiles, key_tiles,
        E=call.E, CAUSAL=call.inputs.causal, **launch.options(launch.columns),
    )  # fmt: skip


def _write_key_grads(
    call: _Call,
    strip: _Strip,
    grad_attended: Tensor,
    weights: Tensor,
    grad_scores: Tensor,
    grad_uvz: Tensor,
    grad_k: Tensor,
) -> None:
    """Write the gradients of v, into grad_uvz, and of k (B·P, S) of a strip's keys."""
    launch = LAUNCHES[weights.dtype]["key_grads"]
    options = launch.options(call.E)
    columns, head_columns = options["COLUMNS"], gcd(call.S, launch.columns)
    key_tiles = strip.keys // launch.rows
    kernels.key_grads_kernel[(call.B * key_tiles * (call.E // columns + call.S // head_columns),)](
        _descriptor(weights.view(-1, weights.shape[2]), launch.depth, launch.rows),
        _descriptor(grad_scores.view(-1, weights.shape[2]), launch.depth, launch.rows),
        _descriptor(grad_attended, launch.depth, columns), _descriptor(call.q, launch.depth, head_columns),
        call.inputs.uvz, grad_uvz, grad_k,
        call.T, call.P, strip.row0, strip.key0, weights.shape[1], key_tiles, 1 / call.inputs.norm_length,
        E=call.E, S=call.S, CAUSAL=call.inputs.causal, HEAD_COLUMNS=head_columns, **options,
    )  # fmt: skip


def _add_query_grads(call: _Call, strip: _Strip, grad_scores: Tensor, grad_q: Tensor) -> None:
    """Add what a strip of keys gives to the gradient of q (B·P, S); the first, that all rows read, writes it."""
    launch = LAUNCHES[grad_scores.dtype]["query_grads"]
    options = launch.options(call.S)
    kernels.query_grads_kernel[(strip.rows // launch.rows, call.S // options["COLUMNS"], call.B)](
        _descriptor(grad_scores.view(-1, grad_scores.shape[2]), launch.rows, launch.depth),
        _descriptor(call.k, launch.depth, options["COLUMNS"]), grad_q,
        call.P, strip.row0, strip.key0, grad_scores.shape[1], strip.keys, 1 / call.inputs.norm_length,
        FIRST=strip.key0 == 0, S=call.S, CAUSAL=call.inputs.causal, **options,
    )  # fmt: skip


def _write_diagonals(call: _Call, strip: _Strip, grad_scores: Tensor, sums: Tensor) -> None:
    """Write a strip's sums over diagonals (B, 2P): element key − row + P."""
    columns = 128
    count = strip.rows if call.inputs.causal else strip.rows + strip.keys - 1
    kernels.diagonals_kernel[(triton.cdiv(count, columns), call.B)](
        grad_scores, sums, call.P, strip.row0, strip.key0, grad_scores.shape[1], grad_scores.shape[2], strip.keys,
        strip.key0 - call.P + 1, CAUSAL=call.inputs.causal, ROWS=32, COLUMNS=columns,
    )  # fmt: skip


def _heads_backward(call: _Call, grad_heads: Tensor, grad_uvz: Tensor) -> tuple[Tensor, Tensor]:
    """Write the gradient of z, return those of gamma and beta (2, S)."""
    rows = 32
    partial = grad_heads.new_empty(call.B * call.P // rows, 4, call.S)
    kernels.heads_backward_kernel[(len(partial),)](
        grad_heads, call.inputs.uvz, call.inputs.gamma, call.cos, call.sin, grad_uvz, partial,
        call.T, call.P, grad_heads.stride(0),
        E=call.E, S=call.S, PAIRS=triton.next_power_of_2(call.S // 2), ROWS=rows,
    )  # fmt: skip
    grad_gamma, grad_beta = partial.sum(0).split(2)
    return grad_gamma.clone(), grad_beta.clone()
