"""Where documents come from: files, what is measured of each, and reading any part of one.

A reader knows one type of source. Its files are hashed and measured once (`survey`), which cuts them into pieces of
bounded size; a piece is read by itself, on any machine that sees the file.
"""

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, BinaryIO, Protocol, cast

from pipeline.atomic import hash_stream
from pipeline.config import Content, DatasetsSource, HubSource, JsonlSource, ParquetSource, Source, TextSource
from pipeline.errors import UserError
from pipeline.hub import find_hub_files, is_parquet
from pipeline.listing import find_files
from pipeline.locations import (
    Document,
    LeftOpen,
    Piece,
    Skipped,
    SourceFile,
    file_state,
    is_compressed,
    is_valid_text,
    open_file,
    read_errors,
)
from pipeline.order import derive_key, keyed_hash
from pipeline.remote import UnansweredError
from pipeline.tables import DatasetsReader, ParquetReader

_NO_DAMAGE = (UnansweredError, FileNotFoundError, PermissionError)


@dataclass(frozen=True)
class Survey:
    """What one look at a whole file tells; `skipped` counts, by reason, what cannot be read and is left out.

    `size` (bytes) and `sha256` (hex) are those of the file as it lies there, packed or damaged; None: not to be read.
    `state` is that of the file before it was hashed, see `file_state`.
    """

    file: SourceFile
    size: int | None
    sha256: str | None
    pieces: tuple[Piece, ...]
    skipped: dict[str, int] = field(default_factory=dict)
    state: tuple[Any, ...] = ()

    def record(self, names: Sequence[str]) -> dict[str, Any]:
        """The manifest's entry: source name, relative name, size in bytes, SHA-256, and whether it was left out."""
        entry = {
            "source": names[self.file.source],
            "name": self.file.name,
            "size": self.size,
            "sha256": self.sha256,
        }
        return {**entry, "skipped": self.skipped} if self.skipped else entry


class Reader(Protocol):
    """One type of source."""

    def files(self, source: int) -> list[SourceFile]:
        """All its files, each once, in the order of their names."""

    def pieces(self, file: SourceFile, size: int, unit_bytes: int) -> Iterator[Piece]:
        """Cut one file into pieces of about `unit_bytes`."""

    def read(self, piece: Piece) -> Iterator[Document | UserError]:
        """The documents of one piece, in their order in the file; an error in place of a row that is none."""


def list_files(content: Content) -> list[SourceFile]:
    """The files of all sources.

    Raises:
        UserError: a path that does not exist, or holds nothing.
    """
    return [file for number, source in enumerate(content.sources) for file in reader(source).files(number)]


def survey(content: Content, file: SourceFile) -> Survey:
    """Hash a file and cut it into pieces."""
    size = sha256 = None
    state: tuple[Any, ...] = ()
    try:
        state = file_state(file.url)
        with open_file(file.url, compression=None) as stream:
            size, sha256 = hash_stream(stream)
        if not size and is_compressed(file.url):
            raise EOFError("a compressed file is never empty")
        pieces = tuple(reader(content.sources[file.source]).pieces(file, size, content.unit_bytes))
    except UnansweredError as error:
        raise _unanswered(file.url, error) from None
    except read_errors() as error:
        if content.clean.on_unreadable_file == "skip":
            return Survey(file, size, sha256, (), {"unreadable_file": 1})
        raise _unreadable(file.url, error) from None
    return Survey(file, size, sha256, pieces, state=state)


def changed(url: str, state: tuple[Any, ...]) -> bool:
    """Whether a file is no longer in the state in which it was hashed."""
    try:
        return file_state(url) != state
    except FileNotFoundError:
        return True
    except OSError as error:
        raise _unanswered(url, error) from None


def _unreadable(url: str, error: BaseException) -> UserError:
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return UserError(
        f"{url}: cannot be read: {reason}. Mend or remove the file, or leave such files out "
        "with content.clean.on_unreadable_file=skip."
    )


def _unanswered(url: str, error: BaseException) -> UserError:
    return UserError(
        f"{url}: cannot be read now: {' '.join(str(error).split())}. That is no damage, which could be left out. "
        "Run the same command again once all machines can read the file: finished work is kept."
    )


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


def group_units(units: Sequence[Sequence[Piece]]) -> list[list[int]]:
    """The numbers of units in groups that one task reads in sequence, long groups first.

    The units that hold the pieces of a run follow each other, in the order of their place in the file; all others stand
    alone. No unit holds pieces of two runs, which take more than half a unit each.
    """
    groups: dict[object, list[tuple[int, int]]] = {}
    for number, unit in enumerate(units):
        piece = _piece_of_a_run(unit)
        group, start = ((piece.source, piece.name, piece.run), piece.start) if piece else (number, 0)
        groups.setdefault(group, []).append((start, number))
    ordered = [[number for _, number in sorted(group)] for group in groups.values()]
    return sorted(ordered, key=lambda group: (-len(group), group[0]))


def reading_order(units: Sequence[Sequence[Piece]]) -> list[int]:
    """The numbers of units in the order in which one task reads all of them, unpacking or decoding no file twice.

    Units without a piece of a run come first, as they stand; then those of each file, by their place in it.
    """

    def place(number: int) -> tuple[int, str, int]:
        piece = _piece_of_a_run(units[number])
        return (piece.source, piece.name, piece.start) if piece else (-1, "", number)

    return sorted(range(len(units)), key=place)


def _piece_of_a_run(unit: Sequence[Piece]) -> Piece | None:
    return next((piece for piece in unit if piece.run is not None), None)


def read_piece(content: Content, piece: Piece) -> Iterator[Document | Skipped]:
    """The documents of a piece, their ids `SOURCE:FILE`, `SOURCE:FILE@PLACE` or `SOURCE:ID`, and what is left out.

    Raises:
        UserError: naming file and row, when a row or the file cannot be read and the configuration does not say `skip`.
    """
    source, place, read = content.sources[piece.source], f"{piece.name}@{piece.start}", 0
    try:
        for item in reader(source).read(piece):
            read += 1
            if isinstance(item, Document):
                yield Document(document_id(source.name, item.id), item.data)
            elif content.clean.on_bad_row == "skip":
                yield Skipped(f"{source.name}:{place}", "bad_row")
            else:
                raise UserError(f"{item}. Mend it, or leave such rows out with content.clean.on_bad_row=skip.")
    except read_errors() as error:
        # Its bytes could be read when they were hashed.
        if isinstance(error, _NO_DAMAGE) or getattr(error, "errno", None) is not None:
            raise _unanswered(piece.url, error) from None
        if content.clean.on_unreadable_file == "error":
            raise _unreadable(piece.url, error) from None
        if has_rows(source, piece.url):
            yield Skipped(f"{source.name}:{place}", "unreadable_rows", piece.stop - piece.start - read)
        else:
            yield Skipped(f"{source.name}:{place}", "unreadable_part")


def document_id(source: str, name: str) -> str:
    """The id of a document, given its source's name and its own: of a text file, the file's."""
    return f"{source}:{name}"


def has_rows(source: Source, url: str) -> bool:
    """Whether pieces of a file count rows, not bytes."""
    return isinstance(source, ParquetSource | DatasetsSource) or (isinstance(source, HubSource) and is_parquet(url))


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
    def __init__(self, config: JsonlSource | HubSource) -> None:
        self.config = config

    def files(self, source: int) -> list[SourceFile]:
        assert isinstance(self.config, JsonlSource)
        return find_files(source, self.config.name, self.config.path, self.config.pattern)

    def pieces(self, file: SourceFile, size: int, unit_bytes: int) -> Iterator[Piece]:
        if not is_compressed(file.url):
            for start, stop in pairwise([*range(0, size, unit_bytes), size]):
                yield Piece(**asdict(file), start=start, stop=stop, n_bytes=stop - start)
            return
        with open_file(file.url) as stream:
            size = sum(len(block) for block in iter(lambda: stream.read(1 << 20), b""))
        parts = -(-size // unit_bytes)
        for part in range(parts):
            start, stop = size * part // parts, size * (part + 1) // parts
            # Even parts, rounded up: more than half a unit each.
            n_bytes = -(-size // parts)
            yield Piece(**asdict(file), start=start, stop=stop, n_bytes=n_bytes, run=0 if parts > 1 else None)

    def read(self, piece: Piece) -> Iterator[Document | UserError]:
        for offset, line in _compressed_lines(piece) if is_compressed(piece.url) else _lines(piece):
            if not offset:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield self._document(f"{piece.name}@{offset}", f"{piece.url}: line at byte {offset}", line)

    def _document(self, place: str, where: str, line: bytes) -> Document | UserError:
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            return Document(place, line)
        except (ValueError, RecursionError) as error:
            return UserError(f"{where}: not JSON: {error}")
        if not isinstance(row, dict):
            return UserError(f"{where}: not a JSON object")
        for name, key in ((self.config.text_field, "text_field"), (self.config.id_field, "id_field")):
            if name is not None and name not in row:
                return UserError(f"{where}: no field {name!r} ({key}); it has: {', '.join(row) or 'none'}")
        text = row[self.config.text_field]
        if not isinstance(text, str):
            return UserError(f"{where}: {self.config.text_field!r} (text_field) holds no string but {text!r:.60}")
        if self.config.id_field is not None:
            if row[self.config.id_field] is None:
                return UserError(f"{where}: {self.config.id_field!r} (id_field) is null")
            place = str(row[self.config.id_field])
            if not is_valid_text(place):
                return UserError(f"{where}: {self.config.id_field!r} (id_field) is no valid text: {place!a:.60}")
        # A lone surrogate is valid JSON and no valid text: it becomes invalid UTF-8 here.
        return Document(place, text.encode("utf-8", "surrogatepass"))


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that start in a piece."""
    with open_file(piece.url) as stream:
        if piece.start:
            stream.seek(piece.start - 1)
            # No further than the piece: of a line that is as long as many pieces, each would read all the rest.
            if not stream.readline(piece.stop - piece.start + 1).endswith(b"\n"):
                return
        while (offset := stream.tell()) < piece.stop and (line := stream.readline()):
            yield offset, line


@dataclass
class _Unpacked:
    """A compressed file that is being unpacked: `position` is the start of the next line, `through` what was read."""

    stream: BinaryIO
    position: int = 0
    through: int = 0

    def close(self) -> None:
        self.stream.close()


_unpacked: LeftOpen[_Unpacked] = LeftOpen()


def _compressed_lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """As `_lines`, from one pass over the file as long as its pieces are read in their order."""
    key = (piece.url, file_state(piece.url)) if piece.run is not None else None
    file = _unpacked.take(key) if key else None
    if file is not None and file.through > piece.start:
        file.close()
        file = None
    if file is None:
        file = _Unpacked(open_file(piece.url))
    finished = False
    try:
        while file.position < piece.start:
            if file.position < piece.start - 1:
                size = len(file.stream.read(min(piece.start - 1 - file.position, 1 << 20)))
                if not size:
                    raise EOFError(f"it ends at byte {file.position} (unpacked)")
                file.position += size
            else:
                file.position += len(file.stream.readline())
        while file.position < piece.stop and (line := file.stream.readline()):
            file.position += len(line)
            yield file.position - len(line), line
        file.through = piece.stop
        finished = True
    finally:
        if finished and key:
            _unpacked.leave(key, file)
        else:
            file.close()


class _HubReader:
    def __init__(self, config: HubSource) -> None:
        self.config = config

    def files(self, source: int) -> list[SourceFile]:
        return find_hub_files(source, self.config)

    def _reader(self, url: str) -> Any:
        return ParquetReader(self.config) if is_parquet(url) else _JsonlReader(self.config)

    def pieces(self, file: SourceFile, size: int, unit_bytes: int) -> Iterator[Piece]:
        yield from self._reader(file.url).pieces(file, size, unit_bytes)

    def read(self, piece: Piece) -> Iterator[Document | UserError]:
        yield from self._reader(piece.url).read(piece)


_READERS: dict[type, Any] = {
    TextSource: _TextReader,
    JsonlSource: _JsonlReader,
    ParquetSource: ParquetReader,
    DatasetsSource: DatasetsReader,
    HubSource: _HubReader,
}
