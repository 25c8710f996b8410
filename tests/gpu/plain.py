"""Both ops as one would write them in plain torch, in the dtype of `uvz`: what bfloat16 kernels may not be worse than.

Every product is a matrix product of that dtype, everything else is elementwise in it, and autograd differentiates.
Nothing is shared with the package. B batch, T time, G chunks, C chunk, S query/key, E values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_model.ops import AttentionState


def mixed_chunk(
    uvz: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bias: Tensor,
    *,
    chunk_size: int,
    causal: bool = True,
    doc_ids: Tensor | None = None,
    start: int = 0,
    state: AttentionState | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output and the sum of the state that leaves; for a bidirectional sequence that sum says nothing."""
    (B, T, _), C, S = uvz.shape, chunk_size, gamma.shape[1]
    G = -(-T // C)
    documents = uvz.new_zeros(B, T, dtype=torch.int64) if doc_ids is None else doc_ids
    documents = torch.cat([documents, documents[:, -1:].expand(B, G * C - T)], 1).view(B, G, C)
    u, v, heads = _split(F.pad(uvz, (0, 0, 0, G * C - T)), gamma, beta, start)
    quad_q, quad_k, lin_q, lin_k = heads.view(4, B, G, C, S)
    v = v.view(B, G, C, -1)

    same = documents[..., :, None] == documents[..., None, :]
    weights = _squared_relu(quad_q @ quad_k.mT / C, bias, same.tril() if causal else same)

    first, last, index = documents[:, :, 0], documents[:, :, -1], torch.arange(G, device=uvz.device)
    sums = _chunk_sums(lin_k, v, documents == last[..., None])
    reads_past = (index < index[:, None]) & (last[:, None] == first[..., None])
    chunks = reads_past.sum(-1, keepdim=True)
    left = _gather(last[:, -1:, None] == last[:, None], sums)
    if state is not None:
        entering, arrives = state.sum[:, None].to(uvz.dtype), (state.doc_id[:, None] == first)[..., None]
        sums, reads_past = torch.cat([entering, sums], 1), torch.cat([arrives, reads_past], -1)
        chunks = chunks + arrives * state.count[:, None, None]
        left = left + torch.where((state.doc_id == last[:, -1])[:, None, None, None], entering, 0)
    of_past = documents == first[..., None]
    chunks = chunks * of_past
    past = _gather(reads_past, sums)
    if causal:
        attended = weights @ v + _mean(lin_q, of_past, chunks.clamp(min=1)) @ past
        return _gate(u, attended, T), left[:, 0]

    reads_future = (index > index[:, None]) & (first[:, None] == last[..., None])
    of_future = documents == last[..., None]
    chunks = chunks + reads_future.sum(-1, keepdim=True) * of_future + 1
    future = _gather(reads_future, _chunk_sums(lin_k, v, documents == first[..., None]))
    own = _mean(lin_q, torch.ones_like(of_past), chunks) @ lin_k.mT / C * same
    attended = (weights + own) @ v + _mean(lin_q, of_past, chunks) @ past + _mean(lin_q, of_future, chunks) @ future
    return _gate(u, attended, T), left[:, 0]


def quadratic(
    uvz: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bias: Tensor,
    *,
    norm_length: int,
    causal: bool = True,
    doc_ids: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """Return FLASH-Quad's output; the scores are one (B, T, T) tensor."""
    B, T, _ = uvz.shape
    u, v, (q, k) = _split(uvz, gamma, beta, start)
    may_read = torch.ones(B, T, T, dtype=torch.bool, device=uvz.device)
    if doc_ids is not None:
        may_read = doc_ids[:, :, None] == doc_ids[:, None]
    return _gate(u, _squared_relu(q @ k.mT / norm_length, bias, may_read.tril() if causal else may_read) @ v, T)


def _split(uvz: Tensor, gamma: Tensor, beta: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
    S = gamma.shape[1]
    E = (uvz.shape[2] - S) // 2
    u, v, z = F.silu(uvz).split([E, E, S], -1)
    heads = z * gamma.to(uvz.dtype)[:, None, None] + beta.to(uvz.dtype)[:, None, None]
    half = S // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=uvz.device) / half)
    angle = torch.arange(start, start + uvz.shape[1], dtype=torch.float64, device=uvz.device)[:, None] * frequency
    cos, sin = angle.cos().to(uvz.dtype), angle.sin().to(uvz.dtype)
    x1, x2 = heads.chunk(2, -1)
    return u, v, torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


def _squared_relu(scores: Tensor, bias: Tensor, may_read: Tensor) -> Tensor:
    rows, middle = scores.shape[-1], len(bias) // 2
    wide = bias if bias.dtype == torch.float64 else bias.float()  # the sums along diagonals of its gradient
    toeplitz = wide[middle - rows + 1 : middle + rows].unfold(0, rows, 1).flip(0)
    return F.relu(scores + toeplitz.to(scores.dtype)).square() * may_read


def _chunk_sums(lin_k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
    return (lin_k * counts[..., None] / lin_k.shape[2]).mT @ v


def _gather(reads: Tensor, sums: Tensor) -> Tensor:
    """Add up, for every reader, the sums (B, H, S, E) that it reads: reads (B, G, H) → (B, G, S, E)."""
    return (reads.to(sums.dtype) @ sums.flatten(2)).unflatten(2, sums.shape[2:])


def _mean(lin_q: Tensor, reads: Tensor, chunks: Tensor) -> Tensor:
    return lin_q * (reads.to(lin_q.dtype) / chunks)[..., None]


def _gate(u: Tensor, attended: Tensor, T: int) -> Tensor:
    return (u * attended.reshape(u.shape))[:, :T]
