"""A look at the sources before anything is made: files, fields, first row."""

import json
from collections.abc import Iterator
from typing import Any

from pipeline.config import Content, DatasetsSource, TextSource
from pipeline.errors import UserError
from pipeline.locations import Document, SourceFile, open_file, open_filesystem, read_errors
from pipeline.sources import has_rows, list_files, reader

_SHOWN = 200
_FIRST_PIECE_BYTES = 1 << 20


def describe_sources(content: Content) -> Iterator[str]:
    """Lines that say what each source holds; reads the beginning of its first file only.

    Raises:
        UserError: as preparing would: a path that holds nothing, a file that cannot be read, a field that is not there.
    """
    files = list_files(content)
    for number, source in enumerate(content.sources):
        mine = [(file, _size(file)) for file in files if file.source == number]
        yield f"{source.name} ({source.type}): {len(mine)} files, {sum(size for _, size in mine) / 1e6:,.1f} MB"
        for file, size in mine[:5]:
            yield f"  {file.name}  {size:,} bytes"
        if len(mine) > 5:
            yield f"  and {len(mine) - 5} more"
        try:
            yield from _first_rows(content, number, mine)
        except read_errors() as error:
            raise UserError(f"{mine[0][0].url}: cannot be read: {error}") from None


def _first_rows(content: Content, number: int, files: list[tuple[SourceFile, int]]) -> Iterator[str]:
    source = content.sources[number]
    found = reader(source)
    for file, size in files:
        if isinstance(source, TextSource):
            with open_file(file.url) as stream:
                yield f"  first document: {_shown(stream.read(4 * _SHOWN))}"
            return
        if not has_rows(source, file.url):
            with open_file(file.url) as stream:
                line = stream.readline()
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file.url}: line at byte 0: not JSON: {error}") from None
            if isinstance(row, dict):
                yield "  fields: " + ", ".join(f"{name}: {type(value).__name__}" for name, value in row.items())
                if source.text_field not in row:
                    raise UserError(
                        f"{file.url}: no field {source.text_field!r} (text_field); it has: {', '.join(row)}"
                    )
                yield f"  first row: {_shown(json.dumps(row, ensure_ascii=False).encode('utf-8', 'replace'))}"
            return
        if not isinstance(source, DatasetsSource):
            yield f"  columns: {_columns(file)}"
        for piece in found.pieces(file, size, _FIRST_PIECE_BYTES):
            for item in found.read(piece):
                if isinstance(item, Document):
                    yield f"  first row: {item.id}: {_shown(item.data)}"
                else:
                    yield f"  first row: {item}"
                return


def _columns(file: SourceFile) -> str:
    from pyarrow import parquet

    with open_file(file.url, compression=None) as stream:
        schema = parquet.read_schema(stream)
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _size(file: SourceFile) -> int:
    filesystem, path = open_filesystem(file.url, f"content.sources.{file.source}")
    size: Any = filesystem.size(path)
    return int(size or 0)


def _shown(data: bytes) -> str:
    text = data.decode("utf-8", "replace")
    return repr(text[:_SHOWN]) + (" …" if len(text) > _SHOWN else "")
