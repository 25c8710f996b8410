"""How far a stage is: one line every other second, the same in a terminal and in a log."""

import time
from collections.abc import Callable

_SECONDS_BETWEEN_LINES = 2.0


class Progress:
    """Counts what is finished of `total` parts and says so through `say`; `done` of them were finished before."""

    def __init__(self, stage: str, total: int, parts: str, say: Callable[[str], None], done: int = 0) -> None:
        self._stage, self._parts, self._say = stage, parts, say
        self._total, self._before, self._done = total, done, done
        self._documents = self._tokens = self._bytes = 0
        self._started = self._last = time.monotonic()

    def add(self, parts: int, *, documents: int = 0, tokens: int = 0, n_bytes: int = 0) -> None:
        """Count finished parts and what they held."""
        self._done += parts
        self._documents += documents
        self._tokens += tokens
        self._bytes += n_bytes
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES or (self._done == self._total and self._documents):
            self._say(self._line(max(now - self._started, 1e-9)))
            self._last = now

    def _line(self, seconds: float) -> str:
        found = []
        if self._documents:
            found += [f"{self._documents:,} documents", f"{self._tokens / 1e6:,.1f} M tokens"]
        if self._bytes:
            found += [f"{self._bytes / 1e6:,.1f} MB", f"{self._bytes / 1e6 / seconds:,.1f} MB/s"]
        left = seconds * (self._total - self._done) / max(self._done - self._before, 1)
        found += [f"{self._done}/{self._total} {self._parts}", f"{_clock(left)} left"]
        return f"{self._stage}: {', '.join(found)}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
