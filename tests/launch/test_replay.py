"""Every record reaches MLflow once, in the store at once or after a server that was dead."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.bad_steps import bad_step_record
from launch.config import RunConfig, load_run_config
from launch.datasets_used import dataset_facts
from launch.engine import free_port
from launch.replay import Sender
from launch.rollback import Rollback, carry_out
from launch.run_directory import RunDirectory
from launch.tracking import Tracker, last_attempt, run_facts
from pipeline.shards import TokenDataset

DIGEST = "0123456789abcdef" * 4
GONE = {
    "context": "training",
    "name": "data/train",
    "digest": DIGEST,
    "path": "/data",
    "documents": 3,
    "tokens": 50,
    "utf8_bytes": 200,
    "bytes_per_token": 4.0,
    "vocab_size": 384,
    "sources": None,
    "dropped": {},
}
"""Facts of a dataset that is no longer where it was."""


@pytest.fixture
def config(write_config: Callable[..., Path], tmp_path: Path) -> RunConfig:
    return load_run_config(write_config(run={"dir": str(tmp_path / "run"), "name": "a run"}))


@pytest.fixture
def directory(config: RunConfig) -> RunDirectory:
    return open_directory(config)


def open_directory(config: RunConfig, dataset: dict[str, Any] = GONE) -> RunDirectory:
    directory = RunDirectory(config.run.dir)
    directory.open(config, run_facts(config, [dataset], world_size=2))
    return directory


def quiet(config: RunConfig) -> RunConfig:
    """Without a sender process: the test sends by itself."""
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": False})})


def history(directory: RunDirectory, name: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    state = json.loads(directory.tracking.read_text())
    found = MlflowClient(tracking_uri=state["uri"]).get_metric_history(state["run_id"], name)
    return sorted((metric.step, metric.value) for metric in found)


def stored_run(directory: RunDirectory) -> Any:
    from mlflow import MlflowClient

    state = json.loads(directory.tracking.read_text())
    return MlflowClient(tracking_uri=state["uri"]).get_run(state["run_id"])


def test_a_restart_repeats_steps_and_the_store_keeps_the_first(config: RunConfig, directory: RunDirectory) -> None:
    tracker = Tracker(directory, quiet(config), attempt=0)
    for step in range(1, 6):
        tracker.log(step, {"train/loss": 10.0 - step, "train/lr": 0.1})
    tracker.checkpoint(3, directory.checkpoints / "step-00000003")
    sample = directory.path / "samples/step-00000003.md"
    sample.parent.mkdir()
    sample.write_text("# Step 3")
    tracker.text(3, sample)
    sender = Sender(directory)
    assert sender.send_new()
    (sent,) = (directory.path / "artifacts").rglob("samples/step-00000003.md")
    assert sent.read_text() == "# Step 3"
    assert not sender.send_new(), "nothing was new"
    with open(directory.metrics, "a") as file:
        file.write('{"time": 1, "attempt": 0, "step": 6, "metr')  # killed while writing

    directory.close()
    directory = open_directory(config)
    assert last_attempt(directory.metrics) == 0
    tracker = Tracker(directory, quiet(config), attempt=1)
    for step in range(4, 9):
        tracker.log(step, {"train/loss": 20.0 - step})
    tracker.close("FINISHED")
    sender = Sender(directory)
    sender.send_new()
    assert history(directory, "train/loss") == [
        (1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0), (5, 5.0), (6, 14.0), (7, 13.0), (8, 12.0),
    ]  # fmt: skip

    run = stored_run(directory)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a run"
    assert run.data.params["model.d_model"] == "32"
    assert run.data.params["train.zero_stage"] == "2"
    assert run.data.tags["world_size"] == "2"
    assert run.data.tags["dataset.training.digest"] == DIGEST
    (logged,) = run.inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("data/train", DIGEST[:32])
    assert json.loads(logged.dataset.profile)["sources"] == "unknown"
    assert len(run.outputs.model_outputs) == 1
    assert (directory.path / "artifacts").is_dir()
    assert not Path("mlruns").exists()


def test_after_a_rollback_a_child_run_goes_on(config: RunConfig, directory: RunDirectory) -> None:
    tracker = Tracker(directory, quiet(config), attempt=0)
    tracker.log(1, {"train/loss": 1.0})
    tracker.log(2, {"train/loss": 2.0})
    tracker.bad_step(3, bad_step_record("loss nan", [16, 17], math.nan, {"norm": math.nan}, skipped=False))
    tracker.close("FAILED")
    Sender(directory).send_new()
    parent = stored_run(directory)
    assert json.loads(parent.data.tags["bad_step.3"])["samples"] == [16, 17]

    carry_out(directory, Rollback(0, "step-00000001", 1, (3,), ((16, 18),)))
    tracker = Tracker(directory, quiet(config), attempt=1)
    tracker.log(2, {"train/loss": 20.0})
    tracker.close("FINISHED")
    Sender(directory).send_new()
    child = stored_run(directory)
    tags = child.data.tags
    assert tags["mlflow.parentRunId"] == parent.info.run_id
    assert (tags["rollback.step"], tags["rollback.samples"]) == ("1", "16–17")
    assert child.info.status == "FINISHED"
    assert len(child.inputs.dataset_inputs) == 1
    assert history(directory, "train/loss") == [(2, 20.0)]

    # A sender that lost its place finds both runs again.
    state = json.loads(directory.tracking.read_text())
    directory.tracking.write_text(json.dumps({"uri": state["uri"], "offset": 0}))
    Sender(directory).send_new()
    assert stored_run(directory).info.run_id == child.info.run_id
    assert history(directory, "train/loss") == [(2, 20.0)]


def test_a_restart_with_another_validation_set_adds_it(config: RunConfig, directory: RunDirectory) -> None:
    Tracker(directory, quiet(config), attempt=0)
    Sender(directory).send_new()
    directory.close()
    more = GONE | {"context": "valid", "name": "other/valid", "digest": "f" * 64}
    directory.open(config, run_facts(config, [GONE, more], world_size=2))
    Tracker(directory, quiet(config), attempt=1)
    Sender(directory).send_new()
    inputs = stored_run(directory).inputs.dataset_inputs
    assert sorted((found.dataset.name, found.tags[0].value) for found in inputs) == [
        ("data/train", "training"),
        ("other/valid", "valid"),
    ]


def test_a_sender_that_died_after_sending_sends_nothing_twice(config: RunConfig, directory: RunDirectory) -> None:
    tracker = Tracker(directory, quiet(config), attempt=0)
    for step in range(1, 4):
        tracker.log(step, {"train/loss": float(step)})
    tracker.checkpoint(3, directory.checkpoints / "step-00000003")
    Sender(directory).send_new()
    state = json.loads(directory.tracking.read_text())
    directory.tracking.write_text(json.dumps({"uri": state["uri"], "offset": 0}))
    sender = Sender(directory)
    sender.send_new()
    assert json.loads(directory.tracking.read_text())["run_id"] == state["run_id"]
    assert history(directory, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert len(stored_run(directory).outputs.model_outputs) == 1


def test_a_run_that_is_killed_ends_as_killed(config: RunConfig, directory: RunDirectory, tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from launch.config import load_run_config
from launch.run_directory import RunDirectory
from launch.tracking import Tracker
config = load_run_config({str(tmp_path / "run.yaml")!r})
tracker = Tracker(RunDirectory(config.run.dir), config, 0)
tracker.log(1, {{"train/loss": 5.0}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    wait_for(lambda: directory.tracking.exists() and stored_run(directory).info.status == "KILLED", 90)
    assert history(directory, "train/loss") == [(1, 5.0)]


def test_a_server_that_is_dead_loses_nothing(
    write_config: Callable[..., Path], prepared_data: Path, tmp_path: Path
) -> None:
    """Dead when the run starts, killed while it goes on, back before it ends: the sender process sees it through.

    The data is deleted before a server was there.
    """
    from mlflow import MlflowClient

    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    config = load_run_config(write_config(run={"dir": str(tmp_path / "run")}, tracking={"uri": uri}))
    data = tmp_path / "data"
    shutil.copytree(prepared_data, data)
    directory = open_directory(config, dataset_facts("training", TokenDataset.open(data, "train")))
    began = time.monotonic()
    tracker = Tracker(directory, config, attempt=0)
    tracker.log(1, {"train/loss": 1.0})
    assert time.monotonic() - began < 5, "the trainer waited for the server"
    wait_for(lambda: "did not take the records" in (directory.path / "replay.log").read_text(), 90)
    shutil.rmtree(data)
    with server(tmp_path, port):
        wait_for(lambda: directory.tracking.exists() and history(directory, "train/loss") == [(1, 1.0)], 90)
    tracker.log(2, {"train/loss": 2.0})
    time.sleep(2)
    with server(tmp_path, port):
        tracker.log(3, {"train/loss": 3.0})
        assert tracker.close("FINISHED") is None
        assert history(directory, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
        run = stored_run(directory)
        assert run.info.status == "FINISHED"
        assert json.loads(run.inputs.dataset_inputs[0].dataset.profile)["documents"] > 0
        sent = MlflowClient(tracking_uri=uri).list_artifacts(run.info.run_id, "data/data")
        assert {artifact.path for artifact in sent} == {"data/data/card.md", "data/data/figure.png"}


@contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    """A real MLflow server over a store in `folder`, ended by SIGKILL."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder / 'server.db'}",
        "--artifacts-destination",
        str(folder / "art"),
    ]
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        wait_for(lambda: answers(port), 120)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.3)
