"""Duplicates over a whole corpus, in bounded memory: fingerprints by unit, then a join cut by hash.

Of documents that are alike, the first one in the order in which documents are written stays. Each unit leaves sorted
fingerprints; those of many units are merged into runs, and a task of the join reads one range of hashes out of every
run. What a join finds, it finds for any number of workers.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.atomic import read_json, write_aside, write_json
from pipeline.config import Content, NearDuplicates
from pipeline.encode import Unit, documents

_EXACT, _NEAR = 1, 2
_RECORDS_A_JOIN = 2_000_000  # 24 bytes each; a merge or join holds a few copies of them
_REPRESENTATIVES = 16  # of a bucket, that later documents in it are compared with: boilerplate stays linear
_MINHASH_SEED = 1
_STARTS = "starts.npy"
_PORTION_CHARACTERS = 1 << 14  # of a text whose n-grams are hashed at once: what fits a cache
_WHITE_SPACE = re.compile(r"\s")

RunTasks = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[Any]]


@dataclass(frozen=True)
class Flags:
    """One byte a document: 0 it stays, else a key of DUPLICATE_REASONS. `starts[unit]` is the unit's first document."""

    path: Path
    starts: np.ndarray

    def of(self, unit: int) -> np.ndarray:
        """The flags of a unit's documents, in their order."""
        start, stop = self.starts[unit : unit + 2].tolist()
        return np.fromfile(self.path, np.uint8, stop - start, offset=start) if stop > start else np.zeros(0, np.uint8)


def find_duplicates(content: Content, units: Sequence[Unit], workspace: Path, run: RunTasks) -> Flags | None:
    """The flags of all documents; None where nothing of the kind is asked for. Finished parts are not done again."""
    near = content.clean.near_duplicates
    if not (content.clean.exact_duplicates or near):
        return None
    folder = workspace / "duplicates"
    folder.mkdir(exist_ok=True)
    ledgers = {number: done for number in range(len(units)) if (done := read_json(_ledger(folder, number))) is not None}
    todo = [(content, number, unit, folder) for number, unit in enumerate(units) if number not in ledgers]
    ledgers |= dict(run(fingerprint_unit, todo))
    entries = [ledgers[number] for number in range(len(units))]
    starts = np.cumsum([0, *(entry["documents"] for entry in entries)], dtype=np.int64)
    flags = Flags(folder / "flags", starts)
    if flags.path.exists():
        return flags
    _save(folder / _STARTS, starts)
    kept = [entry["kept"] for entry in entries]
    found = folder / "found"
    with write_aside(found) as file:  # a plain file that is mapped: as large as the corpus has documents
        # With its blocks: where a disk is full, writing to the map would end the process.
        os.posix_fallocate(file.fileno(), 0, max(int(starts[-1]), 1))
    marks = np.memmap(found, np.uint8, "r+")
    runs = _runs(kept)
    for ordinals in run(merge_exact, [(folder, *part) for part in pairwise(runs)]):
        marks[ordinals] = _EXACT
    for ordinals in run(join_exact, [(folder, runs[:-1], *part) for part in _parts(sum(kept))]):
        marks[ordinals] = _EXACT
    marks.flush()
    if near is not None:
        records = [number * len(_bands(near)) for number in kept]
        runs = _runs(records)
        for _ in run(merge_bands, [(folder, found, *part) for part in pairwise(runs)]):
            pass
        for ordinals in run(join_near, [(folder, runs[:-1], near, *part) for part in _parts(sum(records))]):
            marks[ordinals] = _NEAR
        marks.flush()
    del marks
    found.rename(flags.path)
    return flags


def _runs(records: Sequence[int]) -> list[int]:
    """Where to cut units so that each part holds about `_RECORDS_A_JOIN` of their records, both ends included."""
    edges, held = [0], 0
    for number, count in enumerate(records):
        if held and held + count > _RECORDS_A_JOIN:
            edges.append(number)
            held = 0
        held += count
    return [*edges, len(records)]


def _ledger(folder: Path, number: int) -> Path:
    return folder / f"{number:07d}.json"


def _array(folder: Path, number: int, name: str) -> Path:
    return folder / f"{number:07d}.{name}.npy"


def _run_of_units(folder: Path, name: str, first: int) -> Path:
    return folder / f"{first:07d}.{name}.run.npy"


def _save(path: Path, array: np.ndarray) -> None:
    with write_aside(path) as file:
        np.save(file, array)


def _parts(records: int) -> list[tuple[int, int]]:
    """Ranges [low, high] of 64-bit hashes with about `_RECORDS_A_JOIN` records each."""
    parts = max(1, -(-records // _RECORDS_A_JOIN))
    edges = [(1 << 64) * part // parts for part in range(parts + 1)]
    return [(low, high - 1) for low, high in pairwise(edges)]


def fingerprint_unit(content: Content, number: int, unit: Unit, folder: Path) -> tuple[int, dict[str, int]]:
    """Write what the joins need to know of a unit's documents, unless it is there: sorted hashes, signatures.

    Returns (number, the unit's ledger: how many documents it has, how many of them have text to compare).
    """
    if (done := read_json(_ledger(folder, number))) is not None:
        return number, done  # by an earlier run of this task, whose worker died at a later unit
    near = content.clean.near_duplicates
    places: list[int] = []
    digests: list[bytes] = []
    signatures: list[np.ndarray] = []
    total = 0
    for place, document in enumerate(documents(content, unit)):
        total += 1
        if isinstance(document.text, str):
            places.append(place)
            digests.append(blake2b(document.text.encode(), digest_size=16).digest())
            if near is not None:
                signatures.append(signature(document.text, near))
    hashes = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
    exact = np.empty(len(places), [("hash", "<u8"), ("rest", "<u8"), ("place", "<u4")])
    exact["hash"], exact["rest"], exact["place"] = hashes[:, 0], hashes[:, 1], places
    _save(_array(folder, number, "exact"), np.sort(exact, order=("hash", "rest", "place")))
    if near is not None:
        table = np.zeros((total, near.permutations), np.uint32)
        table[places] = np.array(signatures, np.uint32).reshape(len(places), near.permutations)
        _save(_array(folder, number, "signatures"), table)
        keys = band_keys(table[places], near)
        bands = np.empty(keys.size, [("hash", "<u8"), ("place", "<u4")])
        bands["hash"], bands["place"] = keys.ravel(), np.repeat(np.array(places, np.uint32), keys.shape[1])
        _save(_array(folder, number, "bands"), np.sort(bands, order=("hash", "place")))
    ledger = {"documents": total, "kept": len(places)}
    write_json(_ledger(folder, number), ledger)
    return number, ledger


def signature(text: str, near: NearDuplicates) -> np.ndarray:
    """(permutations,) uint32: the MinHash of the text's word n-grams; of a shorter text, of the whole."""
    from datasketch import MinHash

    minhash = MinHash(near.permutations, permutations=_permutations(near.permutations), **_MINHASH)
    for grams in _word_ngrams(text, near.ngram):
        minhash.update_batch(grams)
    return np.asarray(minhash.hashvalues, np.uint32)


@lru_cache(maxsize=1)
def _permutations(number: int) -> Any:
    from datasketch import MinHash

    return MinHash(number, seed=_MINHASH_SEED, **_MINHASH).permutations


def _word_ngrams(text: str, n: int) -> Iterator[set[bytes]]:
    """The text's features, in portions of bounded size."""
    words: list[str] = []
    start, portions = 0, 0
    while start < len(text):
        space = _WHITE_SPACE.search(text, start + _PORTION_CHARACTERS)
        stop = space.start() if space else len(text)
        # The last words of the portion before begin n-grams that reach into this one.
        words = words[max(len(words) - n + 1, 0) :] + text[start:stop].split()
        start = stop
        if len(words) >= n:
            portions += 1
            yield {" ".join(words[i : i + n]).encode() for i in range(len(words) - n + 1)}
    if not portions:
        yield {" ".join(words).encode()}


def _hash32(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=4).digest(), "little")


# Named, since a signature decides what a dataset holds: the library's defaults may change.
_MINHASH: dict[str, Any] = {"scheme": "affine32", "hashfunc": _hash32, "gpu_mode": "disable"}


def _bands(near: NearDuplicates) -> list[slice]:
    """The columns of a signature that make up each band, as datasketch chooses them for the threshold."""
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=near.threshold, num_perm=near.permutations)
    return [slice(band * index.r, (band + 1) * index.r) for band in range(index.b)]


def band_keys(signatures: np.ndarray, near: NearDuplicates) -> np.ndarray:
    """(n, bands) uint64: equal in a band where all its hash values are equal."""
    bands = _bands(near)
    keys = np.empty((len(signatures), len(bands)), np.uint64)
    for number, columns in enumerate(bands):
        key = np.full(len(signatures), number + 1, np.uint64)
        for column in signatures[:, columns].T:
            key = (key ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
        keys[:, number] = key * np.uint64(0xBF58476D1CE4E5B9)
    return keys


def merge_exact(folder: Path, first: int, last: int) -> np.ndarray:
    """Merge what the units [first, last) left into one sorted run; the ordinals of documents that repeat one in it.

    Those are not in the run, so that the copies of one document never meet in one join by the million.
    """
    records = _merged(folder, "exact", first, last)
    records = records[np.lexsort((records["ordinal"], records["rest"], records["hash"]))]
    again = _repeats(records)
    _save(_run_of_units(folder, "exact", first), records[~again])
    return np.sort(records["ordinal"][again])


def merge_bands(folder: Path, exact: Path, first: int, last: int) -> None:
    """Merge what the units [first, last) left into one sorted run, without the documents marked as exact duplicates."""
    records = _merged(folder, "bands", first, last)
    records = records[np.memmap(exact, np.uint8, "r")[records["ordinal"]] == 0]
    _save(_run_of_units(folder, "bands", first), records[np.argsort(records["hash"], kind="stable")])


def _merged(folder: Path, name: str, first: int, last: int) -> np.ndarray:
    """The records of the units [first, last), in which documents are known by their ordinals."""
    starts = np.load(folder / _STARTS)
    tables = [np.load(_array(folder, unit, name)) for unit in range(first, last)]
    fields = [(field, "<u8") for field in tables[0].dtype.names if field != "place"]
    merged = np.empty(sum(map(len, tables)), [*fields, ("ordinal", "<i8")])
    stop = 0
    for unit, table in enumerate(tables, first):
        part, stop = slice(stop, stop + len(table)), stop + len(table)
        for field, _ in fields:
            merged[field][part] = table[field]
        merged["ordinal"][part] = table["place"] + starts[unit]
    return merged


def _repeats(records: np.ndarray) -> np.ndarray:
    """(n,) bool: which of sorted records have the text of the one before."""
    again = np.zeros(len(records), np.bool_)
    again[1:] = (records["hash"][1:] == records["hash"][:-1]) & (records["rest"][1:] == records["rest"][:-1])
    return again


def _records(folder: Path, runs: Sequence[int], name: str, low: int, high: int) -> np.ndarray:
    """All records with low <= hash <= high."""
    found = []
    for first in runs:
        table = np.load(_run_of_units(folder, name, first), mmap_mode="r")
        start = int(np.searchsorted(table["hash"], np.uint64(low), "left"))
        stop = int(np.searchsorted(table["hash"], np.uint64(high), "right"))
        found.append(np.array(table[start:stop]))
    return np.concatenate(found)


def join_exact(folder: Path, runs: Sequence[int], low: int, high: int) -> np.ndarray:
    """The ordinals of documents whose text an earlier one has, among hashes in [low, high]."""
    records = _records(folder, runs, "exact", low, high)
    records = records[np.lexsort((records["ordinal"], records["rest"], records["hash"]))]
    return np.sort(records["ordinal"][_repeats(records)])


def join_near(folder: Path, runs: Sequence[int], near: NearDuplicates, low: int, high: int) -> np.ndarray:
    """The ordinals of documents that share a band in [low, high] with an earlier one and resemble it."""
    starts = np.load(folder / _STARTS)
    records = _records(folder, runs, "bands", low, high)
    records = records[np.lexsort((records["ordinal"], records["hash"]))]
    hashes = records["hash"]
    edges = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1], [True]]))
    # Of the many buckets, those that hold more than one document.
    several = np.flatnonzero(np.diff(edges) > 1)
    alike: list[int] = []
    for first, last in zip(edges[several].tolist(), edges[several + 1].tolist(), strict=True):
        alike += _resembling(folder, starts, near, records["ordinal"][first:last].tolist())
    return np.unique(np.array(alike, np.int64))


def _resembling(folder: Path, starts: np.ndarray, near: NearDuplicates, bucket: Sequence[int]) -> Iterator[int]:
    """The documents of a bucket that resemble an earlier one of it by the estimated Jaccard similarity."""
    representatives: list[np.ndarray] = []
    for ordinal in bucket:
        unit = int(np.searchsorted(starts, ordinal, "right")) - 1
        row = np.array(_signatures(folder, unit)[ordinal - int(starts[unit])])
        if any(np.count_nonzero(row == other) >= near.threshold * len(row) for other in representatives):
            yield ordinal
        elif len(representatives) < _REPRESENTATIVES:
            representatives.append(row)


@lru_cache(maxsize=256)
def _signatures(folder: Path, unit: int) -> np.ndarray:
    table: np.ndarray = np.load(_array(folder, unit, "signatures"), mmap_mode="r")
    return table
