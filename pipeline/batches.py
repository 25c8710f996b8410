"""Samples to batches: fixed windows of the token stream, their documents, and the order in which a run takes them."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.masking import Corruption, MaskedLM
from pipeline.mixture import Component, Mixture
from pipeline.order import derive_key, permute, sample_position
from pipeline.shards import TokenDataset


@dataclass(frozen=True)
class Batch:
    """Windows of tokens, (B, T) each.

    Attributes:
        tokens: int64, the inputs; `</s>` as an input opens the next document. Masked LM: the targets, some of them
            hidden.
        targets: int64, the next token of each; `</s>` as a target closes the document.
        doc_ids: int64, the target's document, numbered from 0 in each window, non-decreasing.
        loss_mask: bool, False on padding, which is a document of its own. Masked LM: True on the chosen tokens alone.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    doc_ids: torch.Tensor
    loss_mask: torch.Tensor

    @classmethod
    def allocate(cls, size: int, seq_len: int, *, pinned: bool = False) -> "Batch":
        """Memory for a batch of `size` windows; pinned, a GPU copies from it while the CPU goes on."""
        shape, kinds = (size, seq_len), (torch.int64, torch.int64, torch.int64, torch.bool)
        return cls(*(torch.empty(shape, dtype=dtype, pin_memory=pinned) for dtype in kinds))

    def rows(self) -> Iterator["_Row"]:
        """The windows one by one, as arrays that share their memory."""
        arrays = (self.tokens, self.targets, self.doc_ids, self.loss_mask)
        return map(_Row._make, zip(*(tensor.numpy() for tensor in arrays), strict=True))


class _Row(NamedTuple):
    """A window, (T,) each; see `Batch`."""

    tokens: np.ndarray
    targets: np.ndarray
    doc_ids: np.ndarray
    loss_mask: np.ndarray


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

    def fill(self, window: int, row: _Row) -> None:
        """Write window number `window` into the memory of `row`: each token straight from the map to its two places."""
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} is not in range({len(self)})")
        start = window * self.seq_len
        stop = min(start + self.seq_len, self.dataset.n_tokens)
        size = stop - start
        self.dataset.read(start, stop, row.targets[:size])
        if start:
            self.dataset.read(start - 1, stop - 1, row.tokens[:size])
        else:
            row.tokens[0] = self.dataset.eos_id
            self.dataset.read(0, stop - 1, row.tokens[1:size])
        documents = self.dataset.document_numbers(start, stop, row.doc_ids[:size])
        documents -= documents[0]
        row.loss_mask[:size] = True
        if size < self.seq_len:
            row.tokens[size:] = row.targets[size:] = self.dataset.pad_id
            row.doc_ids[size:] = documents[-1] + 1
            row.loss_mask[size:] = False

    def load(self, indices: Sequence[int]) -> Batch:
        """The windows of these numbers, in this order."""
        batch = Batch.allocate(len(indices), self.seq_len)
        for window, row in zip(indices, batch.rows(), strict=True):
            self.fill(window, row)
        return batch


@dataclass(frozen=True)
class DataState:
    """Where a run stands in its data: a few numbers from which it goes on exactly.

    Attributes:
        next_sample: the first sample number not taken yet.
        skipped: half-open ranges of sample numbers that are never taken.
        digest: of the dataset or the mixture (64 hex digits).
        datasets: a line for each, only to say what changed where the digest did; see `Mixture.describe`.
    """

    next_sample: int
    skipped: tuple[tuple[int, int], ...]
    seed: int
    digest: str
    seq_len: int
    datasets: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "skipped": [list(part) for part in self.skipped], "datasets": list(self.datasets)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "DataState":
        """The state that `to_dict` described."""
        skipped = tuple((start, stop) for start, stop in data["skipped"])
        return cls(**{**data, "skipped": skipped, "datasets": tuple(data.get("datasets", ()))})


class TrainingStream:
    """The samples of a run, numbered from 0 over all epochs; which window a number means depends on nothing but
    (seed, digest, seq_len), so that ranks, micro batches and restarts never change what a step sees.

    In a mixture each dataset has the order that it has alone, and counts its own epochs.

    Raises:
        UserError: `state` belongs to other datasets or shares, another sequence length or seed.
    """

    def __init__(
        self,
        data: TokenDataset | Mixture,
        *,
        seq_len: int,
        seed: int,
        masked_lm: MaskedLM | None = None,
        state: DataState | None = None,
    ) -> None:
        self._mixture = data if isinstance(data, Mixture) else Mixture([Component(data.split, data)])
        datasets = [component.dataset for component in self._mixture.components]
        self._windows = [Windows(dataset, seq_len) for dataset in datasets]
        self._corruption = Corruption(masked_lm, datasets[0], "training", seed) if masked_lm else None
        fresh = DataState(
            next_sample=0,
            skipped=(),
            seed=seed,
            digest=self._mixture.digest,
            seq_len=seq_len,
            datasets=self._mixture.describe(),
        )
        if state is not None:
            _refuse_changes(state, fresh)
            fresh = replace(fresh, next_sample=state.next_sample, skipped=state.skipped)
        self._state = fresh
        self._skipped = sorted(fresh.skipped)
        self._next = fresh.next_sample

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

    def position(self, sample: int) -> tuple[int, int]:
        """(component of the mixture, window of its dataset) of a sample number."""
        seed = self._state.seed
        number, index = self._mixture.position(sample, seed=seed)
        windows = self._windows[number]
        return number, sample_position(index, len(windows), seed=seed, digest=windows.dataset.digest)[1]

    def allocate(self, size: int, *, pinned: bool = False) -> Batch:
        """Memory for a batch of `size` samples."""
        return Batch.allocate(size, self._state.seq_len, pinned=pinned)

    def load(self, samples: Sequence[int], out: Batch | None = None) -> Batch:
        """The batch of these sample numbers, in this order; in the memory of `out` where it is given."""
        batch = self.allocate(len(samples)) if out is None else out
        for sample, row in zip(samples, batch.rows(), strict=True):
            number, window = self.position(sample)
            self._windows[number].fill(window, row)
            if self._corruption:
                self._corruption.apply(sample, row.tokens, row.targets, row.loss_mask)
        return batch

    @property
    def state(self) -> DataState:
        """What a checkpoint has to keep."""
        return replace(self._state, next_sample=self._next)


def _refuse_changes(old: DataState, new: DataState) -> None:
    differences = [
        f"{name} was {getattr(old, name)}, now {getattr(new, name)}"
        for name in ("digest", "seq_len", "seed")
        if getattr(old, name) != getattr(new, name)
    ]
    if old.digest != new.digest:
        differences += [f"gone: {line}" for line in old.datasets if line not in new.datasets]
        differences += [f"new: {line}" for line in new.datasets if old.datasets and line not in old.datasets]
    if differences:
        raise UserError(
            f"the run's data cannot go on where it stopped: {'; '.join(differences)}. Give back the old value, "
            "or start a new run from the checkpoint's weights."
        )


def evaluation_batches(
    dataset: TokenDataset,
    *,
    seq_len: int,
    batch_size: int,
    rank: int,
    world_size: int,
    masked_lm: MaskedLM | None = None,
    max_tokens: int | None = None,
) -> Iterator[Batch | None]:
    """This rank's windows of one pass over a split, in order, `batch_size` at a time (the last batch may be smaller).

    max_tokens: read only as many windows as hold so many tokens: the same ones in every run.
    Windows are dealt to the ranks in turn. All ranks get the same number of items, None where one has no window left,
    so that collectives match; over all ranks every token of these windows is scored exactly once. Masked LM: every
    chosen token, and what is chosen in a window depends on its number alone.
    """
    windows = Windows(dataset, seq_len)
    corruption = Corruption(masked_lm, dataset, "evaluation") if masked_lm else None
    chosen = _evaluated_windows(windows, max_tokens)
    mine = chosen[rank::world_size]
    longest = -(-len(chosen) // world_size)
    for start in range(0, longest, batch_size):
        part = mine[start : start + batch_size]
        batch = windows.load(part) if part else None
        if batch and corruption:
            for window, row in zip(part, batch.rows(), strict=True):
                corruption.apply(window, row.tokens, row.targets, row.loss_mask)
        yield batch


def _evaluated_windows(windows: Windows, max_tokens: int | None) -> Sequence[int]:
    wanted = len(windows) if max_tokens is None else -(-max_tokens // windows.seq_len)
    if wanted >= len(windows):
        return range(len(windows))
    key = derive_key("evaluated windows", windows.dataset.digest)
    return sorted(permute(number, len(windows), key) for number in range(wanted))
