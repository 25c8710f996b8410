"""Scoring validation sets: every token once, over all processes."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from launch.config import RunConfig
from launch.console import duration, say
from launch.engine import Processes
from pipeline.batches import Batch, evaluation_batches
from pipeline.masking import MaskedLM
from pipeline.shards import TokenDataset
from pipeline.tokenizer import Tokenizer

LARGEST_EXPONENT = 700.0
"""Of a perplexity: what follows is no number that a store could keep."""


class Validation:
    """The named sets of `data.validation`, scored by the weights of an engine."""

    def __init__(self, config: RunConfig, sets: Mapping[str, TokenDataset], engine: Any, processes: Processes) -> None:
        self._config, self._sets, self._engine, self._processes = config, sets, engine, processes

    def score(self, step: int, beat: Callable[[], None]) -> dict[str, float]:
        """Score every set after `step` and say how it did: `NAME/loss` and so on. Called by all processes.

        `beat` is called before every batch.
        """
        config = self._config
        found: dict[str, float] = {}
        for name, dataset in self._sets.items():
            began = time.monotonic()
            scores, tokens = evaluate(
                self._engine,
                dataset,
                self._processes,
                seq_len=config.data.seq_len,
                micro_batch=config.evaluate.micro_batch or config.train.micro_batch,
                masked_lm=config.data.masked_lm,
                max_tokens=config.data.validation[name].max_tokens,
                beat=beat,
            )
            found |= {f"{name}/{key}": value for key, value in scores.items()}
            listed = "  ".join(f"{key.replace('_', ' ')} {value:,.4f}" for key, value in scores.items())
            width, took = max(map(len, self._sets)), duration(time.monotonic() - began)
            say(f"  {name:<{width}}  {listed}  ({tokens:,} tokens, {took})")
        return found


def evaluate(
    engine: Any,
    dataset: TokenDataset,
    processes: Processes,
    *,
    seq_len: int,
    micro_batch: int,
    masked_lm: MaskedLM | None = None,
    max_tokens: int | None = None,
    beat: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], int]:
    """Mean nats per token (`loss`), `perplexity`, and `bits_per_byte` over the UTF-8 bytes of the scored text; and how
    many tokens were scored.

    With `masked_lm` the loss alone, over the hidden tokens: it is no likelihood of the text. With `max_tokens` only so
    many, and the bytes that they stand for. `beat` is called before every batch.
    Called by all processes; they make the same number of forward passes, as ZeRO-3 requires.
    """
    part = max_tokens is not None and max_tokens < dataset.n_tokens
    lengths = torch.from_numpy(Tokenizer(dataset.tokenizer_path).utf8_lengths()) if part and not masked_lm else None
    totals = torch.zeros(3, dtype=torch.float64, device=processes.device)
    engine.eval()
    with torch.no_grad():
        for batch in evaluation_batches(
            dataset,
            seq_len=seq_len,
            batch_size=micro_batch,
            rank=processes.rank,
            world_size=processes.world_size,
            masked_lm=masked_lm,
            max_tokens=max_tokens,
        ):
            beat()
            scored = batch if batch is not None else _blank(seq_len)
            nats = engine(*to_device(scored, processes.device))
            size = 0 if lengths is None else int(lengths[scored.targets[scored.loss_mask]].sum())
            counted = torch.tensor([0, int(scored.loss_mask.sum()), size], dtype=torch.float64)
            counted = counted.to(processes.device)
            counted[0] = nats.double()
            totals += counted
    engine.train()
    dist.all_reduce(totals)
    nats, tokens, utf8_bytes = totals.tolist()
    if masked_lm or not tokens:
        return ({"loss": nats / tokens} if tokens else {}), int(tokens)
    loss = nats / tokens
    scores = {"loss": loss, "perplexity": math.exp(min(loss, LARGEST_EXPONENT))}
    if size := utf8_bytes if part else dataset.n_utf8_bytes:
        scores["bits_per_byte"] = nats / math.log(2) / size
    return scores, int(tokens)


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The arguments of the model's forward: tokens, targets, loss_mask, doc_ids, each (B, T) on `device`."""
    tensors = (batch.tokens, batch.targets, batch.loss_mask, batch.doc_ids)
    tokens, targets, loss_mask, doc_ids = (t.to(device, non_blocking=True) for t in tensors)
    return tokens, targets, loss_mask, doc_ids


def _blank(seq_len: int) -> Batch:
    zeros = torch.zeros(1, seq_len, dtype=torch.int64)
    return Batch(tokens=zeros, targets=zeros, doc_ids=zeros, loss_mask=zeros.bool())
