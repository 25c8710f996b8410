"""The tasks of a preparation: survey files, train the tokenizer, encode units, assemble shards.

Each is a plain function of its arguments whose result is a file that appears whole or not at all, so that any worker
may run it, and run it again. `workspace` is the directory of intermediate files.
"""

import json
import socket
from bisect import insort
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.atomic import read_json, write_json
from pipeline.clean import Dropped, clean
from pipeline.config import Content
from pipeline.errors import UserError
from pipeline.locations import Document, Piece, Skipped, SourceFile
from pipeline.order import derive_key, keyed_hash
from pipeline.shards import TRAIN, Shard, ShardRecord, ShardWriter, bin_path, idx_path, read_index
from pipeline.sources import Survey, changed, read_piece, reading_order, survey
from pipeline.tokenizer import Tokenizer, train_tokenizer

if TYPE_CHECKING:
    from pipeline.duplicates import Flags

Unit = tuple[Piece, ...]
DUPLICATE_REASONS = {1: "exact_duplicate", 2: "near_duplicate"}
_SAMPLE_CHARACTERS = 500
_SAMPLE_UNITS = 64


@dataclass
class Counts:
    """What documents add to a split; `utf8_bytes` is the text as tokenized, `dropped` counts by reason."""

    documents: int = 0
    tokens: int = 0
    utf8_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Counts") -> None:
        """Add another's counts to these."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.utf8_bytes += other.utf8_bytes
        self.dropped += other.dropped

    def record(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "dropped": dict(sorted(self.dropped.items()))}


@dataclass
class Ledger:
    """What finished units hold: counts by split and source, and by reason the samples of what they dropped."""

    counts: dict[str, dict[str, Counts]] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def at(self, split: str, source: str) -> Counts:
        """The counts of a source's part of a split."""
        return self.counts.setdefault(split, {}).setdefault(source, Counts())

    def total(self, split: str | None = None) -> Counts:
        """The counts of a split, or of all."""
        total = Counts()
        for name, sources in self.counts.items():
            if split in (None, name):
                for counts in sources.values():
                    total.add(counts)
        return total

    def keep(self, samples: Sequence[dict[str, Any]], number: int) -> None:
        """Keep, of each reason, the `number` samples that come first in their keyed order."""
        for sample in samples:
            kept = self.samples.setdefault(sample["reason"], [])
            insort(kept, sample, key=lambda sample: (sample["order"], sample["id"]))
            del kept[number:]

    def add(self, other: "Ledger", number: int) -> None:
        """Add another's counts and samples to these."""
        for split, sources in other.counts.items():
            for source, counts in sources.items():
                self.at(split, source).add(counts)
        for samples in other.samples.values():
            self.keep(samples, number)

    def record(self) -> dict[str, Any]:
        """Plain data for JSON."""
        counts = {
            split: {source: entry.record() for source, entry in sorted(sources.items())}
            for split, sources in self.counts.items()
        }
        return {"counts": counts, "samples": dict(sorted(self.samples.items()))}


@dataclass(frozen=True)
class Prepared:
    """A document before it is tokenized: its text, or why it is dropped."""

    id: str
    source: str
    split: str
    text: str | Dropped


@dataclass(frozen=True)
class ShardPart:
    """Documents [start, stop) of a unit's share of a split."""

    unit: int
    start: int
    stop: int


def split_names(content: Content) -> list[str]:
    """All splits, `train` first."""
    return [TRAIN, *sorted(content.splits)]


def choose_split(document_id: str, content: Content) -> str:
    """The split of a document: a keyed hash of its id, nothing else."""
    point = keyed_hash(derive_key("split", content.seed), document_id) / 2**64
    for name, fraction in sorted(content.splits.items()):
        if point < fraction:
            return name
        point -= fraction
    return TRAIN


def survey_files(content: Content, files: Sequence[SourceFile], workspace: Path | None = None) -> list[Survey]:
    """Hash files and cut them into pieces, on a machine that sees `workspace` where one is given."""
    if workspace is not None:
        _check_shared(workspace)
    return [survey(content, file) for file in files]


def _check_shared(workspace: Path) -> None:
    if not workspace.is_dir():
        raise UserError(
            f"execution.output: {workspace.parent} is not seen from {socket.gethostname()}, which runs tasks of the "
            "cluster: name a directory on a file system that all its machines share"
        )


def changed_files(files: Sequence[tuple[str, tuple[Any, ...]]]) -> list[str]:
    """Of files, each with its state when it was hashed, the addresses of those that are another by now."""
    return [url for url, state in files if changed(url, state)]


def documents(content: Content, unit: Unit, flags: np.ndarray | None = None) -> Iterator[Prepared]:
    """A unit's documents in the order in which they are written; `flags` (uint8, one each) mark duplicates.

    What could not be read comes last, each as one `Prepared` of the training split for every document lost.
    """
    key = derive_key("document order", content.seed)
    found: list[tuple[int, str, Document]] = []
    skipped: list[tuple[str, Skipped]] = []
    for piece in unit:
        source = content.sources[piece.source].name
        for item in read_piece(content, piece):
            if isinstance(item, Skipped):
                skipped.append((source, item))
            else:
                found.append((keyed_hash(key, item.id), source, item))
    found.sort(key=lambda entry: (entry[0], entry[2].id))
    for place, (_, source, document) in enumerate(found):
        text = clean(document.id, document.data, content.clean)
        if flags is not None and flags[place] and isinstance(text, str):
            text = Dropped(DUPLICATE_REASONS[int(flags[place])], text)
        yield Prepared(document.id, source, choose_split(document.id, content), text)
    for source, lost in skipped:
        for _ in range(lost.count):
            yield Prepared(lost.id, source, TRAIN, Dropped(lost.reason))


def _sample(content: Content, units: Sequence[Unit], flags: "Flags | None") -> Iterator[str]:
    """About `sample_bytes` of training text, spread over many units: the first ones in their keyed order."""
    assert content.tokenizer.train is not None
    left = content.tokenizer.train.sample_bytes
    chosen = units[: max(_SAMPLE_UNITS, -(-2 * left // content.unit_bytes))]
    for done, number in enumerate(reading_order(chosen)):
        share = -(-left // (len(chosen) - done))
        for document in documents(content, chosen[number], flags.of(number) if flags else None):
            text = document.text
            if document.split == TRAIN and isinstance(text, str) and share > 0:
                # As many characters as bytes are left: at least that much text, and no character is cut.
                text = text[:share]
                size = len(text.encode())
                share, left = share - size, left - size
                yield text
        if left <= 0:
            return


def make_tokenizer(content: Content, units: Sequence[Unit], flags: "Flags | None") -> bytes:
    """Train the tokenizer; returns the model.

    Raises:
        UserError: no training text, or not enough for the vocabulary.
    """
    assert content.tokenizer.train is not None
    sample = _sample(content, units, flags)
    first = next(sample, None)
    if first is None:
        raise UserError(
            "content.sources: no document with text falls into the train split, so there is nothing to train a "
            "tokenizer on; add documents or lower content.splits"
        )
    return train_tokenizer(chain([first], sample), content.tokenizer.train)


@lru_cache(maxsize=1)
def _load_tokenizer(path: Path, sha256: str) -> Tokenizer:
    return Tokenizer(path)


def unit_stem(workspace: Path, number: int, split: str) -> Path:
    """Where a unit's tokens of a split lie, as a pair of files like a shard's."""
    return workspace / "units" / f"{number:07d}.{split}"


def unit_ledger(workspace: Path, number: int) -> Path:
    """The file whose presence says that a unit is finished; it holds the unit's counts."""
    return workspace / "units" / f"{number:07d}.json"


def encode_unit(
    content: Content,
    number: int,
    unit: Unit,
    flags: np.ndarray | None,
    tokenizer: Path,
    tokenizer_sha256: str,
    workspace: Path,
    samples: int,
) -> tuple[int, Ledger]:
    """Tokenize a unit, write its tokens by split and enter it in the ledger, unless it is there; (number, entry)."""
    if (done := read_ledger(workspace, number)) is not None:
        return number, done  # by an earlier run of this task, whose worker died at a later unit
    _check_shared(workspace)
    model = _load_tokenizer(tokenizer, tokenizer_sha256)
    encoded: dict[str, list[np.ndarray]] = {split: [] for split in split_names(content)}
    ledger = Ledger()
    sample_key = derive_key("dropped samples", content.seed)
    for document in documents(content, unit, flags):
        entry = ledger.at(document.split, document.source)
        if isinstance(document.text, Dropped):
            entry.dropped[document.text.reason] += 1
            if samples:
                ledger.keep([_sample_of(document, sample_key)], samples)
            continue
        ids = model.encode_array(document.text)
        encoded[document.split].append(ids)
        entry.documents += 1
        entry.tokens += len(ids)
        entry.utf8_bytes += len(document.text.encode())
    for split, arrays in encoded.items():
        with ShardWriter(unit_stem(workspace, number, split), model.vocab_size) as writer:
            for ids in arrays:
                writer.append(ids, np.array([len(ids)]))
    write_json(unit_ledger(workspace, number), ledger.record())
    return number, ledger


def _sample_of(document: Prepared, key: bytes) -> dict[str, Any]:
    assert isinstance(document.text, Dropped)
    data = document.text.data
    shown = data if isinstance(data, str) else repr(data[:_SAMPLE_CHARACTERS])
    return {
        "reason": document.text.reason,
        "split": document.split,
        "id": document.id,
        "text": shown[:_SAMPLE_CHARACTERS],
        "order": keyed_hash(key, document.id),
    }


def read_ledger(workspace: Path, number: int) -> Ledger | None:
    """A finished unit's ledger; None: it is not finished."""
    record = read_json(unit_ledger(workspace, number))
    if record is None:
        return None
    counts = {
        split: {source: Counts(**{**entry, "dropped": Counter(entry["dropped"])}) for source, entry in sources.items()}
        for split, sources in record["counts"].items()
    }
    return Ledger(counts, record["samples"])


def plan_shards(workspace: Path, units: int, split: str, shard_tokens: int) -> Iterator[tuple[ShardPart, ...]]:
    """Cut a split, in the order of its units, after the first document with which a shard holds `shard_tokens`."""
    parts: list[ShardPart] = []
    held = 0
    for unit in range(units):
        ends = np.cumsum(read_index(unit_stem(workspace, unit, split)).lengths, dtype=np.int64)
        start, before = 0, 0
        while start < len(ends):
            stop = min(int(np.searchsorted(ends, before + shard_tokens - held)) + 1, len(ends))
            parts.append(ShardPart(unit, start, stop))
            held += int(ends[stop - 1]) - before
            start, before = stop, int(ends[stop - 1])
            if held >= shard_tokens:
                yield tuple(parts)
                parts, held = [], 0
    if parts:
        yield tuple(parts)


def assemble_shard(
    workspace: Path, output: Path, split: str, number: int, parts: Sequence[ShardPart], vocab_size: int
) -> tuple[str, int, ShardRecord]:
    """Write one shard from the units' tokens, unless the ledger has it already; (split, number, record)."""
    ledger, stem = workspace / "shards" / f"{split}.{number:05d}.json", output / split / f"shard-{number:05d}"
    if ledger.exists() and bin_path(stem).exists() and idx_path(stem).exists():
        return split, number, ShardRecord(**json.loads(ledger.read_bytes()))
    with ShardWriter(stem, vocab_size) as writer:
        for part in parts:
            unit = Shard(unit_stem(workspace, part.unit, split))
            start = int(unit.offsets[part.start]) // unit.tokens.itemsize
            lengths = unit.lengths[part.start : part.stop]
            writer.append(unit.tokens[start : start + int(lengths.sum(dtype=np.int64))], lengths)
    write_json(ledger, asdict(writer.record))
    return split, number, writer.record
