"""A dataset's directory while it is made: one preparation at a time, its log, and what changed since it was begun."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.credentials import redact
from pipeline.errors import UserError

_NOT_TO_BE_WRITTEN = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def config_changes(old: Any, new: Any, key: str) -> list[str]:
    """What differs between two configurations, a line for each dotted key."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            change
            for name in sorted(old.keys() | new.keys())
            for change in config_changes(old.get(name), new.get(name), f"{key}.{name}")
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [change for i, (a, b) in pairs for change in config_changes(a, b, f"{key}.{i}")]
    return [] if old == new else [f"{key}: was {old!r}, now {new!r}"]


def source_changes(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[str]:
    """Which source files of a manifest were added, changed or taken away."""
    before, after = _hashes(old), _hashes(new)
    return [
        f"source file {name}: {'added' if name not in before else 'gone' if name not in after else 'changed'}"
        for name in sorted(before.keys() | after.keys())
        if name not in before or name not in after or before[name] != after[name]
    ]


def _hashes(entries: Sequence[dict[str, Any]]) -> dict[str, str | None]:
    # A file that could not be read has none: null, once "".
    return {f"{entry['source']}:{entry['name']}": entry["sha256"] or None for entry in entries}


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold a directory, or a file (made if missing), alone; not held where it cannot be written or has no locks.

    Take a file where other machines may come too: NFS tells them of locks on files open for writing alone.

    Raises:
        UserError: with the message `busy`, when another process holds it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno not in _NOT_TO_BE_WRITTEN:
            raise
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


class Log:
    """Lines for the terminal (or the Ray job's log); the same, with their time and without passwords, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Callable[[str], None]:
        try:
            self._file = open(self._path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")
        except OSError:
            self._file = open(os.devnull, "w")
        return self._say

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None:
            self._record(f"stopped: {kind.__name__}: {error}")
        self._file.close()

    def _say(self, line: str) -> None:
        print(line, flush=True)
        self._record(line)

    def _record(self, line: str) -> None:
        with suppress(OSError):
            self._file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {redact(line)}\n")
