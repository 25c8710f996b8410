"""Token shards on disk: Megatron's indexed-dataset format, the manifest that makes shards count, and their reader.

A shard is a pair of files. `.bin` holds the token ids of its documents, one after the other. `.idx` holds, little
endian: magic (9 bytes), version (uint64), dtype code (uint8), number of sequences n (uint64), number of document
boundaries (uint64, n + 1), then the n lengths in tokens (int32), the n offsets into `.bin` in bytes (int64) and the
n + 1 document boundaries in sequences (int64). Here a document is one sequence, so that the boundaries are 0 … n.
"""

import errno
import hashlib
import json
import resource
import struct
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.atomic import hash_file, write_aside
from pipeline.errors import UserError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
TRAIN = "train"
FORMAT = "flash-pretrain/token-shards"
VERSION = 1

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES: dict[np.dtype[Any], int] = {np.dtype("<i4"): 4, np.dtype("<u2"): 8}
_MEGATRON_DTYPES = dict(enumerate(map(np.dtype, ("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2")), 1))
_UINT16_LIMIT = 65500  # Megatron's own limit
_BLOCK_TOKENS = 1 << 22


@dataclass(frozen=True)
class ShardRecord:
    """A shard in the manifest; `bytes` is the size of its `.bin`."""

    name: str
    documents: int
    tokens: int
    bytes: int
    sha256_bin: str
    sha256_idx: str


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where the vocabulary allows it, else int32."""
    return np.dtype("<u2") if vocab_size < _UINT16_LIMIT else np.dtype("<i4")


class ShardWriter:
    """Writes `stem`.bin and `stem`.idx aside; both appear when the `with` block ends without an error."""

    def __init__(self, stem: Path, vocab_size: int) -> None:
        self._stem = stem
        self._dtype = token_dtype(vocab_size)
        self._lengths: list[np.ndarray] = []
        self._sha256 = hashlib.sha256()
        self._record: ShardRecord | None = None

    def __enter__(self) -> "ShardWriter":
        self._files = ExitStack()
        self._bin = self._files.enter_context(write_aside(bin_path(self._stem)))
        return self

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append whole documents: their tokens end to end, and the length of each."""
        self._lengths.append(np.asarray(lengths, "<i4"))
        for start in range(0, len(tokens), _BLOCK_TOKENS):
            block = np.ascontiguousarray(tokens[start : start + _BLOCK_TOKENS], self._dtype).data
            self._bin.write(block)
            self._sha256.update(block)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self._files.close()
            lengths = np.concatenate([np.zeros(0, "<i4"), *self._lengths])
            self._record = write_index(self._stem, lengths, self._dtype, self._sha256.hexdigest())
        else:
            self._files.__exit__(kind, error, trace)

    @property
    def record(self) -> ShardRecord:
        """What was written; after the `with` block."""
        assert self._record is not None, "the shard is not complete"
        return self._record


def write_index(stem: Path, lengths: np.ndarray, dtype: np.dtype[Any], sha256_bin: str) -> ShardRecord:
    """Write `stem`.idx for a `stem`.bin that holds documents of these lengths, end to end; returns its record."""
    lengths = np.asarray(lengths, "<i4")
    ends = np.cumsum(lengths, dtype="<i8") * dtype.itemsize
    header = _HEADER.pack(_MAGIC, 1, _DTYPE_CODES[dtype], len(lengths), len(lengths) + 1)
    offsets = ends - lengths * np.int64(dtype.itemsize)
    boundaries = np.arange(len(lengths) + 1, dtype="<i8")
    index = b"".join([header, lengths.tobytes(), offsets.tobytes(), boundaries.tobytes()])
    with write_aside(idx_path(stem)) as file:
        file.write(index)
    n_bytes = int(ends[-1]) if len(ends) else 0
    return ShardRecord(
        name=stem.name,
        documents=len(lengths),
        tokens=n_bytes // dtype.itemsize,
        bytes=n_bytes,
        sha256_bin=sha256_bin,
        sha256_idx=hashlib.sha256(index).hexdigest(),
    )


def bin_path(stem: Path) -> Path:
    """The tokens' file of a shard."""
    return stem.with_name(f"{stem.name}.bin")


def idx_path(stem: Path) -> Path:
    """The index file of a shard."""
    return stem.with_name(f"{stem.name}.idx")


class Index(NamedTuple):
    """A memory-mapped `.idx` file, as Megatron may write it; unaligned arrays.

    Attributes:
        dtype: of the tokens.
        lengths: (sequences,) int32, in tokens.
        offsets: (sequences,) int64, where each starts in the `.bin` file, in bytes.
        boundaries: (documents + 1,) int64, where each document starts, in sequences.
    """

    dtype: np.dtype[Any]
    lengths: np.ndarray
    offsets: np.ndarray
    boundaries: np.ndarray


def read_index(stem: Path) -> Index:
    """Map `stem`.idx.

    Raises:
        UserError: it is not an index of version 1, or of another size than its header says.
    """
    file = idx_path(stem)
    if file.stat().st_size < _HEADER.size:
        raise UserError(f"{file}: shorter than an index header")
    index = np.memmap(file, mode="r").view(np.ndarray)  # whose slices are cheaper
    magic, version, code, sequences, boundaries = _HEADER.unpack(index[: _HEADER.size].tobytes())
    if magic != _MAGIC or version != 1 or code not in _MEGATRON_DTYPES:
        raise UserError(f"{file}: not an index of Megatron's version 1")
    if len(index) != _HEADER.size + 12 * sequences + 8 * boundaries:
        raise UserError(f"{file}: its size does not fit {sequences} sequences in {boundaries - 1} documents")
    start = _HEADER.size
    return Index(
        dtype=_MEGATRON_DTYPES[code],
        lengths=np.frombuffer(index, "<i4", sequences, start),
        offsets=np.frombuffer(index, "<i8", sequences, start + 4 * sequences),
        boundaries=np.frombuffer(index, "<i8", boundaries, start + 12 * sequences),
    )


def map_tokens(stem: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """Map `stem`.bin: its tokens, end to end."""
    if not bin_path(stem).stat().st_size:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(bin_path(stem), dtype, "r").view(np.ndarray)


class Shard:
    """One shard, memory-mapped.

    Attributes:
        lengths: (documents,) int32, in tokens, the closing `</s>` included.
        offsets: (documents,) int64, where each document starts in `tokens`, in bytes (unaligned: slice it).
        tokens: (tokens,) uint16 or int32.

    Raises:
        UserError: the index is not one that this format has.
    """

    def __init__(self, stem: Path) -> None:
        index = read_index(stem)
        if index.dtype not in _DTYPE_CODES:
            raise UserError(f"{idx_path(stem)}: its tokens are {index.dtype}, not uint16 or int32")
        if len(index.boundaries) != len(index.lengths) + 1:
            raise UserError(f"{idx_path(stem)}: not one sequence a document; `python -m pipeline.adopt` joins them")
        self.lengths, self.offsets, self.boundaries = index.lengths, index.offsets, index.boundaries
        # Plain integers from unaligned memory: np.searchsorted would copy the whole array, and its items are slow.
        self._starts = memoryview(index.offsets.view(np.uint8).data).cast("q")
        self.tokens = map_tokens(stem, index.dtype)

    def document_at(self, token: int) -> int:
        """The number, in this shard, of the document that holds a token position."""
        return bisect_right(self._starts, token * self.tokens.itemsize) - 1


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a dataset directory; it has all that `TokenDataset` and `dataset_digest` need.

    Raises:
        UserError: there is none, it is damaged, or of another format or a newer version.
    """
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: not a dataset: it has no {MANIFEST} (preparing writes it last; "
            "`python -m pipeline.prepare CONFIG` makes or finishes one)"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}: damaged: not JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{file}: not a manifest of {FORMAT}")
    if (version := manifest.get("version")) != VERSION:
        raise UserError(f"{file}: version {version}; this release reads version {VERSION}: upgrade it")
    try:
        missing = sorted({"content", "sources", "digest"} - manifest.keys())
        for split in manifest["splits"]:
            TokenDataset(Path(path), split, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        missing = [f"{type(error).__name__} {error}"]
    if missing:
        raise UserError(f"{file}: damaged: {', '.join(missing)}; take it from a copy, or prepare the dataset again")
    return manifest


def dataset_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 (hex) over content, sources, tokenizer and shards: no clock, host, path or execution enters it."""
    covered = {
        "format": manifest["format"],
        "version": manifest["version"],
        "content": manifest["content"],
        "sources": manifest["sources"],
        "tokenizer": manifest["tokenizer"]["sha256"],
        "shards": {
            split: [(shard["name"], shard["sha256_bin"], shard["sha256_idx"]) for shard in entry["shards"]]
            for split, entry in manifest["splits"].items()
        },
    }
    return hashlib.sha256(json.dumps(covered, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class _SplitPart:
    """Where a shard lies in the split: its first token and document."""

    record: ShardRecord
    first_token: int
    first_document: int


class TokenDataset:
    """One split of a dataset, memory-mapped: a stream of tokens in which every document ends with `</s>`."""

    def __init__(self, path: Path, split: str, manifest: dict[str, Any]) -> None:
        entry, tokenizer = manifest["splits"][split], manifest["tokenizer"]
        self.path, self.split = path, split
        self.digest: str = manifest["digest"]
        self.vocab_size: int = tokenizer["vocab_size"]
        self.unk_id: int = tokenizer["unk_id"]
        self.eos_id: int = tokenizer["eos_id"]
        self.pad_id: int = tokenizer["pad_id"]
        self.mask_id: int = tokenizer["mask_id"]
        self.n_tokens: int = entry["tokens"]
        self.n_documents: int = entry["documents"]
        self.n_utf8_bytes: int = entry["utf8_bytes"]
        self.tokenizer_path = path / tokenizer["file"]
        self.tokenizer_sha256: str = tokenizer["sha256"]
        self._parts: list[_SplitPart] = []
        token = document = 0
        for record in (ShardRecord(**shard) for shard in entry["shards"]):
            self._parts.append(_SplitPart(record, token, document))
            token, document = token + record.tokens, document + record.documents
        self._first_tokens = [part.first_token for part in self._parts]
        self._shards: dict[int, Shard] = {}

    @classmethod
    def open(cls, path: str | Path, split: str) -> "TokenDataset":
        """Open a split after cheap checks: the manifest and its tokenizer are there, and every file has its size.

        Raises:
            UserError: not a dataset, no such split, another tokenizer, or a file that is missing or of another size.
        """
        path = Path(path).absolute()
        manifest = read_manifest(path)
        if split not in manifest["splits"]:
            raise UserError(f"{path}: no split {split!r}; it has: {', '.join(manifest['splits'])}")
        dataset = cls(path, split, manifest)
        try:
            problems = list(dataset._file_problems())
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
        for problem in problems:
            raise UserError(f"{problem}; `python -m pipeline.verify {path}` checks the whole dataset")
        _allow_open_files(2 * len(dataset._parts))
        return dataset

    def _file_problems(self) -> Iterator[str]:
        if not self.tokenizer_path.is_file():
            yield f"{self.tokenizer_path}: missing"
        elif (found := hash_file(self.tokenizer_path)) != self.tokenizer_sha256:
            yield f"{self.tokenizer_path}: another tokenizer: its SHA-256 is {found} instead of {self.tokenizer_sha256}"
        for part in self._parts:
            stem = self.path / self.split / part.record.name
            index_size = _HEADER.size + 20 * part.record.documents + 8
            for file, size in ((bin_path(stem), part.record.bytes), (idx_path(stem), index_size)):
                n_bytes = file.stat().st_size if file.is_file() else None
                if n_bytes != size:
                    yield f"{file}: {'missing' if n_bytes is None else f'{n_bytes} bytes instead of {size}'}"

    def _shard(self, number: int) -> Shard:
        if number not in self._shards:
            stem = self.path / self.split / self._parts[number].record.name
            try:
                self._shards[number] = Shard(stem)
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
                raise UserError(
                    f"{stem}: too many open files: {len(self._parts)} shards need two each, the "
                    f"system allows {limit}; raise it (`ulimit -Hn`) or prepare larger shards (content.shard_tokens)"
                ) from None
        return self._shards[number]

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, start, stop) of the parts of [start, stop), counted in each shard."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"[{start}, {stop}) is not in the {self.n_tokens} tokens of {self.split}")
        number = bisect_right(self._first_tokens, start) - 1
        while start < stop:
            part = self._parts[number]
            end = min(stop, part.first_token + part.record.tokens)
            yield number, start - part.first_token, end - part.first_token
            start, number = end, number + 1

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Tokens [start, stop) of the split: (stop - start,) int64, copied once, into `out` where it is given."""
        out = np.empty(stop - start, np.int64) if out is None else out
        filled = 0
        for number, low, high in self._ranges(start, stop):
            out[filled : filled + high - low] = self._shard(number).tokens[low:high]
            filled += high - low
        return out

    def document_numbers(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """The number, in the split, of the document that holds each token of [start, stop): (stop - start,) int64.

        It comes from the index alone, and goes into `out` where it is given.
        """
        out = np.empty(stop - start, np.int64) if out is None else out
        filled = 0
        for number, low, high in self._ranges(start, stop):
            shard = self._shard(number)
            first, last = shard.document_at(low), shard.document_at(high - 1)
            counts = shard.lengths[first : last + 1].astype(np.int64)
            counts[-1] = high - int(shard.offsets[last]) // shard.tokens.itemsize
            counts[0] -= low - int(shard.offsets[first]) // shard.tokens.itemsize
            numbers = np.arange(first, last + 1) + self._parts[number].first_document
            out[filled : filled + high - low] = np.repeat(numbers, counts)
            filled += high - low
        return out


def _allow_open_files(more: int) -> None:
    """Raise this process's limit of open files: Python keeps a file open for each that it has mapped."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
