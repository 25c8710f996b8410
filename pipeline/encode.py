"""The tasks of a preparation: survey files, train the tokenizer, encode units, assemble shards.

Each is a plain function of its arguments whose result is a file that appears whole or not at all, so that any worker
may run it, and run it again. `workspace` is the directory of intermediate files.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.atomic import write_aside, write_json
from pipeline.clean import Dropped, clean
from pipeline.config import Content
from pipeline.errors import UserError
from pipeline.locations import Piece, SourceFile
from pipeline.order import derive_key, keyed_hash
from pipeline.shards import TRAIN, Shard, ShardRecord, ShardWriter, bin_path, idx_path
from pipeline.sources import Survey, read_piece, survey
from pipeline.tokenizer import Tokenizer, train_tokenizer

Unit = tuple[Piece, ...]
_SAMPLE_UNITS = 64


@dataclass(frozen=True)
class SplitCounts:
    """What a unit adds to a split; `utf8_bytes` is the text as tokenized."""

    documents: int
    tokens: int
    utf8_bytes: int
    dropped: dict[str, int]


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


def survey_files(content: Content, files: Sequence[SourceFile]) -> list[Survey]:
    """Hash files and cut them into pieces."""
    return [survey(content, file) for file in files]


def _documents(content: Content, unit: Unit) -> Iterator[tuple[str, str, str | Dropped]]:
    """(id, split, text or why it is dropped) of a unit's documents, in the order in which they are written."""
    key = derive_key("document order", content.seed)
    documents = [document for piece in unit for document in read_piece(content, piece)]
    documents.sort(key=lambda document: (keyed_hash(key, document.id), document.id))
    for document in documents:
        yield document.id, choose_split(document.id, content), clean(document.id, document.data, content.clean)


def _sample(content: Content, units: Sequence[Unit]) -> Iterator[str]:
    """About `sample_bytes` of training text, spread over many units (which come in keyed order)."""
    assert content.tokenizer.train is not None
    left = content.tokenizer.train.sample_bytes
    chosen = units[: max(_SAMPLE_UNITS, -(-2 * left // content.unit_bytes))]
    for number, unit in enumerate(chosen):
        share = -(-left // (len(chosen) - number))
        for _, split, text in _documents(content, unit):
            if split == TRAIN and isinstance(text, str) and share > 0:
                # As many characters as bytes are left: at least that much text, and no character is cut.
                text = text[:share]
                size = len(text.encode())
                share, left = share - size, left - size
                yield text
        if left <= 0:
            return


def make_tokenizer(content: Content, units: Sequence[Unit], target: Path) -> None:
    """Train the tokenizer and write it to `target`.

    Raises:
        UserError: no training text, or not enough for the vocabulary.
    """
    assert content.tokenizer.train is not None
    sample = _sample(content, units)
    first = next(sample, None)
    if first is None:
        raise UserError(
            "content.sources: no document with text falls into the train split, so there is nothing to train a "
            "tokenizer on; add documents or lower content.splits"
        )
    model = train_tokenizer(_chain(first, sample), content.tokenizer.train)
    with write_aside(target) as file:
        file.write(model)


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


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
    content: Content, number: int, unit: Unit, tokenizer: Path, tokenizer_sha256: str, workspace: Path
) -> int:
    """Tokenize a unit, write its tokens by split, enter it in the ledger, and return its number."""
    model = _load_tokenizer(tokenizer, tokenizer_sha256)
    dtype = np.uint16 if model.vocab_size <= 1 << 16 else np.int32
    encoded: dict[str, list[np.ndarray]] = {split: [] for split in split_names(content)}
    utf8_bytes: Counter[str] = Counter()
    dropped: dict[str, Counter[str]] = {split: Counter() for split in encoded}
    for _, split, text in _documents(content, unit):
        if isinstance(text, Dropped):
            dropped[split][text.reason] += 1
            continue
        ids = model.encode(text)
        ids.append(model.eos_id)
        encoded[split].append(np.array(ids, dtype))
        utf8_bytes[split] += len(text.encode())
    counts: dict[str, Any] = {}
    for split, documents in encoded.items():
        with ShardWriter(unit_stem(workspace, number, split), model.vocab_size) as writer:
            for tokens in documents:
                writer.append(tokens, np.array([len(tokens)]))
        record = writer.record
        counts[split] = asdict(SplitCounts(record.documents, record.tokens, utf8_bytes[split], dict(dropped[split])))
    write_json(unit_ledger(workspace, number), counts)
    return number


def read_ledger(workspace: Path, number: int) -> dict[str, SplitCounts] | None:
    """A finished unit's counts by split; None: it is not finished."""
    try:
        entries = json.loads(unit_ledger(workspace, number).read_bytes())
    except FileNotFoundError:
        return None
    return {split: SplitCounts(**entry) for split, entry in entries.items()}


def plan_shards(workspace: Path, units: int, split: str, shard_tokens: int) -> Iterator[tuple[ShardPart, ...]]:
    """Cut a split, in the order of its units, after the first document with which a shard holds `shard_tokens`."""
    parts: list[ShardPart] = []
    held = 0
    for unit in range(units):
        ends = np.cumsum(Shard(unit_stem(workspace, unit, split)).lengths, dtype=np.int64)
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
