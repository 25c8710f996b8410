"""Files that are there whole or not at all: written aside, fsynced, renamed."""

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import UserError

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BLOCK = 1 << 20


@contextmanager
def write_aside(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears as `path` only once it is complete and on disk; on any error nothing is left.

    Raises:
        UserError: the disk, the quota or the file size limit is reached.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(aside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_directory(path.parent)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise UserError(
                f"{path}: cannot be written: {os.strerror(error.errno)}. "
                "Make room (or choose another output), then run the same command again: finished work is kept."
            ) from error
        raise
    finally:
        aside.unlink(missing_ok=True)


def is_aside(path: Path) -> bool:
    """Whether `path` is named like a file that a killed `write_aside` left behind."""
    return path.name.startswith(".") and len(path.suffix) == 33


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON through `write_aside`."""
    with write_aside(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote to `path`; None: nothing yet."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_stream(stream: Any) -> tuple[int, str]:
    """Size in bytes and SHA-256 (hex) of what is left of a binary stream."""
    digest, size = hashlib.sha256(), 0
    while block := stream.read(_BLOCK):
        digest.update(block)
        size += len(block)
    return size, digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with open(path, "rb") as file:
        return hash_stream(file)[1]
