"""The first process's record of a run: every number goes to metrics.jsonl; a process of its own sends it to MLflow.

Training never waits for a server and never imports MLflow: `launch.replay` follows metrics.jsonl, sends what is new and
ends when this process ends, however it ends. What a dead server missed is sent by the next start of the run, or by
`python -m launch.replay RUN_DIR`. `launch.system_metrics`, one on each node, samples the load in the same way.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from launch.bad_steps import sample_ranges
from launch.config import RunConfig
from launch.engine import Processes
from launch.records import drop_torn_line, last_record
from launch.rollback import list_rollbacks, unrecorded
from launch.run_directory import RunDirectory
from pipeline.atomic import read_json

SAMPLER_SECONDS = 5.0
PACKAGES = ("torch", "deepspeed", "triton", "numpy", "mlflow", "ray", "sentencepiece")


class Tracker:
    """Appends records to metrics.jsonl and keeps a sender process running."""

    def __init__(self, directory: RunDirectory, config: RunConfig, attempt: int) -> None:
        self._directory = directory
        self._attempt = attempt
        self._close_seconds = config.tracking.close_seconds
        self._place = {"uri": config.mlflow_store, "experiment": config.tracking.experiment}
        self._rollbacks = len(list_rollbacks(directory))
        drop_torn_line(directory.metrics)
        self._file = open(directory.metrics, "a", encoding="utf-8")  # noqa: SIM115 (open until close)
        self._sender: subprocess.Popen[bytes] | None = None
        for rollback in unrecorded(directory):
            self._write({"rollback": rollback})
        self._write({"status": "RUNNING"})
        if config.tracking.enabled:
            arguments = [str(directory.path), "--follow", str(os.getpid()), "--attempt", str(attempt)]
            self._sender = _start("launch.replay", arguments, directory, {"CUDA_VISIBLE_DEVICES": ""})

    def log(self, step: int, metrics: dict[str, float], samples: Sequence[int] | None = None) -> None:
        """Record `metrics` of `step`, and with it, in metrics.jsonl alone, the samples that it was trained on."""
        record: dict[str, Any] = {"step": step, "metrics": metrics}
        self._write(record if samples is None else record | {"samples": sample_ranges(samples)})

    def checkpoint(self, step: int, path: Path) -> None:
        """Record that the checkpoint of `step` lies at `path`."""
        self._write({"step": step, "checkpoint": str(path)})

    def text(self, step: int, path: Path) -> None:
        """Record that what the model wrote after `step` is in the file `path` of the run directory."""
        self._write({"step": step, "text": str(path.relative_to(self._directory.path))})

    def bad_step(self, step: int, found: dict[str, Any]) -> None:
        """Record what was wrong with `step`, which was not learnt from."""
        self._write({"step": step, "bad_step": found})

    def lost(self) -> None:
        """Record that the run has failed, from another thread: the one that writes the record may hang."""
        with open(self._directory.metrics, "a", encoding="utf-8") as file:
            file.write(self._line({"status": "FAILED"}))

    def close(self, status: str) -> str | None:
        """Record the final `status` (FINISHED, FAILED or KILLED); returns a message if MLflow does not have it all.

        Waits while MLflow takes what is left, `tracking.close_seconds` at most; the sender gives up on a dead server.
        """
        self._write({"status": status})
        self._file.close()
        if self._sender is None:
            return None
        try:
            failed = self._sender.wait(self._close_seconds) != 0
        except subprocess.TimeoutExpired:
            self._sender.kill()
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
        """MLflow's id of the run, once the sender has it: after a rollback that of the child run."""
        try:
            state = read_json(self._directory.tracking) or {}
        except (OSError, json.JSONDecodeError):
            return None
        here = self._place == {key: state.get(key, self._place[key]) for key in self._place}
        run_id: str | None = state.get("run_id") if here and state.get("rollbacks", 0) == self._rollbacks else None
        return run_id

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(self._line(record))
        self._file.flush()

    def _line(self, record: dict[str, Any]) -> str:
        return json.dumps({"time": round(time.time(), 3), "attempt": self._attempt, **record}) + "\n"


class NodeSampler:
    """Keeps a process running that samples the load of this node: one on each node. Made by all processes."""

    def __init__(self, directory: RunDirectory, config: RunConfig, attempt: int, processes: Processes) -> None:
        self._sampler: subprocess.Popen[bytes] | None = None
        seconds = config.tracking.system_metrics_seconds
        if not config.tracking.enabled or seconds is None:
            return
        local_ranks = processes.gather(int(os.environ["LOCAL_RANK"]))
        if local_ranks[processes.rank] != 0:
            return
        node = local_ranks[: processes.rank].count(0)
        prefix = "system/" if local_ranks.count(0) == 1 else f"system/node_{node}/"
        arguments = [str(directory.system / f"node-{node}.jsonl"), "--prefix", prefix, "--attempt", str(attempt)]
        arguments += ["--seconds", str(seconds), "--follow", str(os.getpid())]
        self._sampler = _start("launch.system_metrics", arguments, directory, {}, stdin=subprocess.PIPE)

    def close(self) -> None:
        """Take a last sample and end; nothing if that is done."""
        if self._sampler is None or self._sampler.stdin is None:
            return
        self._sampler.stdin.close()
        try:
            self._sampler.wait(SAMPLER_SECONDS)
        except subprocess.TimeoutExpired:
            self._sampler.kill()
            self._sampler.wait()
        self._sampler = None


def _start(
    module: str,
    arguments: list[str],
    directory: RunDirectory,
    variables: dict[str, str],
    stdin: int = subprocess.DEVNULL,
) -> "subprocess.Popen[bytes]":
    """Start a module of this project beside the trainer; what it says is in replay.log."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | variables
    command = [sys.executable, "-m", module, *arguments]
    with open(directory.path / "replay.log", "ab") as log:
        # A session of its own: Ctrl-C and the launcher's signals are not for it.
        return subprocess.Popen(command, stdin=stdin, stdout=log, stderr=log, env=environment, start_new_session=True)


def last_attempt(path: Path) -> int:
    """Number of the last attempt recorded in metrics.jsonl; -1 if there is none."""
    record = last_record(path)
    return -1 if record is None else int(record["attempt"])


def run_facts(config: RunConfig, datasets: list[dict[str, Any]], world_size: int) -> dict[str, Any]:
    """What MLflow shows of a run beside its metrics: parameters, environment, source and data (a list of
    `launch.datasets_used.dataset_facts`).
    """
    return {
        "name": config.run.name or config.run.dir.name,
        "experiment": config.tracking.experiment,
        "uri": config.mlflow_store,
        "parameters": flattened(config.model_dump(mode="json")),
        "datasets": datasets,
        "tags": {
            "host": platform.node(),
            "python": platform.python_version(),
            "world_size": str(world_size),
            "mlflow.source.name": "launch/train.py",  # MLflow shows the commit beside it, and not without it
            "mlflow.source.type": "LOCAL",
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
