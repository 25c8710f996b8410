"""Reasons to stop cleanly at the next step boundary: signals, a STOP file, a launcher that is gone."""

import os
import signal
from pathlib import Path
from types import FrameType

STOP_FILE = "STOP"


class StopRequest:
    """Collects this process's reasons to stop. All processes compare theirs once a step."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / STOP_FILE
        self._parent = os.getppid()
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
        if os.getppid() != self._parent:
            return "the launcher is gone"
        return None
