"""Start a run again after a crash: `python -m launch.supervise -- deepspeed [options] launch/train.py CONFIG …`.

The command is run with run.resume=auto until the run is done (exit status 0), and started again when it crashes. It is
not when it stopped cleanly (75), met a user error (2) or bad numbers (70): that status is passed on. DONE decides
whether the run is done, never the launcher's status, which can be 0 after a crash. SIGTERM, SIGINT and SIGUSR1 are
passed on to the processes of the run, which save and stop.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from launch.checkpoint import list_checkpoints
from launch.config import RunConfig, load_run_config
from launch.progress import duration
from launch.run_directory import RunDirectory
from pipeline.errors import USER_ERROR_EXIT, UserError, run_command

FINAL = (USER_ERROR_EXIT, 70, 75)
"""Exit statuses after which starting again would not help, or is not wanted."""

POLL_SECONDS = 0.2
LEAVE_SECONDS = 60.0
"""For processes that their launcher left behind: to save and stop."""
AGAIN_SECONDS = 10.0
"""Between two signals to a run that is to stop."""


class Supervisor:
    """Runs one command again and again."""

    def __init__(self, command: Sequence[str], config: RunConfig, *, restarts: int, wait: float) -> None:
        self._command, self._config, self._restarts, self._wait = command, config, restarts, wait
        self._directory = RunDirectory(config.run.dir)
        self._told = False
        self._pending: int | None = None
        self._told_again_at = 0.0

    def run(self) -> int:
        """Run until there is nothing more to do; returns the run's exit status."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        failures = 0
        while True:
            before, began = self._newest(), time.monotonic()
            status = self._run_once()
            if self._done():
                return 0
            if status in FINAL or self._told:
                return status or 1
            failures = 0 if self._newest() != before else failures + 1
            ended = f"the run ended with status {status} after {duration(time.monotonic() - began)}"
            if failures > self._restarts:
                _say(f"error: {ended}; given up after {failures} times in a row without a new checkpoint")
                return status or 1
            _say(f"{ended}; starting it again (without a new checkpoint: {failures} of {self._restarts} times)")
            if not self._pause():
                return status or 1

    def _run_once(self) -> int:
        # A session of its own: Ctrl-C reaches the run through this process alone, and what is left of it is found.
        job = subprocess.Popen(self._command, start_new_session=True)
        while job.poll() is None:
            self._pass_on(job.pid)
            time.sleep(POLL_SECONDS)
        left = members(job.pid)
        if left:
            _say(f"{len(left)} processes are left behind by their launcher: they are told to stop")
            _send(left, signal.SIGTERM)
            for process in psutil.wait_procs(left, timeout=LEAVE_SECONDS)[1]:
                _send([process], signal.SIGKILL)
        return job.returncode if job.returncode >= 0 else 128 - job.returncode

    def _pass_on(self, session: int) -> None:
        """Hand a signal to one of the run's processes, once they are there: all stop with it, after the same step.

        It is told again until the run ends: a process that is just being started may lose a signal.
        """
        if self._pending is None or time.monotonic() < self._told_again_at:
            return
        for process in members(session):
            if _listens(process, self._pending):
                _send([process], self._pending)
                self._told_again_at = time.monotonic() + AGAIN_SECONDS
                return

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Python catches SIGINT from its start on; SIGTERM is caught once a process can stop cleanly.
        self._told, self._pending = True, signal.SIGTERM if number == signal.SIGINT else number

    def _pause(self) -> bool:
        """Wait before starting again; False if told to stop meanwhile."""
        end = time.monotonic() + self._wait
        while not self._told and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        return not self._told

    def _done(self) -> bool:
        done = self._directory.done_tokens
        return done is not None and done >= self._config.train.tokens

    def _newest(self) -> str | None:
        return next((path.name for path in list_checkpoints(self._directory.checkpoints)), None)


def members(session: int) -> list[psutil.Process]:
    """The living processes of a session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _listens(process: psutil.Process, number: int) -> bool:
    """Whether this is a process of the run, and far enough to catch a signal instead of dying of it."""
    with contextlib.suppress(OSError, psutil.Error):
        environment = process.environ()
        caught = next(
            line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("SigCgt")
        )
        return "LOCAL_RANK" in environment and bool(int(caught.split()[1], 16) >> (number - 1) & 1)
    return False


def _send(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _say(message: str) -> None:
    print(f"supervisor: {message}", file=sys.stderr, flush=True)


def read_command(command: Sequence[str]) -> tuple[list[str], RunConfig]:
    """The command with run.resume=auto, and the config that it names. Raises `UserError` where there is none."""
    scripts = [position for position, word in enumerate(command) if Path(word).name == "train.py"]
    if not scripts:
        raise UserError(
            "no launch/train.py in the command; give it whole after --, such as: -- deepspeed launch/train.py CONFIG"
        )
    arguments = command[scripts[0] + 1 :]
    if refused := [word for word in arguments if word in ("--resume", "--rollback") or word.startswith("run.resume=")]:
        raise UserError(f"{refused[0]}: leave it out; the supervisor starts and resumes the run with run.resume=auto")
    positional = [word for word in arguments if not word.startswith("-")]
    if not positional:
        raise UserError("no config behind launch/train.py; give the run's YAML file")
    return [*command, "run.resume=auto"], load_run_config(positional[0], [*positional[1:], "run.resume=auto"])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.supervise", description=__doc__)
    parser.add_argument("--restarts", type=int, default=3, help="crashes in a row without a new checkpoint; default 3")
    parser.add_argument("--wait", type=float, default=5.0, metavar="SECONDS", help="before starting again; default 5")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command that starts the run")
    arguments = parser.parse_args()
    command, config = read_command(arguments.command[arguments.command[:1] == ["--"] :])
    return Supervisor(command, config, restarts=arguments.restarts, wait=arguments.wait).run()


if __name__ == "__main__":
    run_command(main)
