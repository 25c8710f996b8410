"""A run's directory: who may have it, for whom a STOP file in it is, and when a run stops by itself."""

import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.config import RunConfig, load_run_config
from launch.run_directory import RunDirectory
from launch.stop import StopRequest
from pipeline.errors import UserError


@pytest.fixture
def config(write_config: Callable[..., Path], tmp_path: Path) -> RunConfig:
    return load_run_config(write_config(run={"dir": str(tmp_path / "run")}))


@pytest.fixture
def handlers() -> Iterator[None]:
    """Signals are handled as before after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("after", "meant"), [(2, True), (-2, False)])
def test_a_stop_file_made_while_the_run_starts_stops_it(config: RunConfig, after: float, meant: bool) -> None:
    """Between the start of the processes and the opening of the directory lie imports and compilation: minutes."""
    directory = RunDirectory(config.run.dir)
    directory.path.mkdir()
    stop = directory.path / "STOP"
    stop.touch()
    made = psutil.Process().create_time() + after
    os.utime(stop, (made, made))
    directory.open(config, {})
    assert stop.exists() == meant
    assert (StopRequest(directory.path).reason is not None) == meant


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_of_two_that_start_at_once_one_has_the_directory(config: RunConfig, resume: str) -> None:
    """The second one looked before the first one opened it, and comes when the first one has gone."""
    if resume == "auto":
        earlier = RunDirectory(config.run.dir)
        earlier.open(config, {})
        earlier.close()
    second = RunDirectory(config.run.dir)
    second.check(resume)
    first = RunDirectory(config.run.dir)
    first.check(resume)
    first.open(config, {})
    with pytest.raises(UserError, match="in use by another trainer"):
        second.open(config, {})
    first.close()
    with pytest.raises(UserError, match=r"another trainer has had .*run while this one was starting"):
        second.open(config, {})


def test_a_file_system_without_locks_is_named(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    directory = RunDirectory(config.run.dir)
    with pytest.raises(UserError, match=r"run\.dir: .*run: its file system has no locks.*not implemented"):
        directory.open(config, {})
    with pytest.raises(UserError, match="its file system has no locks"):  # a run that was copied there
        directory.check_unused()


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("launched", "reason"), [(True, "the launcher is gone"), (False, None)])
def test_a_run_outlives_the_shell_that_started_it_and_no_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launched: bool, reason: str | None
) -> None:
    stop = StopRequest(tmp_path, launched=launched)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop.reason == reason
