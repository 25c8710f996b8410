"""Where documents come from: files, what is measured of each, and reading any part of one.

A reader knows one type of source. Its files are hashed and measured once (`survey`), which cuts them into pieces of
bounded size; a piece is read by itself, on any machine that sees the file.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, cast

from pipeline.atomic import hash_stream
from pipeline.config import Content, DatasetsSource, JsonlSource, ParquetSource, Source, TextSource
from pipeline.errors import UserError
from pipeline.locations import Document, Piece, SourceFile, find_files, is_compressed, open_file
from pipeline.order import derive_key, keyed_hash
from pipeline.tables import DatasetsReader, ParquetReader


@dataclass(frozen=True)
class Survey:
    """What one look at a whole file tells."""

    file: SourceFile
    size: int
    sha256: str
    pieces: tuple[Piece, ...]
    skipped: dict[str, int] = field(default_factory=dict)

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
        with open_file(file.url, compression=None) as stream:
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
        return find_files(source, self.config.name, self.config.path, self.config.pattern)

    def pieces(self, file: SourceFile, size: int, unit_bytes: int) -> Iterator[Piece]:
        yield Piece(**asdict(file), start=0, stop=size, n_bytes=size)

    def read(self, piece: Piece) -> Iterator[Document]:
        with open_file(piece.url) as stream:
            yield Document(piece.name, stream.read())


class _JsonlReader:
    def __init__(self, config: JsonlSource) -> None:
        self.config = config

    def files(self, source: int) -> list[SourceFile]:
        return find_files(source, self.config.name, self.config.path, self.config.pattern)

    def pieces(self, file: SourceFile, size: int, unit_bytes: int) -> Iterator[Piece]:
        if is_compressed(file.url):
            with open_file(file.url) as stream:
                size = sum(len(block) for block in iter(lambda: stream.read(1 << 20), b""))
        for start in range(0, size, unit_bytes):
            stop = min(start + unit_bytes, size)
            yield Piece(**asdict(file), start=start, stop=stop, n_bytes=stop - start)

    def read(self, piece: Piece) -> Iterator[Document]:
        with open_file(piece.url) as stream:
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


_READERS: dict[type, Any] = {
    TextSource: _TextReader,
    JsonlSource: _JsonlReader,
    ParquetSource: ParquetReader,
    DatasetsSource: DatasetsReader,
}


def _field(row: dict[str, Any], name: str, where: str, key: str) -> Any:
    if name not in row:
        raise UserError(f"{where}: no field {name!r} ({key}); it has: {', '.join(row) or 'none'}")
    return row[name]
