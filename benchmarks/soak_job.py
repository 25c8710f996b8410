"""What a soak is done to: a supervised run, its record as it grows, an MLflow server, a disk that can be full."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from launch.engine import free_port

ROOT = Path(__file__).resolve().parent.parent
MARK = "FLASH_SOAK"
"""Environment variable of every process of a run: by it all of them are found, whoever has become their parent."""
DISK_MIB = 48
TOKENS_PER_STEP = 2048
SAVE_STEPS, EVALUATE_STEPS = 20, 100
ENDLESS = 10**6

_ROLES = {
    "launch.supervise": "supervisor",
    "deepspeed.launcher.runner": "runner",
    "deepspeed.launcher.launch": "launcher",
    "launch/train.py": "rank",
    "launch.replay": "sender",
    "launch.system_metrics": "sampler",
}
_PIECES = 384


def role(process: psutil.Process) -> str:
    """What a process of a run is: supervisor, runner, launcher, rank, sender, sampler; other for passing ones."""
    words = [word for word in process.cmdline()[1:] if word not in ("-u", "-m")]
    return _ROLES.get(words[0], "other") if words else "other"


def marked(mark: str) -> dict[psutil.Process, str]:
    """The living processes of a soak's runs, and what they are."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found[process] = role(process)
        except (OSError, psutil.Error):
            continue
    return found


class RunLog:
    """Follows metrics.jsonl while a run writes it."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.attempt, self.step = -1, 0

    def read(self) -> "RunLog":
        """Take in what is new: `step` is the last one recorded, `attempt` the one that recorded it."""
        if self._path.exists():
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    record = json.loads(line)
                    if "samples" in record:
                        self.attempt, self.step = record["attempt"], record["step"]
        return self


class Run:
    """One run, started again and again by the supervisor, or with another number of processes by the soak."""

    def __init__(self, config: Path, run_dir: Path, logs: Path, mark: str) -> None:
        self.directory, self.mark = run_dir, mark
        self.metrics = RunLog(run_dir / "metrics.jsonl")
        self._config, self._logs = config, logs
        self._job: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self.log = logs
        self.started = time.monotonic()

    def start(self, world_size: int, overrides: Sequence[str], *, wait: float) -> None:
        """Start it; `wait` seconds after a crash the supervisor starts it again."""
        self.log = self._logs / f"{self.directory.name}-{self._starts:03d}.log"
        self._starts += 1
        command = [sys.executable, "-m", "launch.supervise", "--wait", str(wait), "--restarts", "5", "--"]
        command += [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--master_addr", "127.0.0.1"]
        command += ["--master_port", str(free_port()), "--num_accelerators", str(world_size)]
        command += ["launch/train.py", str(self._config), f"run.dir={self.directory}", *overrides]
        with open(self.log, "wb") as log:
            self._job = subprocess.Popen(
                command, cwd=ROOT, env=environment(self.mark), stdout=log, stderr=log, start_new_session=True
            )
        self.started = time.monotonic()

    @property
    def status(self) -> int | None:
        """Exit status of the supervisor, None while it runs."""
        return self._job.poll() if self._job else None

    def stop_supervisor(self) -> None:
        """End a supervisor that waits to start the run again."""
        assert self._job is not None
        self._job.send_signal(signal.SIGTERM)
        self._job.wait(60)

    def processes(self, *roles: str) -> list[psutil.Process]:
        """Its processes of these roles, or all."""
        return [process for process, found in marked(self.mark).items() if not roles or found in roles]

    def checkpoints(self) -> list[Path]:
        """Its checkpoints, oldest first."""
        return sorted((self.directory / "checkpoints").glob("step-*"))

    def saving(self) -> bool:
        """Whether a checkpoint is being written now."""
        return any((self.directory / "checkpoints").glob(".writing-*"))


def environment(mark: str) -> dict[str, str]:
    """What runs are started in."""
    return os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        MARK: mark,
    }


def replay(run_dir: Path, mark: str) -> int:
    """Send to MLflow what it does not have of a run; the exit status of that command."""
    command = [sys.executable, "-m", "launch.replay", str(run_dir)]
    return subprocess.run(command, cwd=ROOT, env=environment(mark), capture_output=True).returncode


class Disk:
    """A small file system of the soak's own, which it can fill. Needs a mount namespace of the soak's own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
        subprocess.run(mount, check=True)
        self._folder = folder
        self._filler = folder / "filler"

    def fill(self, free: int) -> None:
        """Take all room but `free` bytes."""
        with open(self._filler, "wb") as file:
            while True:
                found = os.statvfs(self._folder)
                try:
                    os.posix_fallocate(file.fileno(), 0, max(found.f_bavail * found.f_bsize - free, 1))
                    return
                except OSError as error:  # the run has just taken some of it
                    if error.errno != errno.ENOSPC:
                        raise

    def make_room(self) -> None:
        """Give it back."""
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", "--lazy", str(self._folder)], check=False)


def write_config(path: Path, data: Path, tracking: dict[str, Any]) -> Path:
    """Write the config of a small model that saves often and is validated now and then; run.dir is to be given."""
    limits = dict.fromkeys(("data", "forward", "backward", "step", "evaluate"), 20) | {"save": 30, "other": 60}
    values: dict[str, Any] = {
        "run": {"dir": "unset", "seed": 7, "name": "soak"},
        "model": {"vocab_size": _PIECES, "d_model": 64, "n_layers": 2, "qk_dim": 16, "chunk_size": 32},
        "data": {"path": str(data), "seq_len": 256, "validation": {"valid": {"path": str(data), "split": "valid"}}},
        "train": {"tokens": ENDLESS * TOKENS_PER_STEP, "tokens_per_step": TOKENS_PER_STEP, "precision": "fp32"},
        "optimizer": {"lr": 1e-3, "gradient_clip": 1.0},
        # A rate that does not know the length of the run: the soak decides that on the way.
        "schedule": {"kind": "wsd", "warmup_tokens": 10 * TOKENS_PER_STEP, "decay_tokens": 0},
        "checkpoint": {"every_tokens": SAVE_STEPS * TOKENS_PER_STEP, "keep": 3},
        "evaluate": {"every_tokens": EVALUATE_STEPS * TOKENS_PER_STEP},
        "watchdog": limits,
        "tracking": tracking,
        # Left at its default, ZeRO-3 would not partition anything as small as this model.
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def prepare_data(folder: Path) -> Path:
    """Prepare 2 MB of made-up text in which a word says much about the next; returns the dataset."""
    chance = random.Random(5)
    words = ["".join(chance.choices("aeioubdfgklmnprst", k=chance.randint(2, 7))) for _ in range(150)]
    followers = {word: chance.choices(words, k=6) for word in words}
    (folder / "text").mkdir()
    for number in range(100):
        text = [chance.choice(words)]
        for _ in range(3500):
            text.append(chance.choices(followers[text[-1]], weights=(32, 16, 8, 4, 2, 1))[0])
        (folder / "text" / f"{number:03d}.txt").write_text(" ".join(text) + ".\n")
    config = {
        "content": {
            "sources": [{"type": "text", "path": str(folder / "text")}],
            "tokenizer": {"train": {"vocab_size": _PIECES, "num_threads": 1}},
            "splits": {"valid": 0.02},
        },
        "execution": {"output": str(folder / "data"), "workers": 1},
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(config))
    with open(folder / "prepare.log", "wb") as log:
        command = [sys.executable, "-m", "pipeline.prepare", str(folder / "data.yaml")]
        subprocess.run(command, cwd=ROOT, env=environment(""), stdout=log, stderr=log, check=True)
    return folder / "data"
