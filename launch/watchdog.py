"""Ends the whole job when one of its processes hangs, dies or fails, and says which one and where.

Every process reports its phase once a second to the first one, which judges; a process that is stopped or killed cannot
report, and is missed. When the first one itself is missed, the others end by themselves. Reports go over sockets of
their own from a thread of their own: they work while the training's collectives hang.
"""

import contextlib
import faulthandler
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Literal, Self

from launch.engine import Processes
from launch.operation_config import WatchdogSection
from pipeline.errors import USER_ERROR_EXIT, UserError

LOST = 71
"""Exit status of the processes of a job of which one hung, died or failed."""

Phase = Literal["start", "data", "wait", "forward", "backward", "step", "save", "evaluate"]

TICK_SECONDS = 1.0
MISSED_SECONDS = 5.0
"""A process that has not reported for so long does not run."""
FAREWELL_SECONDS = 3.0
"""What a process that was woken to show its stacks is given for it."""
MEET_SECONDS = 2.0
"""Within which all processes find a user's mistake that one has found, or some wait for it in vain."""
GRACE_SECONDS = 10.0
CONNECT_SECONDS = 60.0


@dataclass(frozen=True)
class Report:
    """What is known of a process.

    Attributes:
        count: phases it has entered. All processes enter the same ones, so the smallest count is furthest behind.
        age: seconds that it had been in its phase when it reported.
        received: when that was, by the clock of the process that keeps the report.
        limit: seconds that it may be in its phase, None without end.
    """

    rank: int
    pid: int
    host: str
    count: int
    phase: str
    age: float
    limit: float | None
    received: float = 0.0

    def silent(self, now: float) -> float:
        """Seconds in the phase."""
        return self.age + now - self.received

    def overdue(self, now: float) -> bool:
        """Whether it has been in its phase for longer than it may."""
        return self.limit is not None and self.silent(now) > self.limit

    def missed(self, now: float) -> bool:
        """Whether it has stopped to report."""
        return now - self.received > MISSED_SECONDS

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


def culprits(reports: list[Report], now: float) -> list[Report]:
    """Of processes one of which is overdue, those that the others wait for."""
    if missed := [report for report in reports if report.missed(now)]:
        return missed
    behind = min(report.count for report in reports)
    return [report for report in reports if report.count == behind]


class Watchdog:
    """Watches over all processes of a run while its context lasts; entered and left by all of them.

    before_exit: called by the watchdog's thread before it ends this process.
    """

    def __init__(self, limits: WatchdogSection, processes: Processes) -> None:
        self._limits, self._processes = limits, processes
        self._rank = processes.rank
        self._host = socket.gethostname()
        self._beat: tuple[int, str, float] = (0, "start", time.monotonic())
        self._steps = 0
        self._failed = False
        self._mistake: tuple[str, float] | None = None
        self.before_exit: Callable[[], None] | None = None
        self._closing = threading.Event()
        self._reports: dict[int, Report] = {}
        self._peers: dict[socket.socket, _Lines] = {}
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._token = ""
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def enter(self, phase: Phase) -> None:
        """This process begins `phase`."""
        self._steps += phase == "data"
        self._beat = (self._beat[0] + 1, phase, time.monotonic())

    def failed(self, error: BaseException) -> None:
        """End the other processes because this one does.

        A `UserError` they find too, as a rule. They are told of it when this process leaves, and end if they have not.
        """
        if self._failed:
            return
        if isinstance(error, UserError):
            self._failed = True
            return
        # Where another process is gone, an error here only follows from it: the thread ends this process.
        self._thread.join(None if self._mistake else TICK_SECONDS)
        self._failed = True
        # From here on nothing ends it before it has shown its traceback.
        self._closing.set()
        self._thread.join()
        self._tell({"end": f"{self._report()} failed in phase {self._beat[1]}: {type(error).__name__}: {error}"})

    def __enter__(self) -> Self:
        if self._processes.world_size > 1:
            self._connect()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.failed(error)
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if isinstance(error, UserError):
            self._tell({"mistake": f"{self._report()}: {error}"})
        self._tell({"bye": True})
        for peer in self._peers:
            with contextlib.suppress(OSError):
                # Closed with something unread, a socket would look like that of a killed process.
                peer.settimeout(FAREWELL_SECONDS)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(1 << 16):
                    pass
            peer.close()
        if self._listener:
            self._listener.close()
        self._selector.close()

    def _connect(self) -> None:
        def listen() -> tuple[int, str]:
            self._listener = socket.create_server(("", 0), backlog=self._processes.world_size)
            return int(self._listener.getsockname()[1]), secrets.token_hex(16)

        port, self._token = self._processes.once(listen)
        if self._listener:
            self._selector.register(self._listener, selectors.EVENT_READ)
        address, problem = os.environ["MASTER_ADDR"], None
        if self._listener is None:
            try:
                self._add(socket.create_connection((address, port), timeout=CONNECT_SECONDS))
            except OSError as error:
                problem = (
                    f"watchdog: rank {self._rank} on {self._host} cannot reach port {port} of {address}: {error}; "
                    "let the nodes of the job connect to each other"
                )
        if found := next(filter(None, self._processes.gather(problem)), None):
            raise UserError(found)

    def _add(self, peer: socket.socket) -> None:
        peer.settimeout(TICK_SECONDS)
        self._peers[peer] = _Lines()
        self._selector.register(peer, selectors.EVENT_READ)

    def _limit(self, phase: str) -> float | None:
        own = None if phase in ("start", "wait") or self._steps < 2 else phase
        limit: float | None = getattr(self._limits, own or "other")
        return limit

    def _report(self) -> Report:
        count, phase, since = self._beat
        now = time.monotonic()
        return Report(self._rank, os.getpid(), self._host, count, phase, now - since, self._limit(phase), now)

    def _tell(self, message: dict[str, Any]) -> None:
        line = json.dumps({"token": self._token, **message}).encode() + b"\n"
        for peer in list(self._peers):
            with contextlib.suppress(OSError):  # its end is noticed when it is read from
                peer.sendall(line)

    def _watch(self) -> None:
        try:
            self._watch_on()
        except Exception as error:
            _write(f"warning: the watchdog of rank {self._rank} has failed: {type(error).__name__}: {error}\n")

    def _watch_on(self) -> None:
        told = time.monotonic()
        while not self._closing.is_set():
            if not self._selector.get_map():
                self._closing.wait(TICK_SECONDS)
            else:
                for key, _ in self._selector.select(TICK_SECONDS):
                    self._read(key.fileobj)
            now, slept = time.monotonic(), time.monotonic() - told
            if slept < TICK_SECONDS:
                continue
            told = now
            mine = self._report()
            self._reports[self._rank] = mine
            self._tell({"report": asdict(mine)})
            self._arm(mine)
            if self._mistake and not self._failed and now > self._mistake[1] + MEET_SECONDS:
                self._end(self._mistake[0], [], show=self._rank == 0, status=USER_ERROR_EXIT)
            if slept < MISSED_SECONDS:
                self._judge()
            else:  # this process was the one that did not run: what the others sent meanwhile comes first
                self._reports = {rank: replace(report, received=now) for rank, report in self._reports.items()}

    def _arm(self, mine: Report) -> None:
        """Should this thread not run any more, as when the interpreter is held, faulthandler's ends the process."""
        if mine.limit is not None:
            left = max(mine.limit - mine.age, 0) + GRACE_SECONDS
            faulthandler.dump_traceback_later(left, exit=True)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _read(self, peer: Any) -> None:
        if self._listener is not None and peer is self._listener:
            self._add(peer.accept()[0])
            return
        lines = self._peers[peer]
        try:
            received = peer.recv(1 << 16)
        except OSError:
            received = b""
        for message in lines.split(received):
            if not secrets.compare_digest(str(message.get("token")), self._token):
                break
            if "report" in message:
                report = replace(Report(**message["report"]), received=time.monotonic())
                lines.rank = report.rank
                if not lines.left:
                    self._reports[report.rank] = report
            elif "end" in message:
                options = {key: message[key] for key in ("stacks", "status") if key in message}
                self._end(message["end"], [], show=self._rank == 0, **options)
            elif "mistake" in message:
                self._mistake = self._mistake or (message["mistake"], time.monotonic())
            elif "bye" in message:
                lines.left = True
        if not received:
            self._selector.unregister(peer)
            self._peers.pop(peer)
            peer.close()
            last = self._reports.pop(lines.rank, None) if lines.rank is not None else None
            if last and not lines.left:
                self._end(f"{last} is gone: killed, or ended without a word (phase {last.phase})", [last])

    def _judge(self) -> None:
        now = time.monotonic()
        reports = list(self._reports.values())
        overdue = [report for report in reports if report.overdue(now)]
        if not overdue:
            return
        found = culprits(reports, now)
        # The first process judges, unless it is itself missed.
        if self._rank == 0 or any(report.rank == 0 for report in found if report.missed(now)):
            said = "; ".join(f"{r} has been silent in phase {r.phase} for {r.silent(now):.0f} s" for r in found)
            self._end(f"{said}; allowed: {overdue[0].limit:g} s", found, stacks=True)

    def _end(
        self, reason: str, found: list[Report], *, show: bool = True, stacks: bool = False, status: int = LOST
    ) -> None:
        """End this process, and tell the others why."""
        self._tell({"end": reason, "stacks": stacks, "status": status})
        if show:
            _write(f"error: {reason}; the job ends\n")
        if stacks:
            _write(self._stacks())
        here = [r.pid for r in found if r.host == self._host and r.pid != os.getpid()]
        for number, pause in ((signal.SIGCONT, FAREWELL_SECONDS), (signal.SIGKILL, 0.0)):
            for pid in here:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(pause if here and stacks else 0)
        with contextlib.suppress(OSError):
            if self.before_exit:
                self.before_exit()
        os._exit(status)

    def _stacks(self) -> str:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            text = file.read().decode(errors="replace")
        return f"{self._report()} in phase {self._beat[1]}, its threads:\n{text}"


class _Lines:
    """What has come from a process."""

    def __init__(self) -> None:
        self.rank: int | None = None
        self.left = False
        self._rest = b""

    def split(self, received: bytes) -> list[dict[str, Any]]:
        """The messages that are complete now; what is none is passed over: anybody can connect."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        messages = []
        for line in lines:
            with contextlib.suppress(ValueError):
                messages.append(json.loads(line))
        return [message for message in messages if isinstance(message, dict)]


def _write(text: str) -> None:
    """In one piece, so that processes do not write into each other's lines."""
    sys.stderr.flush()
    os.write(sys.stderr.fileno(), text.encode())
