"""Samples to batches: fixed windows of the token stream, their documents, and the order in which a run takes them."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.order import sample_position
from pipeline.shards import TokenDataset


@dataclass(frozen=True)
class Batch:
    """Windows of tokens, (B, T) each.

    Attributes:
        tokens: int64, the inputs; `</s>` as an input opens the next document.
        targets: int64, the next token of each; `</s>` as a target closes the document.
        doc_ids: int64, the target's document, numbered from 0 in each window, non-decreasing.
        loss_mask: bool, False on padding, which is a document of its own.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    doc_ids: torch.Tensor
    loss_mask: torch.Tensor


class Windows:
    """A split as ceil(n_tokens / seq_len) windows: with X = [`</s>`] + tokens, window w predicts X[wL+1 : wL+L+1].

    Every token of the split is a target in exactly one window; the last one is padded.
    """

    def __init__(self, dataset: TokenDataset, seq_len: int) -> None:
        if seq_len < 1:
            raise UserError(f"seq_len: {seq_len} must be at least 1")
        if dataset.n_tokens < 1:
            raise UserError(f"{dataset.path}: split {dataset.split!r} holds no tokens")
        self.dataset, self.seq_len = dataset, seq_len

    def __len__(self) -> int:
        return -(-self.dataset.n_tokens // self.seq_len)

    def load(self, indices: Sequence[int]) -> Batch:
        """The windows of these numbers, in this order."""
        shape = len(indices), self.seq_len
        tokens = np.full(shape, self.dataset.pad_id, np.int64)
        targets = np.full(shape, self.dataset.pad_id, np.int64)
        doc_ids = np.empty(shape, np.int64)
        loss_mask = np.zeros(shape, np.bool_)
        for row, window in enumerate(indices):
            if not 0 <= window < len(self):
                raise IndexError(f"window {window} is not in range({len(self)})")
            start = window * self.seq_len
            stop = min(start + self.seq_len, self.dataset.n_tokens)
            size = stop - start
            if start:
                stream = self.dataset.read(start - 1, stop)
                tokens[row, :size], targets[row, :size] = stream[:-1], stream[1:]
            else:
                stream = self.dataset.read(0, stop)
                tokens[row, 0], tokens[row, 1:size], targets[row, :size] = self.dataset.eos_id, stream[:-1], stream
            documents = self.dataset.document_numbers(start, stop)
            doc_ids[row, :size] = documents - documents[0]
            doc_ids[row, size:] = doc_ids[row, size - 1] + 1
            loss_mask[row, :size] = True
        return Batch(*(torch.from_numpy(array) for array in (tokens, targets, doc_ids, loss_mask)))


@dataclass(frozen=True)
class DataState:
    """Where a run stands in its data: a few numbers from which it goes on exactly.

    Attributes:
        next_sample: the first sample number not taken yet.
        skipped: half-open ranges of sample numbers that are never taken.
        digest: of the dataset (64 hex digits).
    """

    next_sample: int
    skipped: tuple[tuple[int, int], ...]
    seed: int
    digest: str
    seq_len: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "skipped": [list(part) for part in self.skipped]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "DataState":
        """The state that `to_dict` described."""
        return cls(**{**data, "skipped": tuple((start, stop) for start, stop in data["skipped"])})


class TrainingStream:
    """The samples of a run, numbered from 0 over all epochs; which window a number means depends on nothing but
    (seed, digest, seq_len), so that ranks, micro batches and restarts never change what a step sees.

    Raises:
        UserError: `state` belongs to another dataset, sequence length or seed.
    """

    def __init__(self, dataset: TokenDataset, *, seq_len: int, seed: int, state: DataState | None = None) -> None:
        self._windows = Windows(dataset, seq_len)
        self.windows_per_epoch = len(self._windows)
        fresh = DataState(next_sample=0, skipped=(), seed=seed, digest=dataset.digest, seq_len=seq_len)
        self._state = state or fresh
        differences = [
            f"{name} was {getattr(self._state, name)}, now {getattr(fresh, name)}"
            for name in ("digest", "seq_len", "seed")
            if getattr(self._state, name) != getattr(fresh, name)
        ]
        if differences:
            raise UserError(
                f"the run's data cannot go on where it stopped: {'; '.join(differences)}. Give back the old value, "
                "or start a new run from the checkpoint's weights."
            )
        self._skipped = sorted(self._state.skipped)
        self._next = self._state.next_sample

    def take(self, n: int) -> list[int]:
        """The next `n` sample numbers that are not skipped; advances."""
        taken: list[int] = []
        while len(taken) < n:
            self._next = self._after_skipped(self._next)
            later = [start for start, _ in self._skipped if start > self._next]
            stop = min([self._next + n - len(taken), *later])
            taken += range(self._next, stop)
            self._next = stop
        return taken

    def _after_skipped(self, sample: int) -> int:
        for start, stop in self._skipped:
            if start <= sample < stop:
                sample = stop
        return sample

    def load(self, samples: Sequence[int]) -> Batch:
        """The batch of these sample numbers, in this order."""
        seed, digest = self._state.seed, self._state.digest
        return self._windows.load(
            [sample_position(sample, self.windows_per_epoch, seed=seed, digest=digest)[1] for sample in samples]
        )

    @property
    def state(self) -> DataState:
        """What a checkpoint has to keep."""
        old = self._state
        return DataState(self._next, old.skipped, seed=old.seed, digest=old.digest, seq_len=old.seq_len)


def evaluation_batches(
    dataset: TokenDataset, *, seq_len: int, batch_size: int, rank: int, world_size: int
) -> Iterator[Batch | None]:
    """This rank's windows of one pass over a split, in order, `batch_size` at a time (the last batch may be smaller).

    Windows are dealt to the ranks in turn. All ranks get the same number of items, None where one has no window left,
    so that collectives match; over all ranks every token is scored exactly once.
    """
    windows = Windows(dataset, seq_len)
    mine = range(rank, len(windows), world_size)
    longest = -(-len(windows) // world_size)
    for start in range(0, longest, batch_size):
        part = mine[start : start + batch_size]
        yield windows.load(part) if part else None
