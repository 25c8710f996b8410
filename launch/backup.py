"""Copies of a run's finished checkpoints at another place, made in the background by the first process.

The place looks like the run's checkpoints/: a directory for each, its manifest written last. Nothing is deleted there.
"""

import json
import posixpath
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback

from launch.checkpoint import read_manifest
from launch.console import say
from launch.retention import list_checkpoints
from pipeline.errors import UserError

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 300.0
"""How long the end of a run waits while nothing moves."""
HURRY_SECONDS = 20.0
"""How long a run that was told to stop waits at most: who told it soon ends it by force."""


def check_place(location: str | None, checkpoints: Path) -> None:
    """Raise `UserError` if `checkpoint.copy_to` names no place, or the run's own `checkpoints`."""
    if location is None:
        return
    try:
        filesystem, root = _open_place(location)
    except (ImportError, ValueError) as error:
        raise UserError(f"checkpoint.copy_to: {location}: {error}") from error
    if "file" in filesystem.protocol and Path(root).resolve() == checkpoints.resolve():
        raise UserError(f"checkpoint.copy_to: {location} is where the run keeps its checkpoints; name another place")


def _open_place(location: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    filesystem, root = url_to_fs(location)
    return filesystem, root.rstrip("/")


class Backup:
    """A thread that copies each checkpoint once it is finished, the newest first.

    What fails is said and tried again at the next checkpoint; it never ends the run. A checkpoint that retention has
    deleted before its turn is not copied, nor one that cannot be: it is damaged, or the place has another run's.
    """

    def __init__(self, checkpoints: Path, location: str, run_uid: str) -> None:
        self._checkpoints = checkpoints
        self._location = location
        self._uid = run_uid
        self._done: set[str] = set()
        self._refused: set[str] = set()
        self._asked = threading.Event()
        self._closing = False
        self._advanced = time.monotonic()
        self.busy_with: Path | None = None
        """The checkpoint that is being copied."""
        self._thread = threading.Thread(target=self._run, name="backup", daemon=True)
        self._thread.start()
        self.notice()

    def notice(self) -> None:
        """There may be a new checkpoint, and time to try again."""
        self._asked.set()

    def close(self, *, hurry: bool, give_up: Callable[[], bool]) -> str | None:
        """Wait until all is copied; returns what is not, for people to read.

        The wait ends when nothing has moved for `PATIENCE_SECONDS` or `give_up` says so; with `hurry` after
        `HURRY_SECONDS`, whatever happens.
        """
        self._closing = True
        self._asked.set()
        began = self._advanced = time.monotonic()
        said = False
        while self._thread.is_alive():
            self._thread.join(POLL_SECONDS)
            now = time.monotonic()
            if now - began > HURRY_SECONDS if hurry else now - self._advanced > PATIENCE_SECONDS or give_up():
                break
            if not said and now - began > 5:
                say(f"waiting for copies of checkpoints to {self._location}")
                said = True
        missing = [path.name for path in reversed(list_checkpoints(self._checkpoints)) if path.name not in self._done]
        if not missing:
            return None
        return (
            f"warning: not copied to {self._location}: {', '.join(missing)}; they are in {self._checkpoints}, and the "
            "next start of the run copies them, unless it is done"
        )

    def _run(self) -> None:
        while True:
            self._asked.wait()
            # What is asked for from here on is worth another round.
            self._asked.clear()
            closing = self._closing
            self._copy_all()
            if closing:
                return

    def _copy_all(self) -> None:
        for checkpoint in list_checkpoints(self._checkpoints):
            if checkpoint.name in self._done | self._refused:
                continue
            self.busy_with = checkpoint
            try:
                self._copy(checkpoint)
                self._done.add(checkpoint.name)
            except Exception as error:
                if not checkpoint.exists():  # any more: retention was faster
                    continue
                if isinstance(error, UserError):
                    self._refused.add(checkpoint.name)
                    say(f"warning: {checkpoint.name} is not copied to {self._location}: {error}")
                else:
                    say(
                        f"warning: {checkpoint.name} was not copied to {self._location}, which is tried again at the "
                        f"next checkpoint: {type(error).__name__}: {error}"
                    )
                    return
            finally:
                self.busy_with = None

    def _copy(self, checkpoint: Path) -> None:
        filesystem, root = _open_place(self._location)
        there = posixpath.join(root, checkpoint.name)
        manifest = read_manifest(checkpoint)
        mark = posixpath.join(there, "manifest.json")
        filesystem.invalidate_cache()
        if filesystem.exists(mark):
            found = filesystem.cat_file(mark)
            if found == (checkpoint / "manifest.json").read_bytes():
                return
            if _uid(found) != self._uid:
                raise UserError(
                    f"{filesystem.unstrip_protocol(there)} is of another run; set checkpoint.copy_to to a place of "
                    "this run's own"
                )
            filesystem.rm_file(mark)
        callback = _Advance(self._advance)
        # The manifest comes last: a copy without one does not count.
        for name in [*manifest["files"], "manifest.json"]:
            source, target = checkpoint / name, posixpath.join(there, name)
            filesystem.makedirs(posixpath.dirname(target), exist_ok=True)
            filesystem.put_file(str(source), target, callback=callback)
            self._advance()
            if (size := filesystem.size(target)) != source.stat().st_size:
                raise OSError(f"{target} has {size} bytes instead of {source.stat().st_size}")

    def _advance(self) -> None:
        self._advanced = time.monotonic()


class _Advance(Callback):
    """Tells when another block of a file has gone."""

    def __init__(self, advance: Callable[[], None]) -> None:
        super().__init__()
        self._moved = advance

    def call(self, *arguments: Any, **keywords: Any) -> None:
        self._moved()


def _uid(manifest: bytes) -> str | None:
    try:
        uid: str | None = json.loads(manifest).get("run_uid")
    except (ValueError, AttributeError):
        return None
    return uid
