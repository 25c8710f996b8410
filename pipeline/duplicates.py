"""Duplicates over a whole corpus, in bounded memory: fingerprints by unit, then a join cut by hash.

Of documents that are alike, the first one in the order in which documents are written stays. Each unit leaves sorted
fingerprints; a task of the join reads one range of hashes out of every unit's file. What a join finds, it finds for any
number of workers.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.atomic import write_aside, write_json
from pipeline.config import Content, NearDuplicates
from pipeline.encode import Unit, documents

_EXACT, _NEAR = 1, 2
_RECORDS_A_JOIN = 4_000_000  # 24 bytes each; a join holds a few copies of them
_REPRESENTATIVES = 16  # of a bucket, that later documents in it are compared with: boilerplate stays linear
_MINHASH_SEED = 1

RunTasks = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[Any]]


@dataclass(frozen=True)
class Flags:
    """One byte a document: 0 it stays, else a key of DUPLICATE_REASONS. `starts[unit]` is the unit's first document."""

    path: Path
    starts: tuple[int, ...]

    def of(self, unit: int) -> np.ndarray:
        """The flags of a unit's documents, in their order."""
        if self.starts[unit] == self.starts[unit + 1]:
            return np.zeros(0, np.uint8)
        size = self.starts[unit + 1] - self.starts[unit]
        return np.fromfile(self.path, np.uint8, size, offset=self.starts[unit])


def find_duplicates(content: Content, units: Sequence[Unit], workspace: Path, run: RunTasks) -> Flags | None:
    """The flags of all documents; None where nothing of the kind is asked for. Finished parts are not done again."""
    near = content.clean.near_duplicates
    if not (content.clean.exact_duplicates or near):
        return None
    folder = workspace / "duplicates"
    folder.mkdir(exist_ok=True)
    todo = [number for number in range(len(units)) if not _ledger(folder, number).exists()]
    for _ in run(fingerprint_unit, [(content, number, units[number], folder) for number in todo]):
        pass
    entries = [json.loads(_ledger(folder, number).read_bytes()) for number in range(len(units))]
    starts = (0, *np.cumsum([entry["documents"] for entry in entries]).tolist())
    flags = Flags(folder / "flags", starts)
    if flags.path.exists():
        return flags
    found = folder / "found"
    with write_aside(found) as file:  # a plain file that is mapped: as large as the corpus has documents
        file.truncate(max(starts[-1], 1))
    marks = np.memmap(found, np.uint8, "r+")
    kept = sum(entry["kept"] for entry in entries)
    for ordinals in run(join_exact, [(folder, starts, *part) for part in _parts(kept)]):
        marks[ordinals] = _EXACT
    marks.flush()
    if near is not None:
        bands = len(_bands(near))
        # The joins read exact marks alone, which are complete: near ones may come while others still run.
        for ordinals in run(
            join_near, [(folder, starts, near.threshold, found, *part) for part in _parts(kept * bands)]
        ):
            marks[ordinals] |= _NEAR
        marks.flush()
    del marks
    found.rename(flags.path)
    return flags


def _ledger(folder: Path, number: int) -> Path:
    return folder / f"{number:07d}.json"


def _array(folder: Path, number: int, name: str) -> Path:
    return folder / f"{number:07d}.{name}.npy"


def _save(path: Path, array: np.ndarray) -> None:
    with write_aside(path) as file:
        np.save(file, array)


def _parts(records: int) -> list[tuple[int, int]]:
    """Ranges [low, high] of 64-bit hashes with about `_RECORDS_A_JOIN` records each."""
    parts = max(1, -(-records // _RECORDS_A_JOIN))
    edges = [(1 << 64) * part // parts for part in range(parts + 1)]
    return [(low, high - 1) for low, high in pairwise(edges)]


def fingerprint_unit(content: Content, number: int, unit: Unit, folder: Path) -> int:
    """Write what the joins need to know of a unit's documents: its sorted hashes, its signatures."""
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
    write_json(_ledger(folder, number), {"documents": total, "kept": len(places)})
    return number


def signature(text: str, near: NearDuplicates) -> np.ndarray:
    """(permutations,) uint32: the MinHash of the text's word n-grams; of a shorter text, of the whole."""
    from datasketch import MinHash

    words = text.split()
    grams = {" ".join(words[i : i + near.ngram]) for i in range(max(1, len(words) - near.ngram + 1))}
    minhash = MinHash(num_perm=near.permutations, seed=_MINHASH_SEED, hashfunc=_hash32)
    minhash.update_batch([gram.encode() for gram in grams])
    return np.asarray(minhash.hashvalues, np.uint32)


def _hash32(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=4).digest(), "little")


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


def _slices(folder: Path, starts: Sequence[int], name: str, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """All units' records with low <= hash <= high, and the documents' ordinals."""
    records, ordinals = [], []
    for unit, start in enumerate(starts[:-1]):
        table = np.load(_array(folder, unit, name), mmap_mode="r")
        hashes = table["hash"]
        first = int(np.searchsorted(hashes, np.uint64(low), "left"))
        last = int(np.searchsorted(hashes, np.uint64(high), "right"))
        if last > first:
            records.append(np.array(table[first:last]))
            ordinals.append(start + records[-1]["place"].astype(np.int64))
    if not records:
        return np.zeros(0, [("hash", "<u8"), ("rest", "<u8")]), np.zeros(0, np.int64)
    return np.concatenate(records), np.concatenate(ordinals)


def join_exact(folder: Path, starts: Sequence[int], low: int, high: int) -> np.ndarray:
    """The ordinals of documents whose text an earlier one has, among hashes in [low, high]."""
    records, ordinals = _slices(folder, starts, "exact", low, high)
    order = np.lexsort((ordinals, records["rest"], records["hash"]))
    records, ordinals = records[order], ordinals[order]
    again = (records["hash"][1:] == records["hash"][:-1]) & (records["rest"][1:] == records["rest"][:-1])
    return np.sort(ordinals[1:][again])


def join_near(folder: Path, starts: Sequence[int], threshold: float, exact: Path, low: int, high: int) -> np.ndarray:
    """The ordinals of documents that share a band in [low, high] with an earlier one and resemble it."""
    marks = np.memmap(exact, np.uint8, "r")
    records, ordinals = _slices(folder, starts, "bands", low, high)
    stays = marks[ordinals] & _EXACT == 0
    hashes, ordinals = records["hash"][stays], ordinals[stays]
    order = np.lexsort((ordinals, hashes))
    hashes, ordinals = hashes[order], ordinals[order]
    edges = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1], [True]]))
    alike: list[int] = []
    for first, last in pairwise(edges.tolist()):
        if last - first > 1:
            alike += _resembling(folder, starts, threshold, ordinals[first:last])
    return np.unique(np.array(alike, np.int64))


def _resembling(folder: Path, starts: Sequence[int], threshold: float, bucket: np.ndarray) -> Iterator[int]:
    """The documents of a bucket that resemble an earlier one of it by the estimated Jaccard similarity."""
    representatives: list[np.ndarray] = []
    for ordinal in bucket.tolist():
        unit = int(np.searchsorted(starts, ordinal, "right")) - 1
        row = np.array(_signatures(folder, unit)[ordinal - starts[unit]])
        if any(np.mean(row == other) >= threshold for other in representatives):
            yield ordinal
        elif len(representatives) < _REPRESENTATIVES:
            representatives.append(row)


@lru_cache(maxsize=256)
def _signatures(folder: Path, unit: int) -> np.ndarray:
    table: np.ndarray = np.load(_array(folder, unit, "signatures"), mmap_mode="r")
    return table
