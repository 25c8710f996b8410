"""A real MLflow server dies, and so do senders: every point is in its database afterwards, and none twice."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import replay as replay_module
from launch.config import RunConfig, load_run_config
from launch.datasets_used import dataset_facts
from launch.engine import Alone
from launch.replay import Sender, replay
from launch.run_directory import RunDirectory
from launch.tracking import NodeSampler, Tracker, run_facts
from pipeline.errors import UserError
from pipeline.shards import TokenDataset
from tests.launch.mlflow_server import Cut, Proxy, Server, wait_for

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "pass-word-4711"
TOKEN = "token-4711"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Not started: a test finds it dead or alive, as the one before left it."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server)
    yield proxy
    proxy.close()


def state(directory: RunDirectory) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(directory.tracking.read_text()) if directory.tracking.exists() else {}
    return found


def stored_points(server: Server, directory: RunDirectory) -> list[tuple[object, ...]]:
    return server.stored("key, step, value", "metrics", state(directory).get("run_id", ""))


def recorded_points(*files: Path) -> list[tuple[str, int, float]]:
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted((k, r["step"], v) for r in records for k, v in r.get("metrics", {}).items())


def stored_status(server: Server, directory: RunDirectory) -> object:
    ((status,),) = server.stored("status", "runs", state(directory)["run_id"])
    return status


def test_a_server_that_is_dead_loses_nothing(
    write_config: Callable[..., Path],
    prepared_data: Path,
    tmp_path: Path,
    server: Server,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dead when the run starts, killed while it goes on, back before it ends: the sender process sees it through.

    The data is deleted before a server was there. All the time the server wants a password, which nobody writes down.
    """
    basic = base64.b64encode(f"somebody:{PASSWORD}".encode()).decode()
    proxy.authorization = f"Basic {basic}"
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "somebody")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    monkeypatch.setenv("LOCAL_RANK", "0")
    tracking = {"uri": proxy.uri, "system_metrics_seconds": 0.2}
    config = load_run_config(write_config(run={"dir": str(tmp_path / "run")}, tracking=tracking))
    data = tmp_path / "data"
    shutil.copytree(prepared_data, data)
    directory = RunDirectory(config.run.dir)
    directory.open(config, run_facts(config, [dataset_facts("training", TokenDataset.open(data, "train"))], 2))
    began = time.monotonic()
    tracker, sampler = Tracker(directory, config, attempt=0), NodeSampler(directory, config, 0, Alone())
    tracker.log(1, {"train/loss": 1.0})
    assert time.monotonic() - began < 5, "the trainer waited for the server"
    wait_for(lambda: "did not take the records" in (directory.path / "replay.log").read_text(), 90)
    shutil.rmtree(data)

    server.start()
    wait_for(lambda: ("train/loss", 1, 1.0) in stored_points(server, directory), 90)
    assert tracker.run_id == state(directory)["run_id"]
    server.kill()
    tracker.log(2, {"train/loss": 2.0})
    time.sleep(2)
    server.start()
    tracker.log(3, {"train/loss": 3.0})
    sampler.close()
    assert tracker.close("FINISHED") is None

    points = stored_points(server, directory)
    assert points == recorded_points(directory.metrics, directory.system / "node-0.jsonl")
    assert [step for key, step, _ in points if key == "train/loss"] == [1, 2, 3]
    samples = [step for key, step, _ in points if key == "system/cpu_utilization_percentage"]
    assert samples == list(range(len(samples)))
    assert len(samples) > 15, "the load was not sampled while the server was dead"
    assert stored_status(server, directory) == "FINISHED"
    run_id = state(directory)["run_id"]
    folders = [path for path in (server.folder / "artifacts").rglob(run_id) if path.is_dir()]
    assert {"card.md", "figure.png"} <= {path.name for folder in folders for path in folder.rglob("data/data/*")}
    assert holding(PASSWORD, directory.path, server.folder) == []
    assert holding(basic, directory.path, server.folder) == []

    # A server behind a token, which the same run's next attempt gives.
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    proxy.authorization = f"Bearer {TOKEN}"
    before = proxy.refused
    directory.close()
    directory.open(config, run_facts(config, [], 4))
    Tracker(directory, untracked(config), attempt=1).close("FAILED")
    Sender(directory).send_new()
    assert proxy.refused == before
    assert state(directory)["run_id"] == run_id, "another world size is the same run"
    assert stored_status(server, directory) == "FAILED"
    assert ("world_size", "4") in server.stored("key, value", "tags", run_id)
    assert holding(TOKEN, directory.path, server.folder) == []


def test_answers_that_are_lost_and_senders_that_die_double_nothing(
    write_config: Callable[..., Path], tmp_path: Path, server: Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_run_config(write_config(run={"dir": str(tmp_path / "run")}, tracking={"uri": proxy.uri}))
    directory = backlog(config, steps=900)
    expected = recorded_points(directory.metrics, directory.system / "node-0.jsonl")
    assert len(expected) == 900 * 8 + 300 * 2

    # The server stores the third batch, and dies before it says so; then the sender dies.
    server.start()
    happened = at_batch(3, lambda: server.kill())
    proxy.after = happened
    sender = start_replay(directory)
    assert happened.done.wait(90)
    end(sender)
    assert 0 < len(stored_points(server, directory)) < len(expected)

    # Meanwhile a run ends while the server is dead. It is not waited for any longer than it may take.
    other_config = load_run_config(
        write_config(run={"dir": str(tmp_path / "other")}, tracking={"uri": proxy.uri, "close_seconds": 0.5})
    )
    other = RunDirectory(other_config.run.dir)
    other.open(other_config, run_facts(other_config, [], 1))
    tracker = Tracker(other, other_config, attempt=0)
    tracker.log(1, {"train/loss": 1.0})
    message = tracker.close("FINISHED")
    other.close()
    assert message is not None
    assert f"python -m launch.replay {other.path} sends them" in message

    # The second sender loses an answer, and a third one wants to send at the same time.
    server.start()

    def start_another() -> None:
        monkeypatch.setattr(sys, "argv", ["launch.replay", str(directory.path)])
        with pytest.raises(UserError, match="being sent by another process"):
            replay_module.main()

    happened = at_batch(1, start_another)
    proxy.after = happened
    sender = start_replay(directory)
    assert sender.wait(120) == 0
    assert happened.done.is_set()
    assert stored_points(server, directory) == expected
    assert stored_status(server, directory) == "KILLED", "its trainer is gone, and did not say how"

    # One that lost its place sends everything again, and the store has it once.
    proxy.after = None
    directory.tracking.unlink()
    assert replay(directory) == 0
    assert stored_points(server, directory) == expected

    assert replay(other) == 0
    assert stored_points(server, other) == [("train/loss", 1, 1.0)]
    assert stored_status(server, other) == "FINISHED"


def backlog(config: RunConfig, steps: int) -> RunDirectory:
    """A run whose trainer is gone, with all its points unsent."""
    directory = RunDirectory(config.run.dir)
    directory.open(config, run_facts(config, [], 1))
    tracker = Tracker(directory, untracked(config), attempt=0)
    for step in range(1, steps + 1):
        tracker.log(step, {f"train/metric_{number}": step + number / 8 for number in range(8)})
    directory.system.mkdir()
    with open(directory.system / "node-0.jsonl", "w") as file:
        for step in range(300):
            metrics = {"system/cpu_utilization_percentage": step / 3, "system/gpu_0_utilization_percentage": 90.0}
            file.write(json.dumps({"time": 1e9 + step, "attempt": 0, "step": step, "metrics": metrics}) + "\n")
    directory.close()
    return directory


def untracked(config: RunConfig) -> RunConfig:
    """Without a sender process."""
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": False})})


class at_batch:  # noqa: N801
    """At the given batch of metrics: does something, and cuts the connection; what follows is passed on."""

    def __init__(self, number: int, action: Callable[[], None]) -> None:
        self._left, self._action = number, action
        self.done = threading.Event()

    def __call__(self, path: str, body: bytes) -> None:
        self._left -= path.endswith("log-batch") and b'"key": "train/' in body
        if self._left == 0 and not self.done.is_set():
            self._action()
            self.done.set()
            raise Cut


def start_replay(directory: RunDirectory) -> "subprocess.Popen[bytes]":
    with open(directory.path / "replay.log", "ab") as log:
        command = [sys.executable, "-m", "launch.replay", str(directory.path)]
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def end(process: "subprocess.Popen[bytes]") -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def holding(secret: str, *folders: Path) -> list[Path]:
    """Files that hold a secret."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if secret.encode() in path.read_bytes()]
