"""A run under `launch.supervise`: killed, told to stop, finished; and when it is not started again."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launch.supervise import Supervisor, members, read_command
from pipeline.errors import UserError
from tests.distributed.test_launcher import ENDLESS, newest_manifest, steps_recorded, wait_for

ROOT = Path(__file__).resolve().parents[2]
SUPERVISE = [sys.executable, "-m", "launch.supervise", "--wait", "0", "--restarts", "2", "--"]


def attempts(run_dir: Path) -> int:
    """Of which steps were recorded."""
    if not (run_dir / "metrics.jsonl").exists():
        return 0
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return len({json.loads(line)["attempt"] for line in lines if '"train/loss"' in line})


def run_ranks(supervisor: int) -> list[psutil.Process]:
    children = psutil.Process(supervisor).children(recursive=True)
    return [child for child in children if any(word == "launch/train.py" for word in child.cmdline()[:3])]


def test_a_killed_run_goes_on_and_a_signal_to_the_supervisor_stops_it_cleanly(
    launcher_command: Callable[[int], list[str]],
    launcher_environment: dict[str, str],
    run_config: Path,
    tmp_path: Path,
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = ["launch/train.py", str(run_config), f"run.dir={run_dir}", f"checkpoint.every_tokens={512 * 25}"]
    command = [*SUPERVISE, *launcher_command(2), *arguments]
    environment = launcher_environment | {"PYTHONPATH": str(ROOT)}
    with open(log, "w") as file:
        job = subprocess.Popen(
            [*command, f"train.tokens={ENDLESS}"],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(lambda: (run_dir / "checkpoints/latest").exists())
        sessions = [os.getsid(process.pid) for process in run_ranks(job.pid)]
        run_ranks(job.pid)[1].kill()
        wait_for(lambda: attempts(run_dir) == 2)
        sessions += [os.getsid(process.pid) for process in run_ranks(job.pid)]
        job.send_signal(signal.SIGTERM)
        status = job.wait(60)
        output = log.read_text()
        assert status == 75, output
    finally:
        for process in psutil.Process(job.pid).children(recursive=True) if job.poll() is None else ():
            process.kill()
        job.kill()
        job.wait()
    assert "is gone: killed" in output
    assert "starting it again (without a new checkpoint: 0 of 2 times)" in output
    assert "continuing from step-0" in output
    assert f"stopping: found {run_dir / 'STOP'}" in output
    assert not any(members(session) for session in sessions)
    saved = newest_manifest(run_dir)["step"]
    assert steps_recorded(run_dir) >= saved > 25

    done = subprocess.run(
        [*command, f"train.tokens={512 * (saved + 2)}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "DONE").read_text())["step"] == saved + 2


Supervise = Callable[..., int]


@pytest.fixture
def supervise(run_config: Path, tmp_path: Path) -> Iterator[Supervise]:
    """Supervise a stand-in for launch/train.py, its text given, in this process; the exit status."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def run(script: str, python: str = sys.executable) -> int:
        (tmp_path / "train.py").write_text(script)
        command = [python, str(tmp_path / "train.py"), str(run_config), f"run.dir={tmp_path / 'run'}"]
        return Supervisor(*read_command(command), restarts=2, wait=0).run()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("statuses", "expected", "starts"),
    [([2], 2, 1), ([70], 70, 1), ([1, 75], 75, 2), ([0, 247, 71], 71, 3), ([-9, -9, -9], 137, 3)],
)
def test_what_is_started_again(
    supervise: Supervise,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    statuses: list[int],
    expected: int,
    starts: int,
) -> None:
    """A stand-in ends with one status after the other: 0 is no end without DONE, and 3 in a row are too many."""
    status = supervise(
        "import os, pathlib, sys\n"
        f"count = pathlib.Path({str(tmp_path / 'count')!r})\n"
        "started = int(count.read_text()) if count.exists() else 0\n"
        "count.write_text(str(started + 1))\n"
        f"status = {statuses}[started]\n"
        "os.kill(os.getpid(), -status) if status < 0 else sys.exit(status)\n"
    )
    assert status == expected
    assert (tmp_path / "count").read_text() == str(starts)
    assert ("given up after 3 times in a row" in capsys.readouterr().err) == (starts == 3)


def test_a_signal_is_kept_until_the_run_can_stop_and_reaches_nobody_else(
    supervise: Supervise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in has a child that catches signals, as DeepSpeed's compilers do, before it opens the run's directory."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    run_dir, ready, signalled = tmp_path / "run", tmp_path / "ready", tmp_path / "signalled"
    run_dir.mkdir()

    def stop() -> None:
        wait_for(ready.exists)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    child = (
        "import pathlib, signal, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: pathlib.Path({str(signalled)!r}).touch())\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    status = supervise(
        "import pathlib, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"while not pathlib.Path({str(ready)!r}).exists():\n"
        "    time.sleep(0.05)\n"
        "time.sleep(1)\n"
        f"run_dir = pathlib.Path({str(run_dir)!r})\n"
        "(run_dir / 'STOP').unlink(missing_ok=True)\n"
        "(run_dir / 'config.yaml').touch()\n"
        "while not (run_dir / 'STOP').exists():\n"
        "    time.sleep(0.05)\n"
        "child.kill()\n"
        "sys.exit(75)\n"
    )
    assert status == 75
    assert not signalled.exists()


def test_what_a_dead_launcher_leaves_on_another_machine_is_stopped(
    supervise: Supervise, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in ends at once; a process of a session of its own, as one over ssh has, holds the run's lock."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    left = (
        "import fcntl, pathlib, time\n"
        f"run_dir = pathlib.Path({str(run_dir)!r})\n"
        "lock = open(run_dir / 'lock', 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "(run_dir / 'config.yaml').touch()\n"
        "while not (run_dir / 'STOP').exists():\n"
        "    time.sleep(0.05)\n"
        "(run_dir / 'stopped').touch()\n"
    )
    status = supervise(
        "import pathlib, subprocess, sys, time\n"
        f"run_dir = pathlib.Path({str(run_dir)!r})\n"
        "if (run_dir / 'stopped').exists():\n"
        "    sys.exit(70)\n"
        f"subprocess.Popen([sys.executable, '-c', {left!r}], start_new_session=True)\n"
        "while not (run_dir / 'config.yaml').exists():\n"
        "    time.sleep(0.05)\n"
        "sys.exit(1)\n"
    )
    assert status == 70
    assert "on another machine: it is told to stop" in capsys.readouterr().err


@pytest.mark.parametrize(("age", "expected", "starts"), [(0, 1, 1), (3600, 70, 2)])
def test_a_stop_file_is_obeyed_between_two_starts(
    supervise: Supervise, tmp_path: Path, age: float, expected: int, starts: int
) -> None:
    """A stand-in crashes beside a STOP file: of its time, which the next start would remove, or of an earlier run."""
    (tmp_path / "run").mkdir()
    status = supervise(
        "import os, pathlib, sys, time\n"
        f"stop, count = pathlib.Path({str(tmp_path / 'run/STOP')!r}), pathlib.Path({str(tmp_path / 'count')!r})\n"
        "stop.touch()\n"
        f"os.utime(stop, (time.time() - {age},) * 2)\n"
        "started = int(count.read_text()) if count.exists() else 0\n"
        "count.write_text(str(started + 1))\n"
        "sys.exit(70 if started else 1)\n"
    )
    assert status == expected
    assert (tmp_path / "count").read_text() == str(starts)


def test_a_trainer_that_was_faster_is_not_stopped(supervise: Supervise, tmp_path: Path) -> None:
    """A stand-in finds the directory opened by another trainer since it looked, and is refused."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with open(run_dir / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        timer = threading.Timer(10, lock.close)  # if it was told to stop, it would
        timer.daemon = True
        timer.start()
        status = supervise(
            f"import pathlib, sys\npathlib.Path({str(run_dir / 'config.yaml')!r}).touch()\nsys.exit(2)\n"
        )
    assert status == 2
    assert not (run_dir / "STOP").exists()


def test_commands_that_cannot_be_supervised(supervise: Supervise, run_config: Path) -> None:
    with pytest.raises(UserError, match=r"no launch/train\.py in the command"):
        read_command(["deepspeed"])
    with pytest.raises(UserError, match="no config behind"):
        read_command(["deepspeed", "launch/train.py"])
    with pytest.raises(UserError, match="--resume: leave it out"):
        read_command(["deepspeed", "launch/train.py", str(run_config), "--resume"])
    with pytest.raises(UserError, match=r"--rollback: leave it out; .* set bad_steps\.rollback=true"):
        read_command(["deepspeed", "launch/train.py", str(run_config), "--rollback"])
    with pytest.raises(UserError, match="no/such/launcher: cannot be started: No such file or directory"):
        supervise("", python="no/such/launcher")
    command, config = read_command(["deepspeed", "launch/train.py", str(run_config), "run.dir=here"])
    assert command[-1] == "run.resume=auto"
    assert config.run.dir.name == "here"
