"""Mixed chunk attention on Triton kernels: the same function as reference.py.

Four kernels forward (heads and scores; chunk sums; scan; output), six backward. Between them stand, for each chunk of
C tokens, its weights (C, C), its linear queries and keys (C, L) and a state (L, E), all in uvz's dtype; only the states
are kept for backward. Sums are taken in float32, without atomics: the bits of two runs are the same.

Shape letters: B batch, T time, G chunks, N = B·G, C chunk, S query/key, L = S · routes, E values.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flash_model.ops.reference import Inputs
from flash_model.ops.triton_mixed_chunk_heads import (
    column_sums_kernel,
    diagonals_kernel,
    heads_backward_kernel,
    heads_kernel,
    scores_kernel,
)
from flash_model.ops.triton_mixed_chunk_products import (
    chunk_sums_kernel,
    contractions_kernel,
    gate_backward_kernel,
    output_kernel,
    scan_kernel,
    values_backward_kernel,
)
from flash_model.positions import frequencies


class Launch(NamedTuple):
    """How a kernel is launched: its block sizes, warps and pipeline stages."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int = 1
    registers: int | None = None  # the most that a thread may have: fewer registers, more programs at a time

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


# Chosen once, by timing on an H100, never at run time: the bits of a run do not depend on a race between candidates.
# BLOCK_E and BLOCK_L are upper bounds: 64 where E or L is no multiple of 128.
LAUNCHES: dict[torch.dtype, dict[str, Launch]] = {
    torch.bfloat16: {
        "heads": Launch({"ROWS": 32}, 4),
        "scores": Launch({"ROWS": 128}, 8),
        "chunk_sums": Launch({"BLOCK_L": 128, "BLOCK_E": 128, "STEP": 64, "STAGES": 3}, 4),
        "scan": Launch({"BLOCK": 512, "AHEAD": 8}, 4),
        "output": Launch({"ROWS": 128, "BLOCK_E": 128, "STEP": 64, "STAGES": 3}, 8),
        "gate_backward": Launch({"BLOCK_L": 128, "BLOCK_E": 128, "STEP": 64, "STAGES": 2}, 8),
        "values_backward": Launch({"ROWS": 128, "BLOCK_E": 128, "STEP": 64, "STAGES": 3}, 8),
        "contractions": Launch({"ROWS": 128, "BLOCK_L": 128, "STEP": 64, "STAGES": 3}, 8),
        "heads_backward": Launch({"ROWS": 64, "OTHERS": 64}, 4),
    },
    torch.float32: {
        "heads": Launch({"ROWS": 32}, 4),
        "scores": Launch({"ROWS": 64}, 8),
        "chunk_sums": Launch({"BLOCK_L": 64, "BLOCK_E": 64, "STEP": 32, "STAGES": 1}, 4),
        "scan": Launch({"BLOCK": 512, "AHEAD": 8}, 4),
        "output": Launch({"ROWS": 64, "BLOCK_E": 64, "STEP": 32, "STAGES": 1}, 4),
        "gate_backward": Launch({"BLOCK_L": 64, "BLOCK_E": 64, "STEP": 32, "STAGES": 1}, 4),
        "values_backward": Launch({"ROWS": 64, "BLOCK_E": 64, "STEP": 32, "STAGES": 1}, 4),
        "contractions": Launch({"ROWS": 64, "BLOCK_L": 64, "STEP": 32, "STAGES": 1}, 4),
        "heads_backward": Launch({"ROWS": 64, "OTHERS": 64}, 8),
    },
}


@functools.lru_cache(maxsize=16)
def _rotary_tables(start: int, chunks: int, C: int, H: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the chunks' starts (G, 2, H) and of the offsets in a chunk (C, 2, H), float32 of float64."""
    frequency = frequencies(H, base)
    starts = (start + C * torch.arange(chunks, dtype=torch.float64))[:, None] * frequency
    offsets = torch.arange(C, dtype=torch.float64)[:, None] * frequency
    tables = (torch.stack([angle.cos(), angle.sin()], 1).float().to(device) for angle in (starts, offsets))
    return next(tables), next(tables)


@dataclass(frozen=True)
class _Call:
    """What every kernel of one call needs: tensors, sizes, launches."""

    inputs: Inputs
    B: int
    T: int
    G: int
    C: int
    S: int
    E: int
    docs: bool
    two: bool  # bidirectional with documents: one route from before, one from behind
    total: bool  # bidirectional without: every chunk reads the sum of all

    @classmethod
    def of(cls, inputs: Inputs) -> "_Call":
        B, T, width = inputs.uvz.shape
        S, C = inputs.gamma.shape[1], inputs.chunk_size
        docs = inputs.doc_ids is not None
        inputs = inputs._replace(
            uvz=inputs.uvz if inputs.uvz.stride(2) == 1 else inputs.uvz.contiguous(),
            gamma=inputs.gamma.contiguous(),
            beta=inputs.beta.contiguous(),
            bias=inputs.bias.contiguous(),
            doc_ids=None if inputs.doc_ids is None else inputs.doc_ids.contiguous(),
            state_sum=None if inputs.state_sum is None else inputs.state_sum.contiguous(),
        )
        two, total = docs and not inputs.causal, not docs and not inputs.causal
        return cls(inputs, B, T, -(-T // C), C, S, (width - S) // 2, docs, two, total)

    @property
    def N(self) -> int:
        return self.B * self.G

    @property
    def L(self) -> int:
        return 2 * self.S if self.two else self.S

    @property
    def whole(self) -> bool:
        return self.T % self.C == 0

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.inputs.uvz.dtype, device=self.inputs.uvz.device)

    def launch(self, name: str) -> Launch:
        launch = LAUNCHES[self.inputs.uvz.dtype][name]
        blocks = dict(launch.blocks)
        for block, extent in (("BLOCK_E", self.E), ("BLOCK_L", self.L)):
            while block in blocks and extent % blocks[block]:
                blocks[block] //= 2
        return launch._replace(blocks=blocks)

    def block_pairs(self, launch: Launch) -> int:
        """How many blocks of scores a chunk has."""
        blocks = self.C // launch.blocks["ROWS"]
        return blocks * (blocks + 1) // 2 if self.inputs.causal else blocks * blocks

    @property
    def uvz_strides(self) -> tuple[int, int]:
        return self.inputs.uvz.stride(0), self.inputs.uvz.stride(1)

    def state_strides(self, states: Tensor) -> tuple[int, int]:
        """Steps of a (B, G or 1, L, E) tensor by sequence and by chunk."""
        return states.stride(0), 0 if self.total else states.stride(1)

    def head_arguments(self) -> tuple[Any, ...]:
        inputs = self.inputs
        tables = _rotary_tables(inputs.start, self.G, self.C, self.S // 2, inputs.rope_base, inputs.uvz.device)
        return inputs.doc_ids, inputs.state_count, inputs.state_doc_id, *tables

    def head_constants(self) -> dict[str, Any]:
        return {
            "E": self.E,
            "S": self.S,
            "C": self.C,
            "H2": triton.next_power_of_2(self.S // 2),
            "G2": triton.next_power_of_2(self.G) if self.docs else 1,
            "CAUSAL": self.inputs.causal,
            "DOCS": self.docs,
            "HAS_STATE": self.inputs.state_count is not None,
        }


class _Heads(NamedTuple):
    """The four heads, linear ones with the weights of reading and writing.

    Beside lin_q (forward) or lin_k (backward) stand the scores' weights, so that products with both are one.
    """

    quad_q: Tensor  # (N, C, S)
    quad_k: Tensor
    own_q: Tensor | None  # (N, C, S), only where own chunks are read linearly
    own_k: Tensor | None
    queries: Tensor  # (N, C, L + C): lin_q, weights; backward (N, C, L): lin_q
    keys: Tensor  # (N, C, L): lin_k; backward (N, C, C + L): weightsᵀ, lin_k
    relu: Tensor | None  # (N, C, C), only where own chunks are read linearly


def _make_heads(call: _Call, *, backward: bool) -> _Heads:
    inputs, N, C, S, L = call.inputs, call.N, call.C, call.S, call.L
    own_q, own_k, relu = (call.new(N, C, S), call.new(N, C, S), call.new(N, C, C)) if call.two else (None,) * 3
    queries, keys = call.new(N, C, L if backward else L + C), call.new(N, C, C + L if backward else L)
    heads = _Heads(call.new(N, C, S), call.new(N, C, S), own_q, own_k, queries, keys, relu)
    launch = call.launch("heads")
    heads_kernel[(C // launch.blocks["ROWS"], N)](
        inputs.uvz, inputs.gamma, inputs.beta, *call.head_arguments(), *heads[:4], queries,
        keys[..., C:] if backward else keys, call.T, call.G, *call.uvz_strides, **call.head_constants(),
        WIDTH_Q=queries.shape[2], WIDTH_K=keys.shape[2], **launch.options(),
    )  # fmt: skip
    launch = call.launch("scores")
    scores_kernel[(call.block_pairs(launch), N)](
        inputs.bias, inputs.doc_ids, *heads[:4], keys if backward else queries[..., L:], relu, call.T, call.G,
        S=S, C=C, CAUSAL=inputs.causal, DOCS=call.docs, TRANSPOSED=backward, WIDTH=L + C, **launch.options(),
    )  # fmt: skip
    return heads


def _column_sums(partial: Tensor) -> Tensor:
    sums = partial.new_empty(partial.shape[1])
    column_sums_kernel[(triton.cdiv(len(sums), 32),)](partial, sums, *partial.shape, COLUMNS=32, ROWS=64, num_warps=8)
    return sums


def _scan(
    call: _Call, sums: Tensor, initial: Tensor | None, *, adjoint: bool, leave: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the chunks' sums (B, G, L, E), in place, into what arrives at each; without routes into their total.

    Returns that, what leaves in the direction of travel (B, S, E) and the count of chunks that it holds (B,).
    """
    B, G, S, E = call.B, call.G, call.S, call.E
    left = call.new(B, S, E, dtype=torch.float32) if leave else call.new(0, dtype=torch.float32)
    count = call.new(B if leave else 0, dtype=torch.int64)
    if call.total:
        return sums.sum(1, keepdim=True, dtype=torch.float32).to(sums.dtype), left, count
    inputs, launch = call.inputs, call.launch("scan")
    width = S * E
    for future in (False, True) if call.two else (False,):
        scan_kernel[(triton.cdiv(width, launch.blocks["BLOCK"]), B)](
            sums.view(B, G, -1)[..., width:] if future else sums, initial, left,
            inputs.doc_ids, inputs.state_count, inputs.state_doc_id, count, call.T, G, sums.stride(1), width,
            C=call.C, REVERSE=adjoint != future, DOCS=call.docs, HAS_STATE=inputs.state_count is not None,
            HAS_INITIAL=initial is not None, LEAVE=leave, FUTURE=future, **launch.options(),
        )  # fmt: skip
    return sums, left, count


def forward(inputs: Inputs, *, return_state: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out (B, T, E), the sum, count and document of the state that leaves, and the states for `backward`.

    Without return_state the parts of the state are empty tensors.
    """
    call = _Call.of(inputs)
    inputs = call.inputs
    heads = _make_heads(call, backward=False)
    sums = call.new(call.B, call.G, call.L, call.E)
    sizes = (call.T, call.G, *call.uvz_strides)
    launch = call.launch("chunk_sums")
    tiles = call.E // launch.blocks["BLOCK_E"] * (call.L // launch.blocks["BLOCK_L"])
    chunk_sums_kernel[(tiles, call.N)](
        inputs.uvz, heads.keys, sums, *sizes, E=call.E, L=call.L, C=call.C, WHOLE=call.whole, **launch.options()
    )
    states, left, left_count = _scan(call, sums, inputs.state_sum, adjoint=False, leave=return_state)
    out = call.new(call.B, call.T, call.E)
    launch = call.launch("output")
    tiles = call.E // launch.blocks["BLOCK_E"] * (call.C // launch.blocks["ROWS"])
    output_kernel[(tiles, call.N)](
        inputs.uvz, heads.queries, states, out, *sizes, *call.state_strides(states),
        E=call.E, L=call.L, C=call.C, CAUSAL=inputs.causal, WHOLE=call.whole, **launch.options(),
    )  # fmt: skip
    left_doc_id = call.new(0, dtype=torch.int64)
    if return_state:
        last = left_count.new_zeros(call.B) if inputs.doc_ids is None else inputs.doc_ids[:, -1].to(torch.int64)
        left_doc_id = last.clone()
    return out, left, left_count, left_doc_id, states


def backward(
    grad_out: Tensor, grad_left: Tensor | None, inputs: Inputs, out: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of uvz, gamma, beta, bias and the sum of the state that entered, each in its input's dtype,
    and the sums (2E + S,) of uvz's over all tokens, in float32.

    out and states are what `forward` returned. Where no state entered, its gradient is an empty tensor.
    """
    call = _Call.of(inputs)
    inputs = call.inputs
    B, T, N, C, S, L, E = call.B, call.T, call.N, call.C, call.S, call.L, call.E
    grad_out, out = grad_out.contiguous(), out.contiguous()
    sizes = (T, call.G, *call.uvz_strides)
    extents = {"E": E, "S": S, "L": L, "C": C, "WHOLE": call.whole}
    heads = _make_heads(call, backward=True)
    grad_uvz = call.new(B, T, 2 * E + S)

    launch = call.launch("gate_backward")
    grad_attended, grad_states = call.new(N, C, E), call.new(B, call.G, L, E)
    u_sums = call.new(N, E, dtype=torch.float32)
    gate_backward_kernel[(E // launch.blocks["BLOCK_E"] * (L // launch.blocks["BLOCK_L"]), N)](
        inputs.uvz, out, grad_out, heads.queries, grad_uvz, grad_attended, grad_states, u_sums, *sizes,
        **extents, **launch.options(),
    )  # fmt: skip
    has_state = inputs.state_sum is not None
    grad_sums, grad_state, _ = _scan(call, grad_states, grad_left, adjoint=True, leave=has_state)

    launch = call.launch("values_backward")
    blocks = C // launch.blocks["ROWS"]
    v_sums = call.new(N * blocks, E, dtype=torch.float32)
    values_backward_kernel[(E // launch.blocks["BLOCK_E"] * blocks, N)](
        inputs.uvz, heads.keys, grad_attended, grad_sums, grad_uvz, v_sums,
        *sizes, *call.state_strides(grad_sums), CAUSAL=inputs.causal, **extents, **launch.options(),
    )  # fmt: skip

    launch = call.launch("contractions")
    roles = call.block_pairs(launch) + 2 * (C // launch.blocks["ROWS"]) * (L // launch.blocks["BLOCK_L"])
    grad_scores, grad_weights = call.new(N, C, C), call.new(N, C, C) if call.two else None
    grad_lin_q, grad_lin_k = call.new(N, C, L), call.new(N, C, L)
    contractions_kernel[(roles, N)](
        inputs.uvz, heads.keys, heads.relu, inputs.doc_ids, grad_attended, states, grad_sums,
        grad_scores, grad_weights, grad_lin_q, grad_lin_k, *sizes, *call.state_strides(states),
        CAUSAL=inputs.causal, DOCS=call.docs, **extents, **launch.options(),
    )  # fmt: skip

    launch = call.launch("heads_backward")
    blocks = C // launch.blocks["ROWS"]
    partial = call.new(N * blocks, 9, S, dtype=torch.float32)
    heads_backward_kernel[(blocks, N)](
        inputs.uvz, inputs.gamma, *call.head_arguments(), *heads[:4],
        grad_scores, grad_weights, grad_lin_q, grad_lin_k, grad_uvz, partial, T, call.G,
        *call.uvz_strides, **call.head_constants(), **launch.options(),
    )  # fmt: skip
    grad_bias = call.new(2 * C - 1, dtype=torch.float32)
    diagonals_kernel[(2 * C - 1,)](
        grad_scores.view(N, C * C).sum(0, dtype=torch.float32), grad_bias, C=C, CAUSAL=inputs.causal
    )
    sums = _column_sums(partial.view(-1, 9 * S)).view(9, S)
    return (
        grad_uvz,
        sums[:4].to(inputs.gamma.dtype, copy=True),
        sums[4:8].to(inputs.beta.dtype, copy=True),
        grad_bias.to(inputs.bias.dtype),
        grad_state if inputs.state_sum is None else grad_state.to(inputs.state_sum.dtype),
        torch.cat([_column_sums(u_sums), _column_sums(v_sums), sums[8]]),
    )
