"""Reasons to stop cleanly at the next step boundary: signals, a STOP file, a time limit, a launcher that is gone."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

STOP_FILE = "STOP"


def forget_earlier(run_dir: Path) -> None:
    """Remove a STOP file that is older than this process: it was meant for an earlier start."""
    file = run_dir / STOP_FILE
    with suppress(FileNotFoundError):
        # The kernel tells when a process began to a second that has begun already.
        if file.stat().st_mtime < psutil.Process().create_time() + 1:
            file.unlink()


class StopRequest:
    """Collects this process's reasons to stop. All processes compare theirs once a step.

    max_hours: since this process began. launched: by a launcher that is not to be outlived; a shell may end.
    """

    def __init__(self, run_dir: Path, max_hours: float | None = None, *, launched: bool = True) -> None:
        self._file = run_dir / STOP_FILE
        self._max_hours = max_hours
        # From here on a clock that nobody sets.
        self._began = time.monotonic() - (time.time() - psutil.Process().create_time())
        self._launcher = os.getppid() if launched else None
        self._signal: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    @property
    def reason(self) -> str | None:
        """Why this process wants to stop, or None."""
        if self._signal:
            return f"received {self._signal}"
        if self._file.exists():
            return f"found {self._file}"
        if self._max_hours is not None and time.monotonic() - self._began > 3600 * self._max_hours:
            return f"run.max_hours: {self._max_hours:g} hours are over"
        if self._launcher is not None and os.getppid() != self._launcher:
            return "the launcher is gone"
        return None
