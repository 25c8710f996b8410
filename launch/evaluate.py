"""Scoring a validation set whole: every token once, over all processes."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from launch.engine import Processes
from pipeline.batches import Batch, evaluation_batches
from pipeline.masking import MaskedLM
from pipeline.shards import TokenDataset


def evaluate(
    engine: Any,
    dataset: TokenDataset,
    processes: Processes,
    *,
    seq_len: int,
    micro_batch: int,
    masked_lm: MaskedLM | None = None,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean nats per token (`loss`), `perplexity`, and `bits_per_byte` over the UTF-8 bytes of the scored text.

    With `masked_lm` the loss alone, over the hidden tokens: it is no likelihood of the text. `beat` is called before
    every batch.
    Called by all processes; they make the same number of forward passes, as ZeRO-3 requires.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=processes.device)
    engine.eval()
    with torch.no_grad():
        for batch in evaluation_batches(
            dataset,
            seq_len=seq_len,
            batch_size=micro_batch,
            rank=processes.rank,
            world_size=processes.world_size,
            masked_lm=masked_lm,
        ):
            beat()
            scored = batch if batch is not None else _blank(seq_len)
            nats = engine(*to_device(scored, processes.device))
            totals += torch.stack([nats.double(), scored.loss_mask.sum().to(nats.device).double()])
    engine.train()
    dist.all_reduce(totals)
    nats, tokens = totals.tolist()
    if masked_lm:
        return {"loss": nats / tokens} if tokens else {}
    loss = nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / dataset.n_utf8_bytes,
    }


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The arguments of the model's forward: tokens, targets, loss_mask, doc_ids, each (B, T) on `device`."""
    tensors = (batch.tokens, batch.targets, batch.loss_mask, batch.doc_ids)
    tokens, targets, loss_mask, doc_ids = (t.to(device, non_blocking=True) for t in tensors)
    return tokens, targets, loss_mask, doc_ids


def _blank(seq_len: int) -> Batch:
    zeros = torch.zeros(1, seq_len, dtype=torch.int64)
    return Batch(tokens=zeros, targets=zeros, doc_ids=zeros, loss_mask=zeros.bool())
