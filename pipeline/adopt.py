"""Make a dataset of shards that Megatron-LM wrote: check all of it, then write the manifest.

    python -m pipeline.adopt PREFIX... --output DIR --tokenizer MODEL [--eos-id N] [--split train] [--append-eos]

PREFIX is a path without .bin or .idx. A `.bin` file that is right as it is becomes a hard link, or a copy where the
output lies on another file system; the original's name may then go, its content must not change. A new file is written
where tokens have another type than uint16 or int32 by the vocabulary, sequences of a document lie apart, or end tokens
are added. Several sequences of a document are joined; empty documents are dropped and counted. UTF-8 bytes are counted
by piece, which is exact but for unknown pieces and a space that the tokenizer may put in front of a document.
"""

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.atomic import hash_file, sync_directory, write_aside, write_json
from pipeline.card import write_card
from pipeline.config import is_split_name
from pipeline.errors import UserError, run_command
from pipeline.manifest import new_manifest
from pipeline.output_directory import locked
from pipeline.shards import (
    MANIFEST,
    TOKENIZER,
    ShardRecord,
    ShardWriter,
    bin_path,
    idx_path,
    map_tokens,
    read_index,
    token_dtype,
    write_index,
)
from pipeline.tokenizer import Tokenizer

_BLOCK_TOKENS = 1 << 22


class _Foreign:
    """A pair of files of Megatron's, whose documents may have several sequences, in any order.

    Attributes:
        lengths: (documents,) int64, in tokens.
        in_order: whether the `.bin` file holds the documents' tokens end to end and nothing else.
    """

    def __init__(self, stem: Path) -> None:
        for file in (idx_path(stem), bin_path(stem)):
            if not file.is_file():
                raise UserError(f"{file}: no such file; a PREFIX is the path of a pair of files without .bin and .idx")
        self.stem, self.name = stem, bin_path(stem)
        index = read_index(stem)
        self.dtype = index.dtype
        if self.dtype.kind == "f":
            raise UserError(f"{idx_path(stem)}: {self.dtype} values: not tokens")
        size, boundaries = self.dtype.itemsize, index.boundaries
        if not len(boundaries) or boundaries[0] != 0 or (np.diff(boundaries) < 0).any():
            raise UserError(f"{idx_path(stem)}: damaged: its documents do not start one after the other")
        if boundaries[-1] != len(index.lengths):
            raise UserError(
                f"{idx_path(stem)}: {len(index.lengths) - boundaries[-1]} sequences belong to no document: "
                "IndexedDatasetBuilder.end_document was not called after them"
            )
        n_bytes = self.name.stat().st_size
        stops = index.offsets + index.lengths * np.int64(size)
        if n_bytes % size or (index.lengths < 0).any() or (index.offsets < 0).any() or (index.offsets % size).any():
            raise UserError(f"{idx_path(stem)}: damaged: its sequences are not whole {self.dtype} tokens")
        if len(stops) and stops.max() > n_bytes:
            raise UserError(f"{self.name}: truncated: {n_bytes:,} bytes, its index needs {int(stops.max()):,}")
        ends = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])
        self._boundaries, self._starts, self._sizes = boundaries, index.offsets // size, index.lengths
        self._ends = ends[boundaries]
        self.lengths = np.diff(self._ends)
        self.in_order = bool((self._starts == ends[:-1]).all()) and n_bytes == int(ends[-1]) * size
        self._tokens = map_tokens(stem, self.dtype)

    def blocks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(number of the first document, the tokens of some documents end to end, their lengths), empty ones too."""
        first = 0
        while first < len(self.lengths):
            last = int(np.searchsorted(self._ends, self._ends[first] + _BLOCK_TOKENS, "right")) - 1
            last = max(last, first + 1)
            yield first, self._read(first, last), self.lengths[first:last]
            first = last

    def _read(self, first: int, last: int) -> np.ndarray:
        if self.in_order:
            return self._tokens[self._ends[first] : self._ends[last]]
        sequences = range(self._boundaries[first], self._boundaries[last])
        parts = [self._tokens[self._starts[i] : self._starts[i] + self._sizes[i]] for i in sequences]
        return np.concatenate([np.zeros(0, self.dtype), *parts])


@dataclass(frozen=True)
class _Checked:
    """What a pair of files was found to hold; `open_documents` lack their end token."""

    documents: int
    open_documents: int
    empty_documents: int
    utf8_bytes: int


class _Adoption:
    def __init__(self, tokenizer: Tokenizer, eos_id: int, *, append_eos: bool) -> None:
        self.vocab_size, self.eos_id, self.append_eos = tokenizer.vocab_size, eos_id, append_eos
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._utf8_lengths = tokenizer.utf8_lengths()

    def check(self, files: _Foreign) -> _Checked:
        """Read every token. Raises `UserError` that names the first document that is wrong."""
        open_documents = utf8_bytes = 0
        for first, tokens, lengths in files.blocks():
            ends = np.cumsum(lengths)
            outside = (tokens < 0) | (tokens >= self.vocab_size)
            if outside.any():
                at = int(np.argmax(outside))
                raise UserError(
                    f"{self._place(files, first, ends, at)} is {tokens[at]}, outside the tokenizer's vocabulary of "
                    f"{self.vocab_size:,}: give the tokenizer that the shards were made with"
                )
            inside = tokens == self.eos_id
            last = ends[lengths > 0] - 1
            closed = inside[last]
            inside[last] = False
            if inside.any():
                at = int(np.argmax(inside))
                raise UserError(
                    f"{self._place(files, first, ends, at)} is the end token {self.eos_id}, before the document's end: "
                    "a document holds it once, at its end (is it the right --eos-id?)"
                )
            if not closed.all() and not self.append_eos:
                at = int(last[np.argmin(closed)])
                raise UserError(
                    f"{self._place(files, first, ends, at)}, its last, is {tokens[at]}, not the end token "
                    f"{self.eos_id}: give --append-eos to add it where it is missing, or the right --eos-id"
                )
            open_documents += int(np.count_nonzero(~closed))
            utf8_bytes += int(self._utf8_lengths[tokens].sum())
        longest = int(files.lengths.max(initial=0)) + 1
        if longest > np.iinfo(np.int32).max:
            raise UserError(f"{files.name}: a document of {longest:,} tokens: the format allows 2,147,483,647")
        empty = int(np.count_nonzero(files.lengths == 0))
        return _Checked(len(files.lengths) - empty, open_documents, empty, utf8_bytes)

    @staticmethod
    def _place(files: _Foreign, first: int, ends: np.ndarray, at: int) -> str:
        number = int(np.searchsorted(ends, at, "right"))
        start = int(ends[number - 1]) if number else 0
        return f"{files.name}: document {first + number}: token {at - start}"

    def write(self, files: _Foreign, found: _Checked, stem: Path) -> tuple[ShardRecord, str]:
        """Link, copy or rewrite a pair of files as the shard `stem`; returns its record and what was done."""
        if files.in_order and files.dtype == self.dtype and not found.open_documents:
            done = _link(files.name, bin_path(stem))
            lengths = files.lengths[files.lengths > 0]
            return write_index(stem, lengths, self.dtype, hash_file(bin_path(stem))), done
        with ShardWriter(stem, self.vocab_size) as writer:
            for _, tokens, all_lengths in files.blocks():
                lengths = all_lengths[all_lengths > 0]
                ends = np.cumsum(lengths)
                missing = tokens[ends - 1] != self.eos_id
                writer.append(np.insert(tokens, ends[missing], self.eos_id), lengths + missing)
        return writer.record, f"written again as {self.dtype.name}"


def adopt(
    prefixes: Sequence[Path],
    output: Path,
    tokenizer_path: Path,
    *,
    eos_id: int | None = None,
    split: str = "train",
    append_eos: bool = False,
) -> dict[str, Any]:
    """Make the dataset `output` of Megatron's shards and return its manifest; says on stdout what was done.

    Everything is checked before anything is written; the directory appears whole or not at all.

    Raises:
        UserError: a file is missing, damaged or of another tokenizer, a document is not closed, `output` is not empty.
    """
    if twice := next((prefix for number, prefix in enumerate(prefixes) if prefix in prefixes[:number]), None):
        raise UserError(f"{twice}: given twice: its documents would come twice")
    tokenizer = Tokenizer(tokenizer_path)
    eos_id = tokenizer.eos_id if eos_id is None else eos_id
    if not 0 <= eos_id < tokenizer.vocab_size:
        raise UserError(f"--eos-id: {eos_id} is no piece of {tokenizer_path}, which has {tokenizer.vocab_size:,}")
    if not is_split_name(split):
        raise UserError(f"--split: {split!r} cannot name a split: use letters, digits, - and _")
    adoption = _Adoption(tokenizer, eos_id, append_eos=append_eos)
    pairs = []
    for prefix in prefixes:
        files = _Foreign(prefix)
        found = adoption.check(files)
        if found.documents:
            pairs.append((files, found))
        else:
            print(f"{prefix}: left out: it holds no tokens")
    if not pairs:
        raise UserError(f"{prefixes[0]}: no document with tokens; nothing to adopt")
    with _new_directory(output) as folder:
        (folder / split).mkdir()
        records, sources = [], []
        for number, (files, found) in enumerate(pairs):
            record, done = adoption.write(files, found, folder / split / f"shard-{number:05d}")
            extra = f", {found.open_documents:,} end tokens added" if found.open_documents else ""
            extra += f", {found.empty_documents:,} empty documents dropped" if found.empty_documents else ""
            print(f"{files.stem}: {record.documents:,} documents, {record.tokens:,} tokens, {done}{extra}", flush=True)
            records.append(record)
            for path in (bin_path(files.stem), idx_path(files.stem)):
                sources.append(
                    {"source": "megatron", "name": path.name, "size": path.stat().st_size, "sha256": hash_file(path)}
                )
        with write_aside(folder / TOKENIZER) as file:
            file.write(tokenizer_path.read_bytes())
        empty = sum(found.empty_documents for _, found in pairs)
        entry = {
            "documents": sum(record.documents for record in records),
            "tokens": sum(record.tokens for record in records),
            "utf8_bytes": sum(found.utf8_bytes for _, found in pairs),
            "dropped": {"empty": empty} if empty else {},
            "shards": [asdict(record) for record in records],
        }
        manifest = new_manifest(
            content={"adopted": {"eos_id": eos_id, "append_eos": append_eos}, "tokenizer": {}},
            sources=sources,
            tokenizer=tokenizer,
            eos_id=eos_id,
            splits={split: entry},
            execution={"output": str(output.absolute())},
            seconds={},
        )
        sync_directory(folder / split)
        write_card(folder, manifest)
        write_json(folder / MANIFEST, manifest)
    print(f"done: {output}, split {split}, digest {manifest['digest']}")
    return manifest


@contextmanager
def _new_directory(output: Path) -> Iterator[Path]:
    """A directory that becomes `output` when all went well; what a killed adoption left in it is removed."""
    output = output.absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output: {output} is there already; give a new directory (each split may have its own)")
    aside = output.with_name(f".{output.name}.adopting")
    try:
        aside.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {output}: cannot be written: {error.strerror}") from None
    with locked(aside, f"--output: another adoption is writing {output}; wait for it to end"):
        try:
            for entry in aside.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            yield aside
            os.rename(aside, output)
            sync_directory(output.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def _link(source: Path, target: Path) -> str:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        with write_aside(target) as copy, open(source, "rb") as original:
            shutil.copyfileobj(original, copy, 1 << 20)
        return "copied (no hard link was possible)"
    return "linked"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.adopt",
        description="Make a dataset of shards that Megatron-LM wrote: check every token, then link or copy the files "
        "and write the manifest.",
    )
    parser.add_argument(
        "prefixes", metavar="PREFIX", type=Path, nargs="+", help="path of a pair of files without .bin and .idx"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the dataset; a new directory")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="MODEL", help="SentencePiece .model that made the shards"
    )
    parser.add_argument("--eos-id", type=int, metavar="N", help="closes each document; default: the tokenizer's </s>")
    parser.add_argument("--split", default="train", help="name of the split; default train")
    parser.add_argument("--append-eos", action="store_true", help="add the end token to documents without one")
    arguments = parser.parse_args()
    adopt(
        arguments.prefixes,
        arguments.output,
        arguments.tokenizer,
        eos_id=arguments.eos_id,
        split=arguments.split,
        append_eos=arguments.append_eos,
    )
    return 0


if __name__ == "__main__":
    run_command(main)
