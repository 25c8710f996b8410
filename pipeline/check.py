"""What the sources show before the work: files, fields and first row for the user to see, and what to refuse."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from pipeline.config import Content, DatasetsSource, TextSource
from pipeline.encode import choose_split, split_names
from pipeline.errors import UserError
from pipeline.locations import Piece, Skipped, SourceFile, open_file, open_filesystem, read_errors
from pipeline.sources import Survey, document_id, has_rows, list_files, read_piece, reader

_SHOWN = 200
_FIRST_PIECE_BYTES = 1 << 20


def describe_sources(content: Content) -> Iterator[str]:
    """Lines that say what each source holds; reads the beginning of its first file only.

    Raises:
        UserError: as preparing would: a path that holds nothing, a file that cannot be read, a field that is not there.
    """
    files = list_files(content)
    for number, source in enumerate(content.sources):
        mine = [(file, _size(content, file)) for file in files if file.source == number]
        yield f"{source.name} ({source.type}): {len(mine)} files, {sum(size or 0 for _, size in mine) / 1e6:,.1f} MB"
        for file, size in mine[:5]:
            yield f"  {file.name}  " + ("left out (unreadable_file)" if size is None else f"{size:,} bytes")
        if len(mine) > 5:
            yield f"  and {len(mine) - 5} more"
        try:
            yield from _first_rows(content, number, [(file, size) for file, size in mine if size is not None])
        except read_errors() as error:
            raise UserError(f"{mine[0][0].url}: cannot be read: {error}") from None


def refuse_empty_splits(content: Content, files: Sequence[SourceFile]) -> None:
    """Where documents are files, they are known before anything is read: hours of work need not end in this error."""
    if all(isinstance(source, TextSource) for source in content.sources):
        names = [source.name for source in content.sources]
        found = {choose_split(document_id(names[file.source], file.name), content) for file in files}
        for split in split_names(content):
            if split not in found:
                raise UserError(no_document_in(split, len(files)))


def no_document_in(split: str, documents: int) -> str:
    """What to say of a split into which none of so many documents falls."""
    return (
        f"content.splits: none of the {documents} documents falls into {split!r} (a text file is one document): add "
        "documents, choose other fractions (content.splits={} holds nothing out), or change content.seed"
    )


def refuse_missing_mounts(surveys: Sequence[Survey]) -> None:
    """Refuse to skip what this machine can open: a node without the mount would leave its share of the corpus out."""
    for url in (found.file.url for found in surveys if found.sha256 is None):
        with suppress(*read_errors()):
            open_file(url, compression=None).close()
            raise UserError(
                f"{url}: can be read here, but not on another machine of the cluster: sources must lie where all its "
                "machines see them. Mount them there, or leave that machine out with execution.task.resources."
            )


def _first_rows(content: Content, number: int, files: list[tuple[SourceFile, int]]) -> Iterator[str]:
    source = content.sources[number]
    for file, size in files:
        if isinstance(source, TextSource):
            with open_file(file.url) as stream:
                yield f"  first document: {_shown(stream.read(4 * _SHOWN))}"
            return
        if has_rows(source, file.url):
            if not isinstance(source, DatasetsSource):
                yield f"  columns: {_columns(file)}"
            pieces = reader(source).pieces(file, size, _FIRST_PIECE_BYTES)
        else:
            # Without an end: how long a packed file is, only reading all of it would tell.
            pieces = iter([Piece(**asdict(file), start=0, stop=sys.maxsize, n_bytes=size)])
        for item in (item for piece in pieces for item in read_piece(content, piece)):
            if isinstance(item, Skipped):
                yield f"  first row: left out ({item.reason})"
                return
            if not has_rows(source, file.url):
                yield from _fields(file)
            yield f"  first row: {item.id}: {_shown(item.data)}"
            return


def _fields(file: SourceFile) -> Iterator[str]:
    """Of the first line that is not blank, if it is text."""
    with open_file(file.url) as stream, suppress(UnicodeDecodeError):
        row = json.loads(next(line for line in stream if line.strip()).decode("utf-8-sig"))
        yield "  fields: " + ", ".join(f"{name}: {type(value).__name__}" for name, value in row.items())


def _columns(file: SourceFile) -> str:
    from pyarrow import parquet

    with open_file(file.url, compression=None) as stream:
        schema = parquet.read_schema(stream)
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _size(content: Content, file: SourceFile) -> int | None:
    """In bytes; 0 where it is not known; None: it cannot be read, and preparing would leave it out."""
    filesystem, path = open_filesystem(file.url, f"content.sources.{file.source}")
    try:
        size: Any = filesystem.size(path)
    except read_errors() as error:
        if content.clean.on_unreadable_file == "error":
            raise UserError(f"{file.url}: cannot be read: {error}") from None
        return None
    return int(size or 0)


def _shown(data: bytes) -> str:
    text = data.decode("utf-8", "replace")
    return repr(text[:_SHOWN]) + (" …" if len(text) > _SHOWN else "")
