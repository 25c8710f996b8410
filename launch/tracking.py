"""The first process's record of a run: every number goes to metrics.jsonl; a process of its own sends it to MLflow.

Training never waits for a server and never imports MLflow: `launch.replay` follows metrics.jsonl, sends what is new and
ends when this process ends, however it ends. What a dead server missed is sent by the next start of the run, or by
`python -m launch.replay RUN_DIR`.
"""

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from launch.config import RunConfig
from launch.rollback import unrecorded
from launch.run_directory import RunDirectory

CLOSE_TIMEOUT = 60.0
PACKAGES = ("torch", "deepspeed", "triton", "numpy", "mlflow", "ray", "sentencepiece")


class Tracker:
    """Appends records to metrics.jsonl and keeps a sender process running."""

    def __init__(self, directory: RunDirectory, config: RunConfig, attempt: int) -> None:
        self._directory = directory
        self._attempt = attempt
        _drop_torn_line(directory.metrics)
        self._file = open(directory.metrics, "a", encoding="utf-8")  # noqa: SIM115 (open until close)
        self._sender: subprocess.Popen[bytes] | None = None
        psutil.cpu_percent()
        for rollback in unrecorded(directory):
            self._write({"rollback": rollback})
        self._write({"status": "RUNNING"})
        if config.tracking.enabled:
            command = [sys.executable, "-m", "launch.replay", str(directory.path), "--follow", str(os.getpid())]
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "CUDA_VISIBLE_DEVICES": "",
            }
            with open(directory.path / "replay.log", "ab") as log:
                # A session of its own: Ctrl-C and the launcher's signals are not for the sender.
                self._sender = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
                )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record `metrics` of `step`."""
        self._write({"step": step, "metrics": metrics})

    def checkpoint(self, step: int, path: Path) -> None:
        """Record that the checkpoint of `step` lies at `path`."""
        self._write({"step": step, "checkpoint": str(path)})

    def text(self, step: int, path: Path) -> None:
        """Record that what the model wrote after `step` is in the file `path` of the run directory."""
        self._write({"step": step, "text": str(path.relative_to(self._directory.path))})

    def bad_step(self, step: int, found: dict[str, Any]) -> None:
        """Record what was wrong with `step`, which was not learnt from."""
        self._write({"step": step, "bad_step": found})

    def close(self, status: str) -> str | None:
        """Record the final `status` (FINISHED, FAILED or KILLED); returns a message if MLflow does not have it all."""
        self._write({"status": status})
        self._file.close()
        if self._sender is None:
            return None
        try:
            failed = self._sender.wait(CLOSE_TIMEOUT) != 0
        except subprocess.TimeoutExpired:
            self._sender.terminate()
            self._sender.wait()
            failed = True
        if not failed:
            return None
        return (
            f"MLflow did not take all records (see {self._directory.path / 'replay.log'}); they are kept: "
            f"python -m launch.replay {self._directory.path} sends them"
        )

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, once the sender has it."""
        try:
            run_id: str | None = json.loads(self._directory.tracking.read_text()).get("run_id")
        except (OSError, json.JSONDecodeError):
            return None
        return run_id

    def _write(self, record: dict[str, Any]) -> None:
        record = {"time": round(time.time(), 3), "attempt": self._attempt, **record}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line that a killed process left without its end."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)


def last_attempt(path: Path) -> int:
    """Number of the last attempt recorded in metrics.jsonl; -1 if there is none."""
    if not path.exists():
        return -1
    attempts = [-1]
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                attempts.append(json.loads(line)["attempt"])
    return max(attempts)


def system_metrics() -> dict[str, float]:
    """Load of this machine now, under MLflow's names for system metrics."""
    memory = psutil.virtual_memory()
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_percentage": memory.percent,
        "system/process_memory_megabytes": psutil.Process().memory_info().rss / 1e6,
    }


def run_facts(config: RunConfig, datasets: list[dict[str, Any]], world_size: int) -> dict[str, Any]:
    """What MLflow shows of a run beside its metrics: parameters, environment, source and data (a list of
    `launch.datasets_used.dataset_facts`).
    """
    return {
        "name": config.run.name or config.run.dir.name,
        "experiment": config.tracking.experiment,
        "uri": config.tracking.uri or f"sqlite:///{config.run.dir / 'mlflow.db'}",
        "parameters": flattened(config.model_dump(mode="json")),
        "datasets": datasets,
        "tags": {
            "host": platform.node(),
            "python": platform.python_version(),
            "world_size": str(world_size),
            **{f"version.{name}": version for name in PACKAGES if (version := _version(name))},
            **_git_tags(),
        },
    }


def flattened(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as one mapping with dotted keys; leaves as text."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flattened(inner, f"{prefix}{key}.").items()}
    return {prefix[:-1]: json.dumps(value) if isinstance(value, list) else str(value)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_tags() -> dict[str, str]:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {
            "mlflow.source.git.commit": git("rev-parse", "HEAD"),
            "git.dirty": str(bool(git("status", "--porcelain"))),
        }
    except (OSError, subprocess.CalledProcessError):
        return {}
