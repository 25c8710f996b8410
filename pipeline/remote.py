"""Files of other machines: what fails there for a moment is tried again."""

import io
import time
from collections.abc import Callable
from typing import Any, TypeVar

R = TypeVar("R")

_WAIT_SECONDS = (0.5, 1.0, 2.0, 4.0)
_MORE_WAIT_SECONDS = (8.0, 16.0, 32.0)
_LOCAL = {"file", "local", "memory"}
_TRANSIENT_STATUS = {408, 425, 429}
_FOR_GOOD = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)


def is_remote(filesystem: Any) -> bool:
    """Whether a file system lies across a network."""
    protocols = filesystem.protocol
    return not _LOCAL & ({protocols} if isinstance(protocols, str) else set(protocols))


class UnansweredError(OSError):
    """A server in trouble, however often it was asked: nothing is said about the file."""


def retry(filesystem: Any, function: Callable[[], R], *, patient: bool = False) -> R:
    """Call `function`, on a remote file system again after a while where an error may pass.

    patient: for a minute, since a long job would end, instead of seconds, since somebody waits for the answer.

    Raises:
        UnansweredError: it did not pass.
        OSError: whatever else the file system's own error was.
    """
    if not is_remote(filesystem):
        return function()
    waits = _WAIT_SECONDS + _MORE_WAIT_SECONDS if patient else _WAIT_SECONDS
    for wait in (*waits, None):
        try:
            return function()
        except Exception as error:
            cause = _first_cause(error)
            if not _may_pass(cause):
                if isinstance(error, OSError):
                    raise
                raise OSError(f"{type(error).__name__}: {error}") from error
            if wait is None:
                raise UnansweredError(f"asked {len(waits) + 1} times: {type(cause).__name__}: {cause}") from error
        time.sleep(wait)
    raise AssertionError


def _first_cause(error: BaseException) -> BaseException:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later: no answer, or a server's trouble, rather than a refusal."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status >= 500 or status in _TRANSIENT_STATUS
    return not isinstance(error, (*_FOR_GOOD, _NoRangesError))


class _NoRangesError(OSError):
    """A server gives files only as a whole."""


class RemoteFile(io.RawIOBase):
    """A remote file that is opened again, at its place, when reading fails."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem, self._path = filesystem, path
        self._file: Any = None
        self._position = 0
        self._options: dict[str, Any] = {}
        self._size: int | None = retry(filesystem, lambda: getattr(self._opened(), "size", None), patient=True)

    def _opened(self) -> Any:
        if self._file is None:
            self._file = self._filesystem.open(self._path, "rb", **self._options)
        return self._file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            if self._size is None:
                raise _NoRangesError("the server does not tell the file's size, which tables need: copy the file first")
            offset += self._size
        elif whence == io.SEEK_CUR:
            offset += self._position
        self._position = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        data = retry(self._filesystem, lambda: self._read(len(buffer)), patient=True)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, n_bytes: int) -> bytes:
        try:
            return self._read_at_position(n_bytes)
        except ValueError:  # fsspec's word for a server that does not answer range requests
            if self._options:
                raise
            self._close_file()
            self._options = {"block_size": 0}
            return self._read(n_bytes)
        except BaseException:
            self._close_file()
            raise

    def _read_at_position(self, n_bytes: int) -> bytes:
        file = self._opened()
        if not self._options:
            file.seek(self._position)
        elif file.tell() > self._position:
            raise _NoRangesError("the server does not answer range requests, which tables need: copy the file first")
        while self._options and file.tell() < self._position:
            if not file.read(min(self._position - file.tell(), 1 << 20)):
                return b""
        return bytes(file.read(n_bytes))

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def close(self) -> None:
        if not self.closed:
            self._close_file()
        super().close()
