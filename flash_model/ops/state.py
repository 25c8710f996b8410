"""What one piece of a sequence hands to the next."""

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionState(NamedTuple):
    """The linear part's memory at a chunk boundary. B sequences, S query/key width, E value width.

    sum     (B, S, E)  Σ of M_h = lin_k_hᵀ v_h / C over the earlier chunks that hold tokens of `doc_id`; float32 or 64
    count   (B,) int   the number of those chunks; the mean is taken on reading; 0: nothing seen yet
    doc_id  (B,) int   the document of the last token
    single  (B,) bool  every token seen so far is of `doc_id`; only `combine` asks for it; None: not known
    """

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    doc_id: Tensor
    single: Tensor | None = None


def combine(a: AttentionState, b: AttentionState) -> AttentionState:
    """Return the state after piece `a` followed by piece `b`, each the state of its own piece started from nothing.

    Associative, with a state of count 0 as its neutral element; differentiable in both sums. Ranks that hold
    consecutive pieces of a sequence exchange states with it. ValueError when `single` of a piece is None.
    """
    if a.single is None or b.single is None:
        raise ValueError("combine: both states must say whether they saw a single document (`single`), one is None")
    a_empty, b_empty = a.count == 0, b.count == 0
    continues = b.single & (a.doc_id == b.doc_id)
    keeps_a = continues | b_empty
    return AttentionState(
        sum=torch.where(keeps_a[:, None, None], a.sum, 0.0) + b.sum,
        count=torch.where(keeps_a, a.count, 0) + b.count,
        doc_id=torch.where(b_empty, a.doc_id, b.doc_id),
        single=torch.where(b_empty, a.single, b.single & (a_empty | (a.single & continues))),
    )
