"""What the deepspeed launcher passes on: user errors, requests to stop, its own death, and that of processes."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

Launch = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "subprocess.Popen[str]"]
ENDLESS = 512 * 100_000


def test_a_missing_hostfile_is_an_error(launch: Launch, run_config: Path, tmp_path: Path) -> None:
    arguments = ["launch/train.py", str(run_config), f"run.dir={tmp_path / 'run'}"]
    done = launch(*arguments, options=["--hostfile", "no/such/hosts"])
    assert done.returncode == 2
    assert done.stderr.count("error: --hostfile: no/such/hosts does not exist") == 1
    assert not (tmp_path / "run").exists()


def test_mistakes_are_found_by_all_processes_and_printed_once(launch: Launch, run_config: Path, tmp_path: Path) -> None:
    done = launch("launch/train.py", str(run_config), f"run.dir={tmp_path / 'run'}", "train.tokns=5", "model.d_model=x")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "train.tokns" in done.stderr
    assert "model.d_model" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_divide_the_batch(launch: Launch, run_config: Path, tmp_path: Path) -> None:
    done = launch("launch/train.py", str(run_config), f"run.dir={tmp_path / 'run'}", processes=3)
    assert done.returncode == 2
    assert "one of 1, 2, 4 processes" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture
def start(launcher_command: Callable[[int], list[str]], launcher_environment: dict[str, str]) -> Iterator[Start]:
    """Start a launch and go on; whatever is left of it is ended after the test."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str, processes: int = 2) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [*launcher_command(processes), *arguments],
            cwd=Path(__file__).resolve().parents[2],
            env=launcher_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        for left in descendants(process.pid):
            left.kill()
        process.kill()
        process.wait()


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def ranks(pid: int) -> list[psutil.Process]:
    return [child for child in descendants(pid) if any(word == "launch/train.py" for word in child.cmdline()[:3])]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def steps_recorded(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().count('"train/loss"') if metrics.exists() else 0


def last_status(run_dir: Path) -> str:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [str(record["status"]) for record in records if "status" in record][-1]


def newest_manifest(run_dir: Path) -> dict[str, int]:
    name = (run_dir / "checkpoints/latest").read_text().strip()
    manifest: dict[str, int] = json.loads((run_dir / "checkpoints" / name / "manifest.json").read_text())
    return manifest


def test_a_signal_to_one_rank_saves_and_a_dead_launcher_does_too(
    start: Start, run_config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["launch/train.py", str(run_config), f"run.dir={run_dir}", f"train.tokens={ENDLESS}"]
    arguments.append(f"checkpoint.copy_to={tmp_path / 'copies'}")
    first = start(*arguments)
    wait_for(lambda: steps_recorded(run_dir) >= 3)
    second_rank = next(process for process in ranks(first.pid) if "--local_rank=1" in process.cmdline())
    second_rank.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 75, output
    assert "stopping: received SIGTERM" in output
    saved = newest_manifest(run_dir)
    assert saved["step"] == steps_recorded(run_dir) >= 3
    assert not (run_dir / "DONE").exists()
    assert "not copied" not in output
    (copy,) = (tmp_path / "copies").iterdir()
    assert json.loads((copy / "manifest.json").read_text())["step"] == saved["step"]

    second = start(*arguments, "--resume")
    wait_for(lambda: steps_recorded(run_dir) >= saved["step"] + 3)
    processes = ranks(second.pid)
    assert len(processes) == 2
    (launcher,) = [p for p in descendants(second.pid) if "deepspeed.launcher.launch" in p.cmdline()]
    os.kill(launcher.pid, signal.SIGKILL)
    wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes))
    output, _ = second.communicate(timeout=60)
    assert re.search(r"continuing from step-0*" + str(saved["step"]), output)
    assert "stopping: the launcher is gone" in output
    assert newest_manifest(run_dir)["step"] == steps_recorded(run_dir) > saved["step"]


def no_process_left(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def test_a_process_that_hangs_ends_the_job_with_its_phase_and_everyones_stacks(
    start: Start, run_config: Path, tmp_path: Path
) -> None:
    limits = ["watchdog.forward=4", "watchdog.backward=60"]
    overrides = [f"run.dir={tmp_path / 'run'}", *limits]
    case = {"config": str(run_config), "overrides": overrides, "action": "train", "spoil": {"24": "hang"}}
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    job = start("tests/distributed/driver.py", str(tmp_path / "cases.json"))
    wait_for(lambda: steps_recorded(tmp_path / "run") == 3)
    processes, began = descendants(job.pid), time.monotonic()
    output, _ = job.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert job.returncode == 71, output
    assert re.search(
        r"error: rank 1 \(pid \d+ on .+\) has been silent in phase forward for [4-9] s; allowed: 4 s", output
    )
    assert output.count("has been silent") == 1
    stacks = dict(re.findall(r"rank (\d) .* in phase (\w+), its threads:\n", output))
    assert stacks == {"0": "backward", "1": "forward"}
    assert re.search(r'driver.py", line \d+ in spoil', output)
    assert last_status(tmp_path / "run") == "FAILED"
    assert no_process_left(processes)


def test_a_process_that_fails_ends_the_job_with_its_name_and_error(
    start: Start, run_config: Path, tmp_path: Path
) -> None:
    case = {"config": str(run_config), "overrides": [f"run.dir={tmp_path / 'run'}"], "action": "train"}
    (tmp_path / "cases.json").write_text(json.dumps([case | {"spoil": {"24": "fail"}}]))
    job = start("tests/distributed/driver.py", str(tmp_path / "cases.json"))
    wait_for(lambda: steps_recorded(tmp_path / "run") == 3)
    processes, began = descendants(job.pid), time.monotonic()
    output, _ = job.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert job.returncode in (1, 71), output
    assert re.search(r"error: rank 1 \(.+\) failed in phase forward: RuntimeError: made up; the job ends", output)
    assert "Traceback" in output
    assert no_process_left(processes)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_that_one_process_alone_finds_ends_the_job(
    start: Start, run_config: Path, tmp_path: Path, rank: int
) -> None:
    """The other one waits for it in a collective."""
    case = {"config": str(run_config), "overrides": [f"run.dir={tmp_path / 'run'}"], "action": "train"}
    (tmp_path / "cases.json").write_text(
        json.dumps([case | {"out_of_memory": rank, "message": str(tmp_path / "message")}])
    )
    job = start("tests/distributed/driver.py", str(tmp_path / "cases.json"))
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 2, output
    assert "Traceback" not in output
    if rank:
        assert output.count("error: ") == 1
        assert re.search(r"error: rank 1 \(.+\): train: out of memory in a first step", output)
    else:
        assert "out of memory" in (tmp_path / "message").read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_stopped_is_woken_for_its_stacks_and_ended(
    start: Start, run_config: Path, tmp_path: Path, rank: int
) -> None:
    limits = [f"watchdog.{phase}=6" for phase in ("data", "forward", "backward", "step")]
    arguments = ["launch/train.py", str(run_config), f"run.dir={tmp_path / 'run'}", f"train.tokens={ENDLESS}"]
    job = start(*arguments, *limits)
    wait_for(lambda: steps_recorded(tmp_path / "run") >= 3)
    processes = descendants(job.pid)
    victim = next(process for process in ranks(job.pid) if f"--local_rank={rank}" in process.cmdline())
    began = time.monotonic()
    victim.send_signal(signal.SIGSTOP)
    output, _ = job.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert job.returncode == 71, output
    assert f"error: rank {rank} (pid {victim.pid} on " in output
    assert "has been silent in phase " in output
    assert set(re.findall(r"rank (\d) .* its threads:\n", output)) == {"0", "1"}
    assert no_process_left(processes)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_job_at_once_with_its_name(
    start: Start, run_config: Path, tmp_path: Path, rank: int
) -> None:
    job = start("launch/train.py", str(run_config), f"run.dir={tmp_path / 'run'}", f"train.tokens={ENDLESS}")
    wait_for(lambda: steps_recorded(tmp_path / "run") >= 3)
    processes = descendants(job.pid)
    victim = next(process for process in ranks(job.pid) if f"--local_rank={rank}" in process.cmdline())
    began = time.monotonic()
    victim.kill()
    output, _ = job.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert job.returncode not in (0, 2, 70, 75), output
    assert f"error: rank {rank} (pid {victim.pid} on " in output
    assert "is gone: killed" in output
    # The first process cannot say how it ended; then its sender does.
    assert last_status(tmp_path / "run") == ("FAILED" if rank else "RUNNING")
    assert no_process_left(processes)
