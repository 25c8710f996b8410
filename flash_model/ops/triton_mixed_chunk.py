"""Mixed chunk attention on Triton kernels: the same function as reference.py.

Heads and scores first; then one launch for all that runs over the values (triton_mixed_chunk_pipeline.py); backward
the same in the other direction, and last the gradients of the heads. Between them stand, for each chunk of C tokens,
its weights (C, C), its linear queries and keys (C, L) and a state (L, E), all in uvz's dtype; only the states are kept
for backward. Sums are taken in float32 and in a fixed order: the bits of two runs are the same.

Shape letters: B batch, T time, G chunks, N = B·G, C chunk, S query/key, L = S · routes, E values.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flash_model.ops.documents import hand_on
from flash_model.ops.reference import Inputs
from flash_model.ops.triton_mixed_chunk_heads import (
    diagonals_kernel,
    heads_backward_kernel,
    heads_kernel,
    parameter_sums_kernel,
    partial_sums_kernel,
    quad_backward_kernel,
    scores_kernel,
)
from flash_model.ops.triton_mixed_chunk_launches import LAUNCHES, Launch
from flash_model.ops.triton_mixed_chunk_pipeline import (
    backward_kernel,
    chunk_sums_kernel,
    forward_kernel,
    gate_backward_kernel,
    output_kernel,
    products_backward_kernel,
    route_kernel,
)
from flash_model.positions import frequencies


@functools.lru_cache(maxsize=16)
def _rotary_tables(start: int, chunks: int, C: int, H: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the chunks' starts (G, 2, H) and of the offsets in a chunk (C, 2, H), float32 of float64."""
    frequency = frequencies(H, base)
    starts = (start + C * torch.arange(chunks, dtype=torch.float64))[:, None] * frequency
    offsets = torch.arange(C, dtype=torch.float64)[:, None] * frequency
    tables = (torch.stack([angle.cos(), angle.sin()], 1).float().to(device) for angle in (starts, offsets))
    return next(tables), next(tables)


MOST_CHUNKS = 65_535  # a grid's second dimension holds no more


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

    @classmethod
    def of(cls, inputs: Inputs) -> "_Call":
        B, T, width = inputs.uvz.shape
        S, C = inputs.gamma.shape[1], inputs.chunk_size
        if (chunks := B * -(-T // C)) > MOST_CHUNKS:
            raise ValueError(
                f"uvz holds {chunks:,} chunks, {B:,} sequences of {T:,} tokens in chunks of {C}: the kernels take at "
                f"most {MOST_CHUNKS:,} in one call; split the batch, or set FLASH_OP=reference"
            )
        inputs = inputs._replace(
            uvz=inputs.uvz if inputs.uvz.stride(2) == 1 else inputs.uvz.contiguous(),
            gamma=inputs.gamma.contiguous(),
            beta=inputs.beta.contiguous(),
            bias=inputs.bias.contiguous(),
            doc_ids=None if inputs.doc_ids is None else inputs.doc_ids.contiguous(),
            state_sum=None if inputs.state_sum is None else inputs.state_sum.contiguous(),
            state_count=None if inputs.state_count is None else inputs.state_count.contiguous(),
            state_doc_id=None if inputs.state_doc_id is None else inputs.state_doc_id.contiguous(),
        )
        return cls(inputs, B, T, -(-T // C), C, S, (width - S) // 2)

    @property
    def docs(self) -> bool:
        return self.inputs.doc_ids is not None

    @property
    def two(self) -> bool:
        """Bidirectional with documents: one route from before, one from behind. Without, chunks read the sum of all."""
        return self.docs and not self.inputs.causal

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
        launches = LAUNCHES[self.inputs.uvz.dtype]
        variant = "_two" if self.two else "_wide" if self.E > 2048 else ""
        launch = launches.get(name + variant, launches[name])
        blocks = dict(launch.blocks)
        extents = {"BLOCK_L": self.L, "BLOCK_S": self.S, **dict.fromkeys(("BLOCK_E", "SUMS_E", "GATE_E"), self.E)}
        for block, extent in extents.items():
            while block in blocks and extent % blocks[block]:
                blocks[block] //= 2
        wide = triton.next_power_of_2(self.S) // 128 if name.startswith("heads") else 1
        return launch._replace(blocks=blocks, num_warps=launch.num_warps * max(1, wide))

    def score_tiles(self, launch: Launch) -> int:
        """How many blocks of scores a chunk has."""
        blocks = self.C // launch.blocks["ROWS"]
        return blocks * (blocks + 1) // 2 if self.inputs.causal else blocks * blocks

    def sum_tiles(self, launch: Launch, block_e: str = "BLOCK_E") -> int:
        """How many tiles a state, (L, E), has."""
        return self.E // launch.blocks[block_e] * (self.L // launch.blocks["BLOCK_L"])

    def value_tiles(self, launch: Launch) -> int:
        """How many tiles a chunk's values, (C, E), have."""
        return self.E // launch.blocks["BLOCK_E"] * (self.C // launch.blocks["ROWS"])

    def product_tiles(self, launch: Launch) -> int:
        """How many tiles the products of a chunk's backward pass have."""
        linear = 2 * (self.C // launch.blocks["ROWS"]) * (self.L // launch.blocks["BLOCK_L"])
        return self.score_tiles(launch) + linear + self.value_tiles(launch)

    @property
    def uvz_strides(self) -> tuple[int, int]:
        return self.inputs.uvz.stride(0), self.inputs.uvz.stride(1)

    def state_strides(self, states: Tensor) -> tuple[int, int]:
        """Steps of a (B, G or 1, L, E) tensor by sequence and by chunk."""
        return states.stride(0), states.stride(1) if states.shape[1] == self.G else 0

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
    relu: Tensor | None  # (N, C keys, C queries), backward only, and only where own chunks are read linearly


def _make_heads(call: _Call, *, backward: bool) -> _Heads:
    inputs, N, C, S, L = call.inputs, call.N, call.C, call.S, call.L
    own_q, own_k = (call.new(N, C, S), call.new(N, C, S)) if call.two else (None, None)
    relu = call.new(N, C, C) if call.two and backward else None
    queries, keys = call.new(N, C, L if backward else L + C), call.new(N, C, C + L if backward else L)
    heads = _Heads(call.new(N, C, S), call.new(N, C, S), own_q, own_k, queries, keys, relu)
    launch = call.launch("heads")
    heads_kernel[(C // launch.blocks["ROWS"], N)](
        inputs.uvz, inputs.gamma, inputs.beta, *call.head_arguments(), *heads[:4], queries,
        keys[..., C:] if backward else keys, call.T, call.G, *call.uvz_strides, **call.head_constants(),
        WIDTH_Q=queries.shape[2], WIDTH_K=keys.shape[2], **launch.options(),
    )  # fmt: skip
    launch = call.launch("scores")
    scores_kernel[(call.score_tiles(launch), N)](
        inputs.bias, inputs.doc_ids, *heads[:4], keys if backward else queries[..., L:], relu, call.T, call.G,
        S=S, C=C, CAUSAL=inputs.causal, DOCS=call.docs, TRANSPOSED=backward, WIDTH=L + C, **launch.options(),
    )  # fmt: skip
    return heads


def _parameter_sums(call: _Call, heads: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gamma and beta (4, S), and of uvz the sums (2E + S,) over all tokens, of partial sums of each."""
    inputs, E, S = call.inputs, call.E, call.S
    parts, blocks = 32, (9 * S + 2 * E) // 64
    sums = heads.new_empty(parts, 9 * S + 2 * E)
    partial_sums_kernel[(blocks, parts)](
        heads, u, v, sums, len(heads), len(u), len(v), E=E, S=S, PARTS=parts, COLUMNS=64, ROWS=64, num_warps=4
    )
    gamma, beta = torch.empty_like(inputs.gamma), torch.empty_like(inputs.beta)
    tokens = heads.new_empty(2 * E + S)
    parameter_sums_kernel[(blocks,)](sums, gamma, beta, tokens, E=E, S=S, PARTS=parts, COLUMNS=64, num_warps=4)
    return gamma, beta, tokens


def _total(sums: Tensor) -> Tensor:
    """The sum of the sums (B, G, L, E) of all chunks, for every chunk to read."""
    return sums.sum(1, keepdim=True, dtype=torch.float32).to(sums.dtype)


def _scan_routes(call: _Call, sums: Tensor, *, adjoint: bool) -> None:
    """Turn the sums (B, G, L, E) of a bidirectional call with documents, in place, into what arrives at each chunk."""
    launch, width = call.launch("route"), call.S * call.E
    for future in (False, True):
        route_kernel[(triton.cdiv(width, launch.blocks["BLOCK"]), call.B)](
            sums.view(call.B, call.G, -1)[..., width:] if future else sums, call.inputs.doc_ids, call.T, call.G,
            sums.stride(1), width, C=call.C, REVERSE=adjoint != future, FUTURE=future, **launch.options(),
        )  # fmt: skip


class _Pipeline(NamedTuple):
    """What the programs of a causal pass tell each other, and what leaves it."""

    slices: int
    counters: Tensor  # (2, slices) int32
    carry: Tensor  # (slices, S·E) float32
    left: Tensor | None  # (B, S, E) float32


def _pipeline(call: _Call, launch: Launch, *, leave: bool) -> _Pipeline:
    slices = triton.cdiv(call.N, launch.blocks["SLICE"])
    counters = torch.zeros(2, slices, dtype=torch.int32, device=call.inputs.uvz.device)
    left = call.new(call.B, call.S, call.E, dtype=torch.float32) if leave else None
    return _Pipeline(slices, counters, call.new(slices, call.S * call.E, dtype=torch.float32), left)


def _forward_causal(call: _Call, heads: _Heads, *, leave: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return out (B, T, E), the states (B, G, S, E) and, with leave, the sum of the one that leaves."""
    inputs, launch = call.inputs, call.launch("forward")
    blocks = launch.blocks
    pipe = _pipeline(call, launch, leave=leave)
    width = call.S * call.E
    states, out = call.new(call.B, call.G, call.S, call.E), call.new(call.B, call.T, call.E)
    values = call.new(call.N, call.C, call.E)
    sums, outputs = call.sum_tiles(launch, "SUMS_E"), call.value_tiles(launch)
    programs = blocks["SLICE"] * (sums + outputs) + triton.cdiv(width, blocks["BLOCK"])
    forward_kernel[((pipe.slices + 2) * programs,)](
        inputs.uvz, heads.queries, heads.keys, states, values, out, pipe.counters, pipe.carry, inputs.state_sum,
        pipe.left, inputs.doc_ids, inputs.state_doc_id,
        call.N, call.T, call.G, pipe.slices, width, *call.uvz_strides, E=call.E, L=call.L, C=call.C, WHOLE=call.whole,
        DOCS=call.docs, HAS_STATE=inputs.state_sum is not None, LEAVE=leave, SUMS=sums, OUTPUTS=outputs,
        **launch.options(),
    )  # fmt: skip
    return out, states, pipe.left


def _forward_bidirectional(call: _Call, heads: _Heads) -> tuple[Tensor, Tensor]:
    """Return out (B, T, E) and the states (B, G or 1, L, E)."""
    inputs, launch = call.inputs, call.launch("chunk_sums")
    sizes = (call.T, call.G, *call.uvz_strides)
    extents = {"E": call.E, "L": call.L, "C": call.C, "WHOLE": call.whole}
    states, values = call.new(call.B, call.G, call.L, call.E), call.new(call.N, call.C, call.E)
    chunk_sums_kernel[(call.sum_tiles(launch), call.N)](
        inputs.uvz, heads.keys, values, states, *sizes, **extents, **launch.options()
    )
    if call.two:
        _scan_routes(call, states, adjoint=False)
    else:
        states = _total(states)
    launch, out = call.launch("output"), call.new(call.B, call.T, call.E)
    output_kernel[(call.value_tiles(launch), call.N)](
        inputs.uvz, heads.queries, states, values, out, *sizes, *call.state_strides(states),
        **extents, **launch.options(),
    )  # fmt: skip
    return out, states


def forward(inputs: Inputs, *, return_state: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out (B, T, E), the sum, count and document of the state that leaves, and the states for `backward`.

    Without return_state the parts of the state are empty tensors.
    """
    call = _Call.of(inputs)
    inputs = call.inputs
    heads = _make_heads(call, backward=False)
    if not inputs.causal:
        out, states = _forward_bidirectional(call, heads)
        return out, *_no_state(call), states
    out, states, left = _forward_causal(call, heads, leave=return_state)
    if left is None:
        return out, *_no_state(call), states
    return out, left, *_what_is_left(call), states


def _no_state(call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    return call.new(0, dtype=torch.float32), call.new(0, dtype=torch.int64), call.new(0, dtype=torch.int64)


def _what_is_left(call: _Call) -> tuple[Tensor, Tensor]:
    """Count and document (B,) of the state that leaves a sequence of whole chunks."""
    inputs = call.inputs
    edge = call.new(call.B, call.G, dtype=torch.int64).zero_()
    if inputs.doc_ids is not None:
        edge.copy_(inputs.doc_ids[:, call.C - 1 :: call.C])
    count, doc_id = inputs.state_count, inputs.state_doc_id
    if count is None or doc_id is None:
        count, doc_id = torch.zeros_like(edge[:, 0]), edge[:, 0]
    return hand_on(edge, count, doc_id)[2][:, -1].clone(), edge[:, -1].clone()


class _Gradients(NamedTuple):
    """What the products of a backward pass write: of the heads, and sums of u's and v's gradients over tokens."""

    uvz: Tensor  # (B, T, 2E + S), z's part not yet
    scores: Tensor  # (N, C keys, C queries)
    weights: Tensor | None  # likewise, only where own chunks are read linearly
    lin_q: Tensor  # (N, C, L)
    lin_k: Tensor
    u_sums: Tensor  # (N, E) float32
    v_sums: Tensor  # (N · blocks, E) float32


def _new_gradients(call: _Call, blocks: int) -> _Gradients:
    N, C, L, E = call.N, call.C, call.L, call.E
    return _Gradients(
        call.new(call.B, call.T, 2 * E + call.S), call.new(N, C, C), call.new(N, C, C) if call.two else None,
        call.new(N, C, L), call.new(N, C, L),
        call.new(N, E, dtype=torch.float32), call.new(N * blocks, E, dtype=torch.float32),
    )  # fmt: skip


def _backward_causal(
    call: _Call, heads: _Heads, grad_out: Tensor, grad_left: Tensor | None, out: Tensor, states: Tensor
) -> tuple[_Gradients, Tensor | None]:
    """Return the gradients and, where a state entered, that of its sum (B, S, E), float32."""
    inputs, launch = call.inputs, call.launch("backward")
    blocks = launch.blocks
    has_state = inputs.state_sum is not None
    pipe = _pipeline(call, launch, leave=has_state)
    width = call.S * call.E
    grads = _new_gradients(call, call.C // blocks["ROWS"])
    grad_attended, grad_states = call.new(call.N, call.C, call.E), torch.empty_like(states)
    gates, tiles = call.sum_tiles(launch, "GATE_E"), call.product_tiles(launch)
    programs = blocks["SLICE"] * (gates + tiles) + triton.cdiv(width, blocks["BLOCK"])
    backward_kernel[((pipe.slices + 2) * programs,)](
        inputs.uvz, out, grad_out, heads.queries, heads.keys, states, grads.uvz, grad_attended, grad_states,
        grads.scores, grads.lin_q, grads.lin_k, grads.u_sums, grads.v_sums, pipe.counters, pipe.carry, grad_left,
        pipe.left, inputs.doc_ids, inputs.state_doc_id,
        call.N, call.T, call.G, pipe.slices, width, *call.uvz_strides, E=call.E, S=call.S, L=call.L, C=call.C,
        WHOLE=call.whole, DOCS=call.docs, HAS_STATE=has_state, HAS_INITIAL=grad_left is not None,
        GATES=gates, TILES=tiles, **launch.options(),
    )  # fmt: skip
    return grads, pipe.left


def _backward_bidirectional(call: _Call, heads: _Heads, grad_out: Tensor, out: Tensor, states: Tensor) -> _Gradients:
    inputs = call.inputs
    sizes = (call.T, call.G, *call.uvz_strides)
    extents = {"E": call.E, "S": call.S, "L": call.L, "C": call.C, "WHOLE": call.whole}
    gate, products = call.launch("gate_backward"), call.launch("products_backward")
    grads = _new_gradients(call, call.C // products.blocks["ROWS"])
    grad_attended, grad_states = call.new(call.N, call.C, call.E), call.new(call.B, call.G, call.L, call.E)
    gate_backward_kernel[(call.sum_tiles(gate), call.N)](
        inputs.uvz, out, grad_out, heads.queries, grads.uvz, grad_attended, grad_states, grads.u_sums, *sizes,
        **extents, **gate.options(),
    )  # fmt: skip
    if call.two:
        _scan_routes(call, grad_states, adjoint=True)
    else:
        grad_states = _total(grad_states)
    tiles = call.product_tiles(products)
    products_backward_kernel[(tiles, call.N)](
        inputs.uvz, heads.keys, heads.relu, inputs.doc_ids, grad_attended, states, grad_states, grads.uvz,
        grads.scores, grads.weights, grads.lin_q, grads.lin_k, grads.v_sums, *sizes, *call.state_strides(states),
        DOCS=call.docs, TILES=tiles, **extents, **products.options(),
    )  # fmt: skip
    return grads


def _quad_backward(call: _Call, q: Tensor, k: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of q and k (N, C, S) of q kᵀ, whose transposed gradient is grad (N, C, C)."""
    launch = call.launch("quad_backward")
    grads = torch.empty_like(q), torch.empty_like(k)
    tiles = 2 * (call.C // launch.blocks["ROWS"]) * (call.S // launch.blocks["BLOCK_S"])
    quad_backward_kernel[(tiles, call.N)](
        q, k, grad, *grads, S=call.S, C=call.C, CAUSAL=call.inputs.causal, **launch.options()
    )
    return grads


def backward(
    grad_out: Tensor, grad_left: Tensor | None, inputs: Inputs, out: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of uvz, gamma, beta, bias and the sum of the state that entered, each in its input's dtype,
    and the sums (2E + S,) of uvz's over all tokens, in float32.

    out and states are what `forward` returned. Where no state entered, its gradient is an empty tensor.
    """
    call = _Call.of(inputs)
    inputs, N, C, S = call.inputs, call.N, call.C, call.S
    grad_out, out = grad_out.contiguous(), out.contiguous()
    heads = _make_heads(call, backward=True)
    grad_state = None
    if inputs.causal:
        grad_left = None if grad_left is None else grad_left.contiguous()
        grads, grad_state = _backward_causal(call, heads, grad_out, grad_left, out, states)
    else:
        grads = _backward_bidirectional(call, heads, grad_out, out, states)

    grad_quad = _quad_backward(call, heads.quad_q, heads.quad_k, grads.scores)
    grad_own: tuple[Tensor | None, Tensor | None] = (None, None)
    if heads.own_q is not None and heads.own_k is not None and grads.weights is not None:
        grad_own = _quad_backward(call, heads.own_q, heads.own_k, grads.weights)
    launch = call.launch("heads_backward")
    blocks = C // launch.blocks["ROWS"]
    partial = call.new(N * blocks, 9 * S, dtype=torch.float32)
    # Without fused multiply-adds every lane that holds a copy of a sum over rows has the same bits of it.
    heads_backward_kernel[(blocks, N)](
        inputs.uvz, inputs.gamma, *call.head_arguments(), *grad_quad, *grad_own, grads.lin_q, grads.lin_k, grads.uvz,
        partial, call.T, call.G, *call.uvz_strides, **call.head_constants(), **launch.options(), enable_fp_fusion=False,
    )  # fmt: skip
    grad_bias = torch.empty_like(inputs.bias)
    diagonals_kernel[(2 * C - 1,)](
        grads.scores.view(N, C * C).sum(0, dtype=torch.float32), grad_bias, C=C, CAUSAL=inputs.causal
    )
    grad_gamma, grad_beta, token_sums = _parameter_sums(call, partial, grads.u_sums, grads.v_sums)
    state_sum = inputs.state_sum
    return (
        grads.uvz,
        grad_gamma,
        grad_beta,
        grad_bias,
        call.new(0, dtype=torch.float32) if state_sum is None or grad_state is None else grad_state.to(state_sum.dtype),
        token_sums,
    )
