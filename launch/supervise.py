"""Start a run again after a crash: `python -m launch.supervise -- deepspeed [options] launch/train.py CONFIG …`.

The command is run with run.resume=auto until the run is done (exit status 0), and started again when it crashes. It is
not when it stopped cleanly (75), met a user error (2) or bad numbers (70): that status is passed on. DONE decides
whether the run is done, never the launcher's status, which can be 0 after a crash. On SIGTERM, SIGINT and SIGUSR1 the
run saves and stops, by a STOP file; one that a person makes is obeyed between two starts too.
"""

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from launch.config import RunConfig, load_run_config
from launch.console import duration
from launch.retention import list_checkpoints
from launch.run_directory import RunDirectory
from launch.stop import STOP_FILE
from pipeline.errors import USER_ERROR_EXIT, UserError, run_command

FINAL = (USER_ERROR_EXIT, 70, 75)
"""Exit statuses after which starting again would not help, or is not wanted."""

POLL_SECONDS = 0.2
LEAVE_SECONDS = 60.0
"""What processes that their launcher left behind are given to stop, beside the time that a checkpoint may take."""


class Supervisor:
    """Runs one command again and again."""

    def __init__(self, command: Sequence[str], config: RunConfig, *, restarts: int, wait: float) -> None:
        self._command, self._config, self._restarts, self._wait = command, config, restarts, wait
        self._directory = RunDirectory(config.run.dir)
        self._stop = self._directory.path / STOP_FILE
        self._began = time.time()
        self._signalled = False

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
        opened_before = self._directory.opened
        # A session of its own: Ctrl-C reaches the run through this process alone, and what is left of it is found.
        try:
            job = subprocess.Popen(self._command, start_new_session=True)
        except OSError as error:
            raise UserError(
                f"{self._command[0]}: cannot be started: {error.strerror}; activate the environment that has it, or "
                "give its whole path"
            ) from error
        asked = False
        while job.poll() is None:
            # Before the run has opened its directory, another trainer may have it. A signal instead would have to find
            # a process of the run: they may be on other machines, and while they start, compilers that they call
            # catch signals too.
            if self._told and not asked and self._directory.opened != opened_before:
                asked = self._ask_to_stop()
            time.sleep(POLL_SECONDS)
        # A start that was refused may have seen another trainer open the directory.
        opened = self._directory.opened != opened_before and job.returncode != USER_ERROR_EXIT
        self._see_off(job.pid, opened=opened)
        return job.returncode if job.returncode >= 0 else 128 - job.returncode

    def _see_off(self, session: int, *, opened: bool) -> None:
        """End what the launcher has left behind: on this machine, and, where this start had `opened` it, elsewhere."""
        limit = self._config.watchdog.save
        patience = None if limit is None else limit + LEAVE_SECONDS
        if left := members(session):
            _say(f"{len(left)} processes are left behind by their launcher: they are told to stop")
            _send(left, signal.SIGTERM)
            for process in psutil.wait_procs(left, timeout=patience)[1]:
                _send([process], signal.SIGKILL)
        goes_on = opened and self._directory.in_use
        if goes_on:
            _say("the run goes on without its launcher, on another machine: it is told to stop")
            self._ask_to_stop()
            end = time.monotonic() + (patience or math.inf)
            while goes_on and time.monotonic() < end:
                time.sleep(POLL_SECONDS)
                goes_on = self._directory.in_use
            if not goes_on:
                self._stop.unlink(missing_ok=True)  # the next start is not meant

    def _ask_to_stop(self) -> bool:
        """Have the run stop after its next step; whether that could be asked for."""
        try:
            self._stop.touch()
        except OSError as error:
            _say(f"warning: cannot make {self._stop}: {error.strerror}")
            return False
        return True

    @property
    def _told(self) -> bool:
        """Whether somebody wants the end, by a signal or by a STOP file, which no start that comes later obeys."""
        if self._signalled:
            return True
        with contextlib.suppress(OSError):
            return self._stop.stat().st_mtime > self._began
        return False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

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
        instead = "; to go back before bad steps set bad_steps.rollback=true" if refused[0] == "--rollback" else ""
        raise UserError(
            f"{refused[0]}: leave it out; the supervisor starts and resumes the run with run.resume=auto{instead}"
        )
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
