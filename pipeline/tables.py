"""Documents in the rows of tables: parquet files, and directories of `datasets`."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from pipeline.config import DatasetsSource, HubSource, ParquetSource
from pipeline.errors import UserError
from pipeline.locations import Document, Piece, SourceFile, find_files, locate, open_file, open_filesystem

_ROWS_AT_ONCE = 256

_TableSource = ParquetSource | DatasetsSource | HubSource


class ParquetReader:
    """Pieces are ranges of rows inside row groups."""

    def __init__(self, config: ParquetSource | HubSource) -> None:
        self.config = config

    def files(self, source: int) -> list[SourceFile]:
        assert isinstance(self.config, ParquetSource)
        return find_files(source, self.config.name, self.config.path, self.config.pattern)

    def pieces(self, file: SourceFile, size: int, unit_bytes: int) -> Iterator[Piece]:
        with open_file(file.url, compression=None) as stream:
            table = _open_parquet(stream, file.url)
            _check_columns(table.schema_arrow, self.config, file.url)
            # Leaf columns, where nested ones count several times.
            leaves = [table.metadata.schema.column(i).path for i in range(table.metadata.num_columns)]
            column = leaves.index(self.config.text_field)
            first = 0
            for number in range(table.metadata.num_row_groups):
                group = table.metadata.row_group(number)
                n_bytes = group.column(column).total_uncompressed_size
                for start, stop, part in _cut_rows(group.num_rows, n_bytes, unit_bytes):
                    yield Piece(**asdict(file), start=first + start, stop=first + stop, n_bytes=part)
                first += group.num_rows

    def read(self, piece: Piece) -> Iterator[Document | UserError]:
        columns = [name for name in (self.config.text_field, self.config.id_field) if name is not None]
        with open_file(piece.url, compression=None) as stream:
            table = _open_parquet(stream, piece.url)
            first = 0
            for number in range(table.metadata.num_row_groups):
                rows = table.metadata.row_group(number).num_rows
                if first < piece.stop and first + rows > piece.start:
                    row = first
                    for batch in table.iter_batches(_ROWS_AT_ONCE, row_groups=[number], columns=columns):
                        begin, end = max(piece.start - row, 0), min(piece.stop - row, batch.num_rows)
                        if begin < end:
                            part = batch.slice(begin, end - begin)
                            yield from _rows(part, self.config, piece.name, piece.url, row + begin)
                        row += batch.num_rows
                        if row >= piece.stop:
                            break
                first += rows


class DatasetsReader:
    """Rows count over all the Arrow files of a split, so its pieces are listed with the file that ties those."""

    _STATE = "state.json"

    def __init__(self, config: DatasetsSource) -> None:
        self.config = config

    def files(self, source: int) -> list[SourceFile]:
        root = locate(self.config.path)
        parts = [root] if self.config.split is None else [root, self.config.split]
        folder = "/".join(parts)
        key = f"content.sources.{source}"
        filesystem, path = open_filesystem(folder, key)
        if not filesystem.isfile(f"{path}/{self._STATE}"):
            top, top_path = open_filesystem(root, key)
            if top.isfile(f"{top_path}/dataset_dict.json"):
                splits = ", ".join(json.loads(top.cat_file(f"{top_path}/dataset_dict.json"))["splits"])
                raise UserError(f"{key}.split: {self.config.split!r} is no split of {root}; it has: {splits}")
            advice = "set `split` to null" if self.config.split else "write one with save_to_disk"
            raise UserError(f"{key}.path: {folder} holds no dataset of `datasets` (no {self._STATE}); {advice}")
        prefix = f"{self.config.split}/" if self.config.split else ""
        return [
            SourceFile(source, prefix + PurePosixPath(found).name, filesystem.unstrip_protocol(found))
            for found in sorted(filesystem.ls(path, detail=False))
            if found.endswith((".arrow", ".json"))
        ]

    def pieces(self, file: SourceFile, size: int, unit_bytes: int) -> Iterator[Piece]:
        if PurePosixPath(file.name).name == self._STATE:
            folder = file.url.removesuffix(f"/{self._STATE}")
            table = self._load(folder)
            _check_columns(table.features.arrow_schema, self.config, folder)
            n_bytes = table.data.column(self.config.text_field).nbytes
            for start, stop, part in _cut_rows(len(table), n_bytes, unit_bytes):
                yield Piece(file.source, self.config.split or "rows", folder, start, stop, part)

    def read(self, piece: Piece) -> Iterator[Document | UserError]:
        table = self._load(piece.url).with_format("arrow")
        for start in range(piece.start, piece.stop, _ROWS_AT_ONCE):
            rows = table[start : min(start + _ROWS_AT_ONCE, piece.stop)]
            yield from _rows(rows, self.config, piece.name, piece.url, start)

    @staticmethod
    def _load(folder: str) -> Any:
        import datasets

        return datasets.load_from_disk(folder)


def _cut_rows(rows: int, n_bytes: int, unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, bytes) of even parts of a table, each of about `unit_bytes` or less."""
    parts = min(max(1, -(-n_bytes // unit_bytes)), max(rows, 1))
    for part in range(parts):
        start, stop = rows * part // parts, rows * (part + 1) // parts
        if start < stop:
            yield start, stop, n_bytes // parts


def _open_parquet(stream: BinaryIO, url: str) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(stream)
    except pyarrow.ArrowInvalid as error:
        raise OSError(f"not a parquet file: {error}") from None


def _check_columns(schema: Any, config: _TableSource, where: str) -> None:
    for key, name in (("text_field", config.text_field), ("id_field", config.id_field)):
        if name is not None and name not in schema.names:
            raise UserError(f"{where}: no column {name!r} ({key}); it has: {', '.join(schema.names)}")
    kind = str(schema.field(config.text_field).type)
    if not any(word in kind for word in ("string", "binary")):
        raise UserError(f"{where}: column {config.text_field!r} (text_field) holds {kind}, not text")


def _rows(table: Any, config: _TableSource, name: str, where: str, first: int) -> Iterator[Document | UserError]:
    import pyarrow

    # As bytes: Arrow does not check its strings, and the cleaner names what is not UTF-8.
    texts = table.column(config.text_field).cast(pyarrow.large_binary()).to_pylist()
    ids = table.column(config.id_field).to_pylist() if config.id_field else [None] * len(texts)
    for row, (text, given) in enumerate(zip(texts, ids, strict=True), first):
        if text is None or (given is None and config.id_field):
            field = config.text_field if text is None else config.id_field
            yield UserError(f"{where}: row {row}: {field!r} is null")
        else:
            yield Document(f"{name}@{row}" if given is None else str(given), text)
