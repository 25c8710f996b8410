"""Where files lie: paths, globs, fsspec URLs and installed packages; files, pieces of files, and documents."""

import io
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from pipeline.errors import UserError


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
    """Part of a file: bytes [start, stop) of a text or jsonl file (unpacked), rows [start, stop) of a table."""

    source: int
    name: str
    url: str
    start: int
    stop: int
    n_bytes: int


def locate(path: str) -> str:
    """An absolute path or a URL, from what a user may write."""
    if path.startswith("package:"):
        package, _, below = path.removeprefix("package:").partition("/")
        try:
            return str(resources.files(package).joinpath(below))
        except ModuleNotFoundError:
            raise UserError(f"{path}: the package is not installed; `pip install {package}` brings it") from None
    return path if "://" in path or "::" in path else str(Path(path).expanduser().absolute())


def open_filesystem(location: str, key: str) -> tuple[Any, str]:
    """The fsspec file system of a location, and the path there; `key` is the configuration's, for the message."""
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise UserError(f"{key}.path: {location}: {error}") from None
    return filesystem, path.rstrip("/")


def find_files(source: int, name: str, paths: str | tuple[str, ...], pattern: str) -> list[SourceFile]:
    """The files that `paths` name, each called by its path below the directory, the glob's fixed part or its parent."""
    key = f"content.sources.{source}"
    found: dict[str, SourceFile] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        filesystem, root = open_filesystem(locate(path), key)
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


def open_file(url: str, compression: str | None = "infer") -> BinaryIO:
    """Open for reading, unpacked by the name's ending unless `compression` is None."""
    import fsspec
    from fsspec.utils import infer_compression

    if compression == "infer" and infer_compression(url) == "zstd":
        import pyarrow

        # fsspec's reader takes a truncated file for a whole one.
        packed = fsspec.open(url, "rb", compression=None).open()
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, "r"), "zstd")
        return cast(BinaryIO, io.BufferedReader(stream, 1 << 20))
    return cast(BinaryIO, fsspec.open(url, "rb", compression=compression).open())


def is_compressed(url: str) -> bool:
    """Whether `open_file` unpacks it."""
    from fsspec.utils import infer_compression

    return infer_compression(url) is not None


def read_errors() -> tuple[type[BaseException], ...]:
    """What reading a damaged or vanished file raises, by file system and compression."""
    import lzma
    import zlib

    import pyarrow

    return OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowInvalid
