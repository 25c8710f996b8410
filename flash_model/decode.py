"""Generation token by token, without the op.

FLASH keeps, for each layer, the S×E state of the closed chunks and at most one chunk of keys and values: memory
and time per token do not grow. FLASH-Quad reads every earlier token and keeps its key and value: its cache grows with
each token, and ends at norm_length.

Shape letters: B batch, T time, C chunk, S query/key, E values, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_model.gau import GatedAttentionUnit
from flash_model.lm import FlashLM, check_tokens
from flash_model.ops import mixed_chunk_attention
from flash_model.ops.heads import accumulation_dtype, rotated_heads
from flash_model.positions import cos_sin


@dataclass
class ChunkMemory:
    """What a FLASH layer remembers: the sum of M_h over `closed` chunks, and the `filled` tokens of the open one."""

    closed_sum: Tensor  # (B, S, E)
    closed: int
    quad_k: Tensor  # (B, C, S), rotated
    values: Tensor  # (B, C, E), after SiLU
    open_sum: Tensor  # (B, S, E): Σ lin_kᵀ·v of the open chunk, not yet divided by C
    filled: int = 0

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held in memory."""
        return self.closed_sum, self.quad_k, self.values, self.open_sum


@dataclass
class GrowingMemory:
    """What a FLASH-Quad layer remembers: the rotated keys (B, t, S) and the values (B, t, E) of all t tokens so far."""

    keys: Tensor
    values: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held in memory."""
        return self.keys, self.values


@dataclass
class DecodeState:
    """The memory of every layer, and the position of the next token."""

    layers: list[ChunkMemory | GrowingMemory] = field(default_factory=list)
    position: int = 0

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return len(self.layers[0].values)

    def nbytes(self) -> int:
        """Bytes held by the tensors."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors())


@torch.no_grad()
def prefill(model: FlashLM, tokens: Tensor) -> tuple[Tensor, DecodeState]:
    """Read tokens (B, T), one document a sequence; return the logits after the last one, (B, V), and the state.

    ValueError for a bidirectional model, for no token at all, and for more tokens than flash_quad can read.
    """
    config = model.config
    if not config.causal:
        raise ValueError("causal: this model is bidirectional (causal: false): it cannot generate")
    check_tokens(tokens)
    _check_length(model, tokens.shape[1])
    x = _embed(model, tokens, 0)
    state = DecodeState(position=tokens.shape[1])
    for layer in model.layers:
        assert isinstance(layer, GatedAttentionUnit)
        memory: ChunkMemory | GrowingMemory
        x, memory = _read_chunks(layer, x) if config.architecture == "flash" else _read_all(layer, x)
        state.layers.append(memory)
    return model.head(x[:, -1:])[:, 0], state


@torch.no_grad()
def step(model: FlashLM, token: Tensor, state: DecodeState) -> Tensor:
    """Read one token (B,) of each sequence, advance `state` in place, and return the logits after it, (B, V).

    ValueError, with `state` as it was, for another shape of token, and where flash_quad cannot read further.
    """
    if token.shape != (state.batch,):
        raise ValueError(f"token must have shape (B,) = ({state.batch},), as the state: it has {tuple(token.shape)}")
    _check_length(model, state.position + 1)
    x = _embed(model, token[:, None], state.position)
    for layer, memory in zip(model.layers, state.layers, strict=True):
        assert isinstance(layer, GatedAttentionUnit)
        if isinstance(memory, ChunkMemory):
            x = _advance_chunk(layer, x, memory, state.position)
        else:
            x = _advance_all(layer, x, memory, state.position)
    state.position += 1
    return model.head(x)[:, 0]


def _check_length(model: FlashLM, length: int) -> None:
    config = model.config
    if config.norm_length is not None and config.architecture == "flash_quad" and length > config.norm_length:
        raise ValueError(f"norm_length: flash_quad reads at most {config.norm_length} tokens, not {length}")


def _embed(model: FlashLM, tokens: Tensor, start: int) -> Tensor:
    x = model.embedding(tokens)
    return x if model.positions is None else model.positions(x, start)


def _project(layer: GatedAttentionUnit, uvz: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return SiLU(u) and SiLU(v) (B, T, E) and the rotated heads (H, B, T, S) of tokens at positions start …"""
    config = layer.config
    E, S, dtype = config.expanded_dim, config.qk_dim, accumulation_dtype(uvz)
    u, v, z = uvz.to(dtype).split([E, E, S], -1)
    length = uvz.shape[1]
    cos, sin = cos_sin(
        start, length, S // 2, base=config.rope_base, block=min(length, 256), dtype=dtype, device=uvz.device
    )
    heads = rotated_heads(z, layer.gamma.to(dtype), layer.beta.to(dtype), cos, sin)
    return F.silu(u), F.silu(v), heads


def _read_chunks(layer: GatedAttentionUnit, x: Tensor) -> tuple[Tensor, ChunkMemory]:
    """The layer's parallel pass over whole chunks and then over what is left, and the memory after it."""
    config = layer.config
    B, T, _ = x.shape
    C, S, E = config.chunk_size, config.qk_dim, config.expanded_dim
    uvz, bias = layer.project(x)[1], layer.position_bias()
    dtype = accumulation_dtype(uvz)
    whole = T - T % C
    zeros = torch.zeros(B, S, E, dtype=dtype, device=x.device)
    memory = ChunkMemory(
        zeros, whole // C, zeros.new_zeros(B, C, S), zeros.new_zeros(B, C, E), zeros.clone(), T - whole
    )
    attended, state = [], None
    if whole:
        out, state = mixed_chunk_attention(
            uvz[:, :whole], layer.gamma, layer.beta, bias,
            chunk_size=C, return_state=True, rope_base=config.rope_base,
        )  # fmt: skip
        attended.append(out)
        memory.closed_sum = state.sum
    if whole < T:
        out = mixed_chunk_attention(
            uvz[:, whole:], layer.gamma, layer.beta, bias,
            chunk_size=C, start=whole, state=state, rope_base=config.rope_base,
        )  # fmt: skip
        attended.append(out)
        _, values, heads = _project(layer, uvz[:, whole:], whole)
        memory.quad_k[:, : T - whole], memory.values[:, : T - whole] = heads[1], values
        memory.open_sum = heads[3].mT @ values
    return sum(layer.contract(torch.cat(attended, 1)), x), memory


def _advance_chunk(layer: GatedAttentionUnit, x: Tensor, memory: ChunkMemory, position: int) -> Tensor:
    C = layer.config.chunk_size
    uvz = layer.project(x)[1]
    gate, values, (quad_q, quad_k, lin_q, lin_k) = _project(layer, uvz, position)
    row = memory.filled
    memory.quad_k[:, row], memory.values[:, row] = quad_k[:, 0], values[:, 0]
    memory.open_sum += lin_k.mT @ values
    memory.filled += 1

    # Query `row` on keys 0 … row: the bias of distance 0 stands at C − 1.
    bias = layer.position_bias().to(values.dtype)[C - 1 - row : C]
    scores = quad_q @ memory.quad_k[:, : row + 1].mT / C + bias
    attended = scores.relu().square() @ memory.values[:, : row + 1]
    if memory.closed:
        attended += lin_q @ memory.closed_sum / memory.closed

    if memory.filled == C:
        memory.closed_sum = memory.closed_sum + memory.open_sum / C
        memory.closed += 1
        memory.open_sum = torch.zeros_like(memory.open_sum)
        memory.filled = 0
    return sum(layer.contract((gate * attended).to(x.dtype)), x)


def _read_all(layer: GatedAttentionUnit, x: Tensor) -> tuple[Tensor, GrowingMemory]:
    _, values, heads = _project(layer, layer.project(x)[1], 0)
    return sum(layer(x)[1:], x), GrowingMemory(heads[1], values)


def _advance_all(layer: GatedAttentionUnit, x: Tensor, memory: GrowingMemory, position: int) -> Tensor:
    config = layer.config
    gate, values, (q, k) = _project(layer, layer.project(x)[1], position)
    memory.keys = torch.cat([memory.keys, k], 1)
    memory.values = torch.cat([memory.values, values], 1)
    bias = layer.position_bias().to(values.dtype)[config.bias_extent - 1 - position : config.bias_extent]
    scores = q @ memory.keys.mT / config.norm_length + bias
    attended = scores.relu().square() @ memory.values
    return sum(layer.contract((gate * attended).to(x.dtype)), x)
