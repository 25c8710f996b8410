"""Where files lie: paths, globs, fsspec URLs and installed packages; files, pieces of files, and documents."""

import glob
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Generic, Protocol, TypeVar, cast

from pipeline.errors import UserError
from pipeline.remote import RemoteFile, is_remote, retry

_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".lzma": "lzma", ".zst": "zstd"}
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", *(f".tar{ending}" for ending in _COMPRESSIONS))
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


def find_files(source: int, name: str, paths: str | tuple[str, ...], pattern: str) -> list[SourceFile]:
    """The files that `paths` name, each called by its path below the directory, the glob's fixed part or its parent."""
    key = f"content.sources.{source}"
    if not paths:
        raise UserError(f"{key}.path: empty; name a file, a directory, a glob or a URL")
    found: dict[str, SourceFile] = {}
    names: dict[str, str] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        location = locate(path)
        filesystem, root = open_filesystem(location, key)
        try:
            kind = _kind(filesystem, root, location)
            if kind == "directory":
                files = [file for file in _files_below(filesystem, root) if PurePosixPath(file).match(pattern)]
            elif kind is None and _has_magic(root):
                files = _matching_files(filesystem, root)
            else:
                files = [root] if kind else []
        except (OSError, ValueError) as error:
            raise UserError(f"{key}.path: {path}: {error}") from None
        if kind == "directory":
            if not files:
                raise UserError(f"{key}.path: {path} holds no file that matches {pattern!r}; set {key}.pattern")
        elif kind == "file":
            root = _without_query(root).rpartition("/")[0]
        elif files:
            root = _fixed_part(root)
        else:
            missing = "no file matches {}" if _has_magic(root) else "{}: no such file or directory"
            raise UserError(f"{key}.path: {missing.format(path)}")
        for file in files:
            relative = _without_query(file).removeprefix(root).lstrip("/")
            if not is_valid_text(relative):
                raise UserError(f"{key}.path: the name of {file!a} is not UTF-8; rename the file")
            if relative.lower().endswith(_ARCHIVES):
                raise UserError(
                    f"{key}.path: {file} is an archive of files: unpack it (each file may be packed by itself, as .gz, "
                    ".bz2, .xz or .zst), or leave it out by the path or the pattern"
                )
            url = filesystem.unstrip_protocol(file)
            if relative in found and found[relative].url != url:
                raise UserError(
                    f"{key}.path: {found[relative].url} and {url} are both called {relative!r} in source {name!r}: "
                    "name a directory above both, or make them two sources"
                )
            if names.setdefault(url, relative) != relative:
                raise UserError(
                    f"{key}.path: {url} is named twice, as {names[url]!r} and as {relative!r}: let each path hold "
                    "files of its own, or the document would be read twice"
                )
            found[relative] = SourceFile(source, relative, url)
    return [found[relative] for relative in sorted(found)]


def _has_magic(path: str) -> bool:
    return any(character in path for character in "*?[")


def _fixed_part(pattern: str) -> str:
    parts = pattern.split("/")
    return "/".join(parts[: next(i for i, part in enumerate(parts) if _has_magic(part))])


def _files_below(filesystem: Any, root: str) -> Iterator[str]:
    """All files of a directory and of those in it. A directory that cannot be listed is an error: its files would be
    missing without a word, as they are from fsspec's `find`.
    """
    if _is_local(filesystem):
        yield from _local_files_below(root)
    elif _is_web(root):
        yield from _web_files_below(filesystem, root)
    else:
        yield from retry(filesystem, partial(filesystem.find, root))


def _local_files_below(root: str) -> Iterator[str]:
    """Links to directories are followed; what a link and a directory both lead to is read once, where it lies."""
    walked, links = set(), [root]
    while links:
        for folder, folders, files in os.walk(links.pop(0), onerror=_raise):
            if (place := os.path.realpath(folder)) in walked:
                folders.clear()
                continue
            walked.add(place)
            folders.sort()
            links += filter(os.path.islink, (os.path.join(folder, name) for name in folders))
            yield from (os.path.join(folder, name) for name in files)


def _raise(error: OSError) -> None:
    raise error


def _web_files_below(filesystem: Any, folder: str) -> Iterator[str]:
    for entry in retry(filesystem, partial(filesystem.ls, folder, detail=True)):
        if entry["type"] != "directory":
            yield entry["name"]
        elif entry["name"].rstrip("/") != folder.rstrip("/"):
            yield from _web_files_below(filesystem, entry["name"])


def _matching_files(filesystem: Any, pattern: str) -> list[str]:
    if not _is_local(filesystem):
        found = retry(filesystem, partial(filesystem.glob, pattern, detail=True))
        return [file for file, info in found.items() if info["type"] == "file"]
    # fsspec's own glob takes no links.
    if "**" in pattern:
        from fsspec.utils import glob_translate

        matches = re.compile(glob_translate(pattern)).match
        return [file for file in _local_files_below(_fixed_part(pattern) or "/") if matches(file)]
    files: dict[str, str] = {}
    for file in sorted(glob.glob(pattern, include_hidden=True), key=lambda file: (len(file), file)):
        folder, _, name = file.rpartition("/")
        if not os.path.isdir(file):
            files.setdefault(os.path.join(os.path.realpath(folder), name), file)
    return list(files.values())


def _kind(filesystem: Any, path: str, location: str) -> str | None:
    """`file`, `directory`, or None: nothing of this name. A web address is a directory if it ends with a slash."""
    if _is_web(location) and location.endswith("/"):
        return "directory"
    try:
        return str(retry(filesystem, lambda: filesystem.info(path))["type"])
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_valid_text(text: str) -> bool:
    """Whether a string can be written as UTF-8: without the lone surrogates that JSON and odd file names may hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_local(filesystem: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


def _is_web(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def _without_query(path: str) -> str:
    return path.partition("?")[0] if _is_web(path) else path


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
    return _COMPRESSIONS.get(PurePosixPath(_without_query(url)).suffix.lower())


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
