"""Where documents come from: files, what is measured of each, and reading any part of one.

A reader knows one type of source. Its files are hashed and measured once (`survey`), which cuts them into pieces of
bounded size; a piece is read by itself, on any machine that sees the file.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, cast

from pipeline.atomic import hash_stream
from pipeline.config import Content, DatasetsSource, JsonlSource, ParquetSource, Source, TextSource
from pipeline.errors import UserError
from pipeline.order import derive_key, keyed_hash

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Document:
    """`data` should be UTF-8; that is for the cleaner to find out."""

    id: str
    data: bytes


@dataclass(frozen=True)
class SourceFile:
    """A file of source number `source`; `name` is relative to the source's root, `url` says where it lies."""

    source: int
    name: str
    url: str


@dataclass(frozen=True)
class Piece:
    """Part of a file: bytes [start, stop) of a text or jsonl file (unpacked), rows [start, stop) of a table."""

    source: int
    name: str
    url: str
    start: int
    stop: int
    n_bytes: int


@dataclass(frozen=True)
class Survey:
    """What one look at a whole file tells."""

    file: SourceFile
    size: int
    sha256: str
    pieces: tuple[Piece, ...]

    def record(self, names: Sequence[str]) -> dict[str, Any]:
        """The manifest's entry: source name, relative name, size in bytes, SHA-256."""
        return {
            "source": names[self.file.source],
            "name": self.file.name,
            "size": self.size,
            "sha256": self.sha256,
        }


class Reader(Protocol):
    """One type of source."""

    def files(self, source: int) -> list[SourceFile]:
        """All its files, each once, in the order of their names."""

    def pieces(self, file: SourceFile, size: int, unit_bytes: int) -> Iterator[Piece]:
        """Cut one file into pieces of about `unit_bytes`."""

    def read(self, piece: Piece) -> Iterator[Document]:
        """The documents of one piece, in their order in the file."""


def list_files(content: Content) -> list[SourceFile]:
    """The files of all sources.

    Raises:
        UserError: a path that does not exist, or holds nothing.
    """
    return [file for number, source in enumerate(content.sources) for file in reader(source).files(number)]


def survey(content: Content, file: SourceFile) -> Survey:
    """Hash a file and cut it into pieces."""
    try:
        with _open(file.url, compression=None) as stream:
            size, sha256 = hash_stream(stream)
        pieces = tuple(reader(content.sources[file.source]).pieces(file, size, content.unit_bytes))
    except (OSError, EOFError) as error:
        raise UserError(f"{file.url}: cannot be read: {error}") from None
    return Survey(file, size, sha256, pieces)


def cut_units(surveys: Sequence[Survey], content: Content) -> list[tuple[Piece, ...]]:
    """All pieces in keyed order, grouped into units of at most `unit_bytes` (one piece at least)."""
    key = derive_key("unit order", content.seed)
    names = [source.name for source in content.sources]

    def place(piece: Piece) -> tuple[int, str]:
        name = f"{names[piece.source]}:{piece.name}@{piece.start}"
        return keyed_hash(key, name), name

    units: list[list[Piece]] = []
    room = 0
    for piece in sorted((piece for found in surveys for piece in found.pieces), key=place):
        if piece.n_bytes > room or not units:
            units.append([])
            room = content.unit_bytes
        units[-1].append(piece)
        room -= piece.n_bytes
    return [tuple(unit) for unit in units]


def read_piece(content: Content, piece: Piece) -> Iterator[Document]:
    """The documents of a piece, their ids `SOURCE:FILE`, `SOURCE:FILE@PLACE` or `SOURCE:ID`.

    Raises:
        UserError: naming file and row, when a row cannot be read.
    """
    source = content.sources[piece.source]
    try:
        for document in reader(source).read(piece):
            yield Document(f"{source.name}:{document.id}", document.data)
    except (OSError, EOFError) as error:
        raise UserError(f"{piece.url}: cannot be read: {error}") from None


def reader(source: Source) -> Reader:
    """The reader of a source."""
    return cast(Reader, _READERS[type(source)](source))


class _TextReader:
    def __init__(self, config: TextSource) -> None:
        self.config = config

    def files(self, source: int) -> list[SourceFile]:
        return _find(source, self.config.name, self.config.path, self.config.pattern)

    def pieces(self, file: SourceFile, size: int, unit_bytes: int) -> Iterator[Piece]:
        yield Piece(**asdict(file), start=0, stop=size, n_bytes=size)

    def read(self, piece: Piece) -> Iterator[Document]:
        with _open(piece.url) as stream:
            yield Document(piece.name, stream.read())


class _JsonlReader:
    def __init__(self, config: JsonlSource) -> None:
        self.config = config

    def files(self, source: int) -> list[SourceFile]:
        return _find(source, self.config.name, self.config.path, self.config.pattern)

    def pieces(self, file: SourceFile, size: int, unit_bytes: int) -> Iterator[Piece]:
        if _is_compressed(file.url):
            with _open(file.url) as stream:
                size = sum(len(block) for block in iter(lambda: stream.read(1 << 20), b""))
        for start in range(0, size, unit_bytes):
            stop = min(start + unit_bytes, size)
            yield Piece(**asdict(file), start=start, stop=stop, n_bytes=stop - start)

    def read(self, piece: Piece) -> Iterator[Document]:
        with _open(piece.url) as stream:
            if piece.start:
                # A line belongs to the piece in which it starts.
                stream.seek(piece.start - 1)
                stream.readline()
            while (offset := stream.tell()) < piece.stop and (line := stream.readline()):
                if line.strip():
                    yield self._document(f"{piece.name}@{offset}", f"{piece.url}: line at byte {offset}", line)

    def _document(self, place: str, where: str, line: bytes) -> Document:
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            return Document(place, line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object")
        text = _field(row, self.config.text_field, where, "text_field")
        if not isinstance(text, str):
            raise UserError(f"{where}: {self.config.text_field!r} (text_field) holds no string but {text!r:.60}")
        if self.config.id_field is not None:
            place = str(_field(row, self.config.id_field, where, "id_field"))
        # A lone surrogate is valid JSON and no valid text: it becomes invalid UTF-8 here.
        return Document(place, text.encode("utf-8", "surrogatepass"))


class _ParquetReader:
    def __init__(self, config: ParquetSource) -> None:
        self.config = config

    def files(self, source: int) -> list[SourceFile]:
        return _find(source, self.config.name, self.config.path, self.config.pattern)

    def pieces(self, file: SourceFile, size: int, unit_bytes: int) -> Iterator[Piece]:
        with _open(file.url, compression=None) as stream:
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

    def read(self, piece: Piece) -> Iterator[Document]:
        columns = [name for name in (self.config.text_field, self.config.id_field) if name is not None]
        with _open(piece.url, compression=None) as stream:
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


class _DatasetsReader:
    """Rows count over all the Arrow files of a split, so its pieces are listed with the file that ties those."""

    _STATE = "state.json"

    def __init__(self, config: DatasetsSource) -> None:
        self.config = config

    def files(self, source: int) -> list[SourceFile]:
        root = _locate(self.config.path)
        parts = [root] if self.config.split is None else [root, self.config.split]
        folder = "/".join(parts)
        key = f"content.sources.{source}"
        filesystem, path = _filesystem(folder, key)
        if not filesystem.isfile(f"{path}/{self._STATE}"):
            top, top_path = _filesystem(root, key)
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

    def read(self, piece: Piece) -> Iterator[Document]:
        table = self._load(piece.url).with_format("arrow")
        for start in range(piece.start, piece.stop, _ROWS_AT_ONCE):
            rows = table[start : min(start + _ROWS_AT_ONCE, piece.stop)]
            yield from _rows(rows, self.config, piece.name, piece.url, start)

    @staticmethod
    def _load(folder: str) -> Any:
        import datasets

        return datasets.load_from_disk(folder)


_READERS: dict[type, Any] = {
    TextSource: _TextReader,
    JsonlSource: _JsonlReader,
    ParquetSource: _ParquetReader,
    DatasetsSource: _DatasetsReader,
}


def _locate(path: str) -> str:
    """An absolute path or a URL, from what a user may write."""
    if path.startswith("package:"):
        package, _, below = path.removeprefix("package:").partition("/")
        try:
            return str(resources.files(package).joinpath(below))
        except ModuleNotFoundError:
            raise UserError(f"{path}: the package is not installed; `pip install {package}` brings it") from None
    return path if "://" in path or "::" in path else str(Path(path).expanduser().absolute())


def _filesystem(location: str, key: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise UserError(f"{key}.path: {location}: {error}") from None
    return filesystem, path.rstrip("/")


def _find(source: int, name: str, paths: str | tuple[str, ...], pattern: str) -> list[SourceFile]:
    """The files that `paths` name, each called by its path below the directory, the glob's fixed part or its parent."""
    key = f"content.sources.{source}"
    found: dict[str, SourceFile] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        filesystem, root = _filesystem(_locate(path), key)
        if filesystem.isdir(root):
            files = [file for file in filesystem.find(root) if PurePosixPath(file).match(pattern)]
            if not files:
                raise UserError(f"{key}.path: {path} holds no file that matches {pattern!r}; set {key}.pattern")
        elif filesystem.isfile(root):
            files, root = [root], root.rpartition("/")[0]
        elif any(character in root for character in "*?["):
            files = [file for file in filesystem.glob(root) if filesystem.isfile(file)]
            fixed = root.split("/")
            magic = next(i for i, part in enumerate(fixed) if any(character in part for character in "*?["))
            root = "/".join(fixed[:magic])
            if not files:
                raise UserError(f"{key}.path: no file matches {path}")
        else:
            raise UserError(f"{key}.path: {path}: no such file or directory")
        for file in files:
            relative = file.removeprefix(root).lstrip("/")
            url = filesystem.unstrip_protocol(file)
            if relative in found and found[relative].url != url:
                raise UserError(
                    f"{key}.path: {found[relative].url} and {url} are both called {relative!r} in source {name!r}: "
                    "name a directory above both, or make them two sources"
                )
            found[relative] = SourceFile(source, relative, url)
    return [found[relative] for relative in sorted(found)]


def _open(url: str, compression: str | None = "infer") -> BinaryIO:
    import fsspec

    return cast(BinaryIO, fsspec.open(url, "rb", compression=compression).open())


def _is_compressed(url: str) -> bool:
    from fsspec.utils import infer_compression

    return infer_compression(url) is not None


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
        raise UserError(f"{url}: not a parquet file: {error}") from None


def _check_columns(schema: Any, config: ParquetSource | DatasetsSource, where: str) -> None:
    for key, name in (("text_field", config.text_field), ("id_field", config.id_field)):
        if name is not None and name not in schema.names:
            raise UserError(f"{where}: no column {name!r} ({key}); it has: {', '.join(schema.names)}")
    kind = str(schema.field(config.text_field).type)
    if not any(word in kind for word in ("string", "binary")):
        raise UserError(f"{where}: column {config.text_field!r} (text_field) holds {kind}, not text")


def _rows(table: Any, config: ParquetSource | DatasetsSource, name: str, where: str, first: int) -> Iterator[Document]:
    import pyarrow

    # As bytes: Arrow does not check its strings, and the cleaner names what is not UTF-8.
    texts = table.column(config.text_field).cast(pyarrow.large_binary()).to_pylist()
    ids = table.column(config.id_field).to_pylist() if config.id_field else [None] * len(texts)
    for row, (text, given) in enumerate(zip(texts, ids, strict=True), first):
        if text is None or (given is None and config.id_field):
            field = config.text_field if text is None else config.id_field
            raise UserError(f"{where}: row {row}: {field!r} is null")
        yield Document(f"{name}@{row}" if given is None else str(given), text)


def _field(row: dict[str, Any], name: str, where: str, key: str) -> Any:
    if name not in row:
        raise UserError(f"{where}: no field {name!r} ({key}); it has: {', '.join(row) or 'none'}")
    return row[name]
