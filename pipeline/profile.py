"""What a dataset holds, in bounded memory: lengths of its documents, use of its vocabulary, and documents to look at.

Lengths come from the index files; what needs the tokens themselves is counted in a sample that the digest chooses.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.order import derive_key, permute
from pipeline.shards import Shard, TokenDataset, read_manifest
from pipeline.tokenizer import Tokenizer

SAMPLE_TOKENS = 50_000_000
END = "⏎</s>"
UNKNOWN = "unknown"

_EXACT_LENGTHS = 1 << 20  # of longer documents a corpus holds few: at most one for each so many of its tokens
_LENGTHS_AT_ONCE = 1 << 22
_TOKENS_AT_ONCE = 1 << 22
_MOST_BLOCK_TOKENS, _LEAST_BLOCKS = 1 << 16, 64
_HEAD_TOKENS, _TAIL_TOKENS = 120, 40
_MOST_BINS = 48


@dataclass(frozen=True)
class Counts:
    """Documents, tokens and UTF-8 bytes of text; `utf8_bytes` None: not recorded."""

    documents: int
    tokens: int
    utf8_bytes: int | None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text that a token stands for on average; None: not known."""
        return self.utf8_bytes / self.tokens if self.utf8_bytes is not None and self.tokens else None

    def cells(self) -> list[str]:
        """Documents, tokens, bytes of text and bytes per token, as a table shows them."""
        ratio = self.bytes_per_token
        return [
            f"{self.documents:,}",
            f"{self.tokens:,}",
            UNKNOWN if self.utf8_bytes is None else f"{self.utf8_bytes:,}",
            UNKNOWN if ratio is None else f"{ratio:.3f}",
        ]


@dataclass(frozen=True)
class Lengths:
    """Lengths of documents in tokens, the closing `</s>` included; the percentiles are lengths that occur.

    Attributes:
        edges: (bins + 1,) of a histogram whose bins have about the same width in the logarithm.
        counts: (bins,) documents with edges[i] <= length < edges[i + 1].
    """

    minimum: int
    median: int
    p90: int
    p99: int
    maximum: int
    edges: list[int]
    counts: list[int]


@dataclass(frozen=True)
class VocabularyUse:
    """How often the pieces of a vocabulary occur in the tokens that were looked at.

    Attributes:
        occurrences: (size,) int64, by id.
        special: pieces that stand for no text (unknown, end, padding, mask); `used` and `unused` leave them out.
        used: how many pieces occur at least 1, 10 and 100 times.
        byte_fallback_share: of the tokens, those that spell a single byte.
        unknown_tokens: tokens for text that the tokenizer could not spell.
        tokens: how many were looked at, of `of_tokens`.
    """

    occurrences: np.ndarray
    size: int
    special: int
    used: dict[int, int]
    unused: int
    byte_fallback_share: float
    unknown_tokens: int
    tokens: int
    of_tokens: int


@dataclass(frozen=True)
class SampleDocument:
    """A document to look at: its number in the split, its length in tokens, its text (of a long one both ends)."""

    split: str
    document: int
    tokens: int
    text: str


@dataclass(frozen=True)
class SplitProfile:
    """A split: its size, its number of shards, the lengths of its documents."""

    counts: Counts
    shards: int
    lengths: Lengths


@dataclass(frozen=True)
class Profile:
    """What `profile_dataset` found. `sources` None: the manifest does not say what came from where."""

    name: str
    digest: str
    splits: dict[str, SplitProfile]
    lengths: Lengths
    sources: dict[str, Counts] | None
    dropped: dict[str, int]
    vocabulary: VocabularyUse
    samples: list[SampleDocument]

    @property
    def counts(self) -> Counts:
        """Over all splits that were looked at."""
        return add_counts(split.counts for split in self.splits.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = asdict(self)
        del plain["vocabulary"]["occurrences"]
        return plain


def profile_dataset(
    path: str | Path, *, split: str | None = None, samples: int = 3, sample_tokens: int = SAMPLE_TOKENS
) -> Profile:
    """Look through a dataset, or one split of it.

    Args:
        samples: how many documents to decode, the same at each call.
        sample_tokens: the most tokens to read for the vocabulary's use.

    Raises:
        UserError: not a dataset, no such split, or damaged as far as what is read shows.
    """
    path = Path(path).absolute()
    manifest = read_manifest(path)
    names = list(manifest["splits"]) if split is None else [split]
    if not names:
        raise UserError(f"{path}: a dataset without splits")
    datasets = [TokenDataset.open(path, name) for name in names]
    entries = {name: manifest["splits"][name] for name in names}
    tokenizer = Tokenizer(datasets[0].tokenizer_path)
    all_lengths = _LengthCounter()
    splits = {}
    for name, entry in entries.items():
        lengths = _count_lengths(path, name, entry)
        all_lengths.merge(lengths)
        splits[name] = SplitProfile(split_counts(entry), len(entry["shards"]), lengths.summary())
    return Profile(
        name=path.name,
        digest=manifest["digest"],
        splits=splits,
        lengths=all_lengths.summary(),
        sources=sum_sources(entries.values()),
        dropped=sum_dropped(entries.values()),
        vocabulary=_vocabulary_use(datasets, tokenizer, sample_tokens),
        samples=_sample_documents(path, manifest["digest"], entries, tokenizer, samples),
    )


def split_counts(entry: dict[str, Any]) -> Counts:
    """The size of a split, or of a source in it, from its entry in the manifest."""
    return Counts(entry["documents"], entry["tokens"], entry.get("utf8_bytes"))


def add_counts(parts: Iterable[Counts]) -> Counts:
    """The sum; bytes are known where they are known of each part."""
    documents = tokens = 0
    utf8_bytes: int | None = 0
    for part in parts:
        documents, tokens = documents + part.documents, tokens + part.tokens
        utf8_bytes = None if utf8_bytes is None or part.utf8_bytes is None else utf8_bytes + part.utf8_bytes
    return Counts(documents, tokens, utf8_bytes)


def sum_sources(splits: Iterable[dict[str, Any]]) -> dict[str, Counts] | None:
    """Sizes by source over the manifest's entries of some splits, most tokens first; None: not recorded."""
    parts: dict[str, list[Counts]] = {}
    for entry in splits:
        if not entry.get("by_source"):
            return None
        for name, source in entry["by_source"].items():
            parts.setdefault(name, []).append(split_counts(source))
    totals = {name: add_counts(counts) for name, counts in parts.items()}
    return dict(sorted(totals.items(), key=lambda item: (-item[1].tokens, item[0]))) or None


def sum_dropped(splits: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Dropped documents by reason over the manifest's entries of some splits, most first."""
    totals: dict[str, int] = {}
    for entry in splits:
        for reason, count in (entry.get("dropped") or {}).items():
            totals[reason] = totals.get(reason, 0) + count
    return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))


def _open_shard(path: Path, split: str, record: dict[str, Any]) -> Shard:
    try:
        return Shard(path / split / record["name"])
    except ValueError as error:
        raise UserError(f"{error}; `python -m pipeline.verify {path}` checks the whole dataset") from None


class _LengthCounter:
    """Exact percentiles of any number of lengths in a few megabytes."""

    def __init__(self) -> None:
        self._short = np.zeros(_EXACT_LENGTHS, np.int64)
        self._long: list[np.ndarray] = []

    def add(self, lengths: np.ndarray) -> None:
        short = np.bincount(lengths[lengths < _EXACT_LENGTHS])
        self._short[: len(short)] += short
        self._long.append(lengths[lengths >= _EXACT_LENGTHS].astype(np.int64))

    def merge(self, other: "_LengthCounter") -> None:
        self._short += other._short
        self._long += other._long

    def summary(self) -> Lengths:
        short = np.flatnonzero(self._short)
        long, long_counts = np.unique(np.concatenate([np.zeros(0, np.int64), *self._long]), return_counts=True)
        values, counts = np.concatenate([short, long]), np.concatenate([self._short[short], long_counts])
        if not len(values):
            return Lengths(0, 0, 0, 0, 0, [], [])
        up_to = np.cumsum(counts)
        median, p90, p99 = (int(values[np.searchsorted(up_to, np.ceil(up_to[-1] * q))]) for q in (0.5, 0.9, 0.99))
        bins = int(np.clip(2 * up_to[-1] ** 0.4, 4, _MOST_BINS))
        edges = np.unique(np.ceil(np.geomspace(values[0], values[-1] + 1, bins + 1) - 1e-9).astype(np.int64))
        histogram, _ = np.histogram(values, edges, weights=counts)
        return Lengths(
            minimum=int(values[0]),
            median=median,
            p90=p90,
            p99=p99,
            maximum=int(values[-1]),
            edges=edges.tolist(),
            counts=histogram.astype(np.int64).tolist(),
        )


def _count_lengths(path: Path, split: str, entry: dict[str, Any]) -> _LengthCounter:
    counter = _LengthCounter()
    for record in entry["shards"]:
        shard = _open_shard(path, split, record)
        total = 0
        for start in range(0, len(shard.lengths), _LENGTHS_AT_ONCE):
            lengths = shard.lengths[start : start + _LENGTHS_AT_ONCE]
            if lengths.min() < 1:
                raise UserError(f"{path / split / record['name']}.idx: damaged: a document of {lengths.min()} tokens")
            total += int(lengths.sum(dtype=np.int64))
            counter.add(lengths)
        if total != record["tokens"]:
            raise UserError(
                f"{path / split / record['name']}.idx: damaged: its documents have {total:,} tokens, "
                f"the manifest counts {record['tokens']:,}"
            )
    return counter


def _vocabulary_use(datasets: list[TokenDataset], tokenizer: Tokenizer, sample_tokens: int) -> VocabularyUse:
    of_tokens = sum(dataset.n_tokens for dataset in datasets)
    occurrences = np.zeros(tokenizer.vocab_size, np.int64)
    for dataset in datasets:
        # Each split has its share of the sample.
        quota = -(-dataset.n_tokens * min(sample_tokens, of_tokens) // max(of_tokens, 1))
        for start, stop in _sampled_ranges(dataset, quota):
            tokens = dataset.read(start, stop)
            if tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size:
                raise UserError(
                    f"{dataset.path}: damaged: split {dataset.split!r} holds an id outside the vocabulary of "
                    f"{tokenizer.vocab_size} pieces; `python -m pipeline.verify {dataset.path}` finds the file"
                )
            occurrences += np.bincount(tokens, minlength=tokenizer.vocab_size)
    text = ~tokenizer.special_pieces()
    tokens_read = int(occurrences.sum())
    return VocabularyUse(
        occurrences=occurrences,
        size=tokenizer.vocab_size,
        special=int((~text).sum()),
        used={times: int((occurrences[text] >= times).sum()) for times in (1, 10, 100)},
        unused=int((occurrences[text] == 0).sum()),
        byte_fallback_share=float(occurrences[tokenizer.byte_pieces()].sum() / max(tokens_read, 1)),
        unknown_tokens=int(occurrences[tokenizer.unk_id]) if tokenizer.unk_id >= 0 else 0,
        tokens=tokens_read,
        of_tokens=of_tokens,
    )


def _sampled_ranges(dataset: TokenDataset, quota: int) -> Iterator[tuple[int, int]]:
    """Ranges of about `quota` tokens together: all tokens, or blocks that a keyed permutation chooses."""
    if quota >= dataset.n_tokens:
        for start in range(0, dataset.n_tokens, _TOKENS_AT_ONCE):
            yield start, min(start + _TOKENS_AT_ONCE, dataset.n_tokens)
        return
    size = max(1, min(_MOST_BLOCK_TOKENS, quota // _LEAST_BLOCKS))
    blocks = -(-dataset.n_tokens // size)
    key = derive_key("profile tokens", dataset.digest, dataset.split)
    for block in sorted(permute(number, blocks, key) for number in range(quota // size)):
        yield block * size, min((block + 1) * size, dataset.n_tokens)


def _sample_documents(
    path: Path, digest: str, entries: dict[str, dict[str, Any]], tokenizer: Tokenizer, samples: int
) -> list[SampleDocument]:
    total = sum(entry["documents"] for entry in entries.values())
    key = derive_key("profile documents", digest, *entries)
    chosen = sorted(permute(number, total, key) for number in range(min(samples, total)))
    return [_load_document(path, entries, tokenizer, number) for number in chosen]


def _load_document(
    path: Path, entries: dict[str, dict[str, Any]], tokenizer: Tokenizer, document: int
) -> SampleDocument:
    """Document number `document` of the splits in a row."""
    for split, entry in entries.items():
        if document >= entry["documents"]:
            document -= entry["documents"]
            continue
        inside = document
        for record in entry["shards"]:
            if inside < record["documents"]:
                shard = _open_shard(path, split, record)
                start = int(shard.offsets[inside]) // shard.tokens.itemsize
                tokens = shard.tokens[start : start + int(shard.lengths[inside])]
                return SampleDocument(split, document, len(tokens), _readable(tokens, tokenizer))
            inside -= record["documents"]
    raise IndexError(document)


def _readable(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of a document with its end visible; from the middle of a long one something is left out."""
    end = f" {END}" if int(tokens[-1]) == tokenizer.eos_id else ""
    ids = [int(token) for token in (tokens[:-1] if end else tokens)]
    left_out = len(ids) - _HEAD_TOKENS - _TAIL_TOKENS
    if left_out <= 0:
        return _visible(tokenizer.decode(ids)) + end
    # A cut may go through a character that is spelt in bytes.
    head = tokenizer.decode(ids[:_HEAD_TOKENS]).rstrip("\ufffd")
    tail = tokenizer.decode(ids[-_TAIL_TOKENS:]).lstrip("\ufffd")
    return f"{_visible(head)} [… {left_out:,} tokens …] {_visible(tail)}{end}"


def _visible(text: str) -> str:
    """Control characters as their pictures: a terminal must not act on what a document holds."""
    codes = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
    return text.translate(codes | dict.fromkeys(range(128, 160), 0xFFFD))
