"""Where files lie: paths, fsspec URLs and installed packages; files, pieces of files, and documents; opening them."""

import io
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Generic, Protocol, TypeVar, cast

from pipeline.errors import UserError
from pipeline.remote import RemoteFile, is_remote, retry

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".lzma": "lzma", ".zst": "zstd"}
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


@dataclass(frozen=True)
class Document:
    """`data` should be UTF-8; that is for the cleaner to find out."""

    id: str
    data: bytes


@dataclass(frozen=True)
class Skipped:
    """`count` documents that could not be read, where the configuration says to go on; `id` says where they were."""

    id: str
    reason: str
    count: int = 1


@dataclass(frozen=True)
class SourceFile:
    """A file of source number `source`; `name` is relative to the source's root, `url` says where it lies."""

    source: int
    name: str
    url: str


@dataclass(frozen=True)
class Piece:
    """Part of a file: bytes [start, stop) of a text or jsonl file (unpacked), rows [start, stop) of a table.

    Pieces of a file with the same `run` are cheap to read only one after the other, each from where the one before it
    ended; they take more than half a unit each. None: a piece by itself.
    """

    source: int
    name: str
    url: str
    start: int
    stop: int
    n_bytes: int
    run: int | None = None


def locate(path: str) -> str:
    """An absolute path or a URL, from what a user may write."""
    if path.startswith("package:"):
        package, _, below = path.removeprefix("package:").partition("/")
        if not package:
            raise UserError(f"{path}: not of the form package:NAME/DIR")
        try:
            return str(resources.files(package).joinpath(below))
        except ModuleNotFoundError:
            raise UserError(f"{path}: the package is not installed; `pip install {package}` brings it") from None
    return path if "://" in path else str(Path(path).expanduser().absolute())


def open_filesystem(location: str, key: str) -> tuple[Any, str]:
    """The fsspec file system of a location, and the path there; `key` is the configuration's, for the message."""
    try:
        filesystem, path = _filesystem_of(location)
    except ImportError as error:
        package = _PACKAGES.get(location.partition("://")[0])
        advice = f"`pip install {package}` on all machines brings what reads it" if package else str(error)
        raise UserError(f"{key}.path: {location}: {advice}") from None
    except ValueError as error:
        raise UserError(f"{key}.path: {location}: {error}") from None
    return filesystem, path.rstrip("/")


def _filesystem_of(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    if url.startswith(("/", "file://")):
        # In a local path fsspec would take "::" for its sign between URLs: of a::b it reads a.
        return LocalFileSystem(), LocalFileSystem._strip_protocol(url)
    filesystem, path = url_to_fs(url)
    return filesystem, path


def is_valid_text(text: str) -> bool:
    """Whether a string can be written as UTF-8: without the lone surrogates that JSON and odd file names may hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_web(location: str) -> bool:
    """Whether it is an address of the web."""
    return location.startswith(("http://", "https://"))


def without_query(path: str) -> str:
    """A web address without what comes after its path; anything else as it is."""
    return path.partition("?")[0] if is_web(path) else path


def open_file(url: str, compression: str | None = "infer") -> BinaryIO:
    """Open for reading, seekable; unpacked by the name's ending unless `compression` is None.

    On a remote file system what fails is tried again a few times, also later, while reading.
    """
    from fsspec.compression import compr

    filesystem, path = _filesystem_of(url)
    raw: Any = filesystem.open(path, "rb") if not is_remote(filesystem) else RemoteFile(filesystem, path)
    method = _compression(url) if compression == "infer" else compression
    if method == "zstd":
        import pyarrow

        # fsspec's reader takes a truncated file for a whole one.
        raw = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
    elif method is not None:
        return cast(BinaryIO, compr[method](raw, mode="rb"))
    return cast(BinaryIO, raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw, 1 << 20))


def is_compressed(url: str) -> bool:
    """Whether `open_file` unpacks it."""
    return _compression(url) is not None


def _compression(url: str) -> str | None:
    return COMPRESSIONS.get(PurePosixPath(without_query(url)).suffix.lower())


def file_state(url: str) -> tuple[Any, ...]:
    """Changes when the file's content does, as far as its file system can tell: size, time of writing, tag.

    File systems name a tag differently: ETag (s3, http), etag (gs, az), oid (hf).
    """
    filesystem, path = _filesystem_of(url)
    facts = retry(filesystem, lambda: filesystem.info(path), patient=True)
    return tuple(facts.get(name) for name in ("size", "mtime", "ETag", "etag", "oid"))


class _Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=_Closable)


class LeftOpen(Generic[T]):
    """What a process left open at the end of a piece, for the next piece of its run: one thing at a time."""

    def __init__(self) -> None:
        self._held: tuple[object, T] | None = None

    def take(self, key: object) -> T | None:
        """What was left under this key; it is the caller's now."""
        if self._held is None or self._held[0] != key:
            return None
        found, self._held = self._held[1], None
        return found

    def leave(self, key: object, value: T) -> None:
        """Keep this, and close what was kept before."""
        if self._held is not None:
            self._held[1].close()
        self._held = key, value


def read_errors() -> tuple[type[BaseException], ...]:
    """What reading a damaged or vanished file raises, by file system and compression."""
    import lzma
    import zlib

    import pyarrow

    return OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException
