"""Which token reads which: documents, and the routes of the linear part from chunk to chunk.

Chunk boundaries are fixed and document ids never decrease, so only a chunk's first document can read what comes from
before it and only its last can be carried on (the other way round for what comes from behind).

Shape letters: B batch, T time, G chunks, C chunk, S query/key, E values.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Route:
    """One way on which tokens' lin_kᵀ·v travel from chunk to chunk, to those who read them.

    write  (B, G, C, 1)  weight with which a token enters the sum of its chunk
    read   (B, G, C, 1)  weight with which a token reads what arrives at its chunk
    keep   (B, G, 1, 1)  1 where what arrived is carried past a chunk, 0 where it ends
    order  the chunks in the direction of travel; None: every chunk receives the sum of all
    """

    write: Tensor
    read: Tensor
    keep: Tensor
    order: range | None

    def carry(self, sums: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what arrives at each chunk, (B, G, S, E), and what leaves the last, (B, S, E)."""
        if self.order is None:
            total = sums.sum(1)
            return total[:, None].expand_as(sums), total
        return _walk(sums, self.keep, initial, self.order)

    def carry_adjoint(self, grad_arrivals: Tensor, grad_left: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the gradients of the chunks' sums and of the initial one: the same walk in the other direction."""
        if self.order is None:
            return self.carry(grad_arrivals, None)
        return _walk(grad_arrivals, self.keep, grad_left, self.order[::-1])


def _walk(steps: Tensor, keep: Tensor, carried: Tensor | None, order: range) -> tuple[Tensor, Tensor]:
    arrivals = torch.empty_like(steps)
    carried = torch.zeros_like(steps[:, 0]) if carried is None else carried
    for chunk in order:
        arrivals[:, chunk] = carried
        carried = torch.addcmul(steps[:, chunk], carried, keep[:, chunk])
    return arrivals, carried


@dataclass(frozen=True)
class Reading:
    """Who reads whom in one call.

    same  (B, G, C, C) bool: two tokens of a chunk are of one document; None: all are
    own   (B, G, C, 1) weight of the linear reading of the own chunk, where it does not come by a route; None: not read
    left_count, left_doc_id  (B,) of the state that leaves the sequence
    """

    routes: tuple[Route, ...]
    same: Tensor | None
    own: Tensor | None
    left_count: Tensor
    left_doc_id: Tensor


class _Following(NamedTuple):
    """A document followed from chunk to chunk, in one direction."""

    writes: Tensor  # (B, G, C) bool: the token is of the document that its chunk hands on
    chunks: Tensor  # (B, G, C) int: how many of the chunks already passed hold tokens of this token's document
    keep: Tensor  # (B, G) bool: the chunk hands on the document that arrived
    left_count: Tensor  # (B,) int

    def route(self, holding: Tensor, order: range, dtype: torch.dtype) -> Route:
        """Return the route, for a mean over `holding` (B, G, C) chunks."""
        C = self.writes.shape[-1]
        read = (self.chunks > 0).to(dtype) / holding
        return Route(self.writes[..., None].to(dtype) / C, read[..., None], self.keep[..., None, None].to(dtype), order)


def hand_on(edge: Tensor, count: Tensor, doc_id: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the documents `edge` (B, G) that chunks hand on, after a state of count and doc_id (B,).

    Returns, each (B, G): the document that arrives at a chunk, whether the chunk hands it on, and how many chunks up to
    this one, it included, hold what it hands on.
    """
    index = torch.arange(edge.shape[1], device=edge.device)
    arriving_id = torch.cat([doc_id[:, None], edge[:, :-1]], 1)
    keep = edge == arriving_id
    latest_start = torch.where(keep, -1, index).cummax(1).values
    handed_on = torch.where(latest_start < 0, count[:, None] + index + 1, index - latest_start + 1)
    return arriving_id, keep, handed_on


def _follow(documents: Tensor, edge: Tensor, count: Tensor, doc_id: Tensor) -> _Following:
    """Follow, chunk by chunk, the documents `edge` (B, G) that they hand on, after a state of count and doc_id (B,)."""
    arriving_id, keep, handed_on = hand_on(edge, count, doc_id)
    arriving_count = torch.cat([count[:, None], handed_on[:, :-1]], 1)
    chunks = torch.where(documents == arriving_id[..., None], arriving_count[..., None], 0)
    return _Following(documents == edge[..., None], chunks, keep, handed_on[:, -1])


def plan_reading(
    doc_ids: Tensor | None,
    entering: tuple[Tensor, Tensor] | None,
    shape: tuple[int, int, int],
    *,
    causal: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Reading:
    """Plan the reading of doc_ids (B, T), after a state of (count, doc_id). shape: (B, G, C); dtype: of the weights."""
    B, G, C = shape
    if doc_ids is None:
        documents = torch.zeros((), dtype=torch.int64, device=device).expand(shape)
        same = None
    else:
        # Padding joins the last document: it holds no values, and the state that leaves must stay that document's.
        padding = doc_ids[:, -1:].expand(B, G * C - doc_ids.shape[1])
        documents = torch.cat([doc_ids, padding], 1).to(torch.int64).view(shape)
        same = documents[..., :, None] == documents[..., None, :]
    first, last = documents[:, :, 0], documents[:, :, -1]

    if doc_ids is None and not causal:
        weights = torch.tensor([1 / C, 1 / G, 1], dtype=dtype, device=device)[:, None, None, None, None]
        one, every, kept = weights.expand(3, B, G, C, 1)
        return Reading((Route(one, every, kept[:, :, :1], None),), None, None, last.new_full((B,), G), last[:, -1])

    count, doc_id = entering or (last.new_zeros(B), first[:, 0])
    past = _follow(documents, last, count, doc_id)
    if causal:
        route = past.route(past.chunks.clamp(min=1), range(G), dtype)
        return Reading((route,), same, None, past.left_count, last[:, -1])

    backwards = _follow(documents.flip(1), first.flip(1), torch.zeros_like(count), last[:, -1])
    writes, chunks, keep = (x.flip(1) for x in backwards[:3])
    future = _Following(writes, chunks, keep, backwards.left_count)
    holding = 1 + past.chunks + future.chunks
    routes = (past.route(holding, range(G), dtype), future.route(holding, range(G)[::-1], dtype))
    return Reading(routes, same, (holding.to(dtype) * C).reciprocal()[..., None], past.left_count, last[:, -1])
