"""Which files the paths of a source name: directories, globs and links, each file once and none left out unsaid."""

import fnmatch
import os
import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import PurePosixPath
from typing import Any

from pipeline.errors import UserError
from pipeline.locations import COMPRESSIONS, SourceFile, is_valid_text, is_web, locate, open_filesystem, without_query
from pipeline.remote import retry

_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", *(f".tar{ending}" for ending in COMPRESSIONS))
_LOST = "lost+found"  # a disk's, at its root: the file system check's alone, and closed to users


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
        except PermissionError as error:
            raise UserError(
                f"{key}.path: {path}: {error}: make it readable, or name the rest in a list of paths"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{key}.path: {path}: {error}") from None
        if kind == "directory":
            if not files:
                raise UserError(f"{key}.path: {path} holds no file that matches {pattern!r}; set {key}.pattern")
        elif kind == "file":
            root = without_query(root).rpartition("/")[0]
        elif files:
            root = _fixed_part(root)
        else:
            missing = "no file matches {}" if _has_magic(root) else "{}: no such file or directory"
            raise UserError(f"{key}.path: {missing.format(path)}")
        for file in files:
            relative = without_query(file).removeprefix(root).lstrip("/")
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
    elif is_web(root):
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
            folders[:] = sorted(name for name in folders if name != _LOST)
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
    below, place = len(_fixed_part(pattern)), cache(os.path.realpath)

    def is_linked(file: str) -> bool:
        folder = os.path.dirname(file)
        return not place(folder).endswith(folder[below:])

    for file in sorted(_local_matches(pattern), key=lambda file: (is_linked(file), file)):
        if not os.path.isdir(file):
            files.setdefault(os.path.join(place(os.path.dirname(file)), os.path.basename(file)), file)
    return list(files.values())


def _local_matches(pattern: str) -> Iterator[str]:
    """What a pattern without ** matches. Python's `glob` says nothing of a directory that cannot be listed."""
    folder, _, name = pattern.rpartition("/")
    for parent in _local_matches(folder) if _has_magic(folder) else [folder]:
        if _has_magic(name):
            names = fnmatch.filter(os.listdir(f"{parent}/"), name) if os.path.isdir(f"{parent}/") else []
        else:
            names = [name] if os.path.lexists(f"{parent}/{name}") else []
        yield from (f"{parent}/{found}" for found in names if found != _LOST)


def _kind(filesystem: Any, path: str, location: str) -> str | None:
    """`file`, `directory`, or None: nothing of this name. A web address is a directory if it ends with a slash."""
    if is_web(location) and location.endswith("/"):
        return "directory"
    try:
        return str(retry(filesystem, lambda: filesystem.info(path))["type"])
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_local(filesystem: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)
