"""Documents in the rows of tables: parquet files, and directories of `datasets`."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from pipeline.config import DatasetsSource, HubSource, ParquetSource
from pipeline.errors import UserError
from pipeline.listing import find_files
from pipeline.locations import (
    Document,
    LeftOpen,
    Piece,
    SourceFile,
    file_state,
    locate,
    open_file,
    open_filesystem,
)

_ROWS_AT_ONCE = 256
_BYTES_AT_ONCE = 8 << 20
_READ_BYTES = 1 << 20
_MOST_RUNS = 4
_RUN_PIECES = 4

_TableSource = ParquetSource | DatasetsSource | HubSource


class ParquetReader:
    """Pieces are ranges of rows inside row groups.

    A row group can only be decoded from its start. Its pieces form one run, or up to four if they are many: four tasks
    share it then, and decode it two and a half times between them.
    """

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
            first, run = 0, 0
            for number in range(table.metadata.num_row_groups):
                group = table.metadata.row_group(number)
                n_bytes = group.column(column).total_uncompressed_size
                parts = list(_cut_rows(group.num_rows, n_bytes, unit_bytes))
                runs = max(1, min(_MOST_RUNS, len(parts) // _RUN_PIECES))
                for i, (start, stop, part) in enumerate(parts):
                    mine = run + i * runs // len(parts) if len(parts) > 1 else None
                    yield Piece(**asdict(file), start=first + start, stop=first + stop, n_bytes=part, run=mine)
                first += group.num_rows
                run += runs

    def read(self, piece: Piece) -> Iterator[Document | UserError]:
        key = (piece.url, file_state(piece.url), self.config.text_field, self.config.id_field)
        group = _left.take(key) if piece.run is not None else None
        if group is not None and not group.row <= piece.start < group.end:
            group.close()
            group = None
        if group is None:
            group = _RowGroup(piece, [name for name in (self.config.text_field, self.config.id_field) if name])
        finished = False
        try:
            for first, rows in group.rows(piece):
                yield from _rows(rows, self.config, piece.name, piece.url, first)
            finished = True
        finally:
            if finished and piece.run is not None:
                _left.leave(key, group)
            else:
                group.close()


class _RowGroup:
    """The row group that holds a piece, decoded from its start: rows up to `end`, `row` the next one."""

    def __init__(self, piece: Piece, columns: list[str]) -> None:
        self._stream = open_file(piece.url, compression=None)
        self._batch: Any = None
        self.row = self.end = 0
        try:
            table = _open_parquet(self._stream, piece.url)
            number = -1
            while self.end <= piece.start:
                number += 1
                group = table.metadata.row_group(number)
                self.row, self.end = self.end, self.end + group.num_rows
            at_once = _BYTES_AT_ONCE * group.num_rows // max(group.total_byte_size, 1)
            # One thread: the work is spread over processes.
            self._batches = table.iter_batches(
                max(1, min(at_once, _ROWS_AT_ONCE)), row_groups=[number], columns=columns, use_threads=False
            )
        except BaseException:
            self._stream.close()
            raise

    def rows(self, piece: Piece) -> Iterator[tuple[int, Any]]:
        """(number of the first row, rows): those of the piece, which must not lie before `row`."""
        while self.row < piece.stop:
            if not self._batch:
                self._batch = next(self._batches, None)
                if self._batch is None:
                    raise OSError(f"its row group ends at row {self.row} of {self.end}")
            begin = min(max(piece.start - self.row, 0), self._batch.num_rows)
            end = min(piece.stop - self.row, self._batch.num_rows)
            if begin < end:
                yield self.row + begin, self._batch.slice(begin, end - begin)
            self._batch = self._batch.slice(end)
            self.row += end

    def close(self) -> None:
        self._stream.close()


_left: LeftOpen[_RowGroup] = LeftOpen()


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
                splits = ", ".join(_splits(top.cat_file(f"{top_path}/dataset_dict.json")))
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

        try:
            return datasets.load_from_disk(folder)
        except (ValueError, KeyError, TypeError) as error:
            raise OSError(f"not what `datasets` writes: {type(error).__name__}: {error}") from None


def _splits(dataset_dict: bytes) -> list[str]:
    try:
        return [str(name) for name in json.loads(dataset_dict)["splits"]]
    except (ValueError, KeyError, TypeError):
        return ["nothing that can be read: dataset_dict.json is damaged"]


def _cut_rows(rows: int, n_bytes: int, unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, bytes) of even parts of a table, each of about `unit_bytes` or less."""
    parts = min(max(1, -(-n_bytes // unit_bytes)), max(rows, 1))
    for part in range(parts):
        start, stop = rows * part // parts, rows * (part + 1) // parts
        if start < stop:
            yield start, stop, -(-n_bytes // parts)


def _open_parquet(stream: BinaryIO, url: str) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        # Pages are read one by one, so that no column of a row group is held as a whole.
        return parquet.ParquetFile(stream, buffer_size=_READ_BYTES, page_checksum_verification=True)
    except pyarrow.ArrowInvalid as error:
        raise OSError(f"not a parquet file: {error}") from None


def _check_columns(schema: Any, config: _TableSource, where: str) -> None:
    for key, name in (("text_field", config.text_field), ("id_field", config.id_field)):
        if name is not None and name not in schema.names:
            raise UserError(f"{where}: no column {name!r} ({key}); it has: {', '.join(schema.names)}")
        if name is not None and (count := schema.names.count(name)) > 1:
            raise UserError(f"{where}: {count} columns are called {name!r} ({key}); rename all but one")
    kind = schema.field(config.text_field).type
    if not _is_text(kind):
        raise UserError(f"{where}: column {config.text_field!r} (text_field) holds {kind}, not text")


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return bool(text or types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _rows(table: Any, config: _TableSource, name: str, where: str, first: int) -> Iterator[Document | UserError]:
    import pyarrow

    # As bytes: Arrow does not check its strings, and the cleaner names what is not UTF-8.
    texts = table.column(config.text_field).cast(pyarrow.large_binary()).to_pylist()
    ids = _ids(table.column(config.id_field)) if config.id_field else [None] * len(texts)
    for row, (text, given) in enumerate(zip(texts, ids, strict=True), first):
        if text is None or (given is None and config.id_field):
            field = config.text_field if text is None else config.id_field
            yield UserError(f"{where}: row {row}: {field!r} is null")
        elif isinstance(given, UnicodeDecodeError):
            yield UserError(f"{where}: row {row}: {config.id_field!r} (id_field) is not UTF-8: {given.object!r:.60}")
        else:
            yield Document(f"{name}@{row}" if given is None else str(given), text)


def _ids(column: Any) -> list[Any]:
    """The values of a column; in place of a string that is not UTF-8, the error."""
    import pyarrow

    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = []
        for data in column.cast(pyarrow.large_binary()).to_pylist():
            try:
                values.append(None if data is None else data.decode())
            except UnicodeDecodeError as error:
                values.append(error)
    return values
