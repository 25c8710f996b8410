"""Every record reaches MLflow once, in the store at once or after a server that was dead."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.bad_steps import bad_step_record
from launch.config import RunConfig, load_run_config
from launch.replay import Sender
from launch.rollback import Rollback, carry_out
from launch.run_directory import RunDirectory
from launch.tracking import Tracker, last_attempt, run_facts
from tests.launch.mlflow_server import wait_for

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


def parent_steps(directory: RunDirectory, run_id: str, name: str) -> list[int]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=json.loads(directory.tracking.read_text())["uri"])
    return sorted(metric.step for metric in client.get_metric_history(run_id, name))


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
        tracker.log(step, {"train/loss": 20.0 - step, "train/tokens": 512.0 * step})
    tracker.close("FINISHED")
    with open(directory.metrics, "a") as file:
        file.write('{"time": 1, "attempt": 2, "sta')  # the next attempt begins to write
    sender = Sender(directory)
    sender.send_new()
    assert list((directory.path / "artifacts").rglob("figures/loss.png"))
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


def with_store(config: RunConfig, run_dir: Path, store: Path) -> RunConfig:
    tracking = config.tracking.model_copy(update={"uri": f"sqlite:///{store}", "enabled": False})
    run = config.run.model_copy(update={"dir": run_dir})
    return config.model_copy(update={"run": run, "tracking": tracking})


def test_runs_that_share_a_file_keep_their_artifacts_beside_it_and_it_can_be_moved(
    config: RunConfig, tmp_path: Path
) -> None:
    store, moved = tmp_path / "mlflow.db", tmp_path / "moved.db"
    for name in ("first", "second"):
        shared = with_store(config, tmp_path / name, store)
        directory = open_directory(shared)
        tracker = Tracker(directory, shared, attempt=0)
        tracker.log(1, {"train/loss": 4.0})
        tracker.close("FINISHED")
        directory.close()
        Sender(directory).send_new()
    sent = {path.read_text() for path in (tmp_path / "artifacts").rglob("config.yaml")}
    assert sent == {(tmp_path / name / "config.yaml").read_text() for name in ("first", "second")}

    before = json.loads(directory.tracking.read_text())["run_id"]
    store.rename(moved)
    shared = with_store(config, tmp_path / "second", moved)
    tracker = Tracker(open_directory(shared), shared, attempt=1)
    assert tracker.run_id is None, "whether the other store has the run is not known yet"
    tracker.log(2, {"train/loss": 3.0})
    tracker.close("FINISHED")
    Sender(directory).send_new()
    assert tracker.run_id == before
    assert history(directory, "train/loss") == [(1, 4.0), (2, 3.0)]
    assert not store.exists()

    directory.facts.write_text(directory.facts.read_text().replace(config.tracking.experiment, "another"))
    Sender(directory).send_new()
    assert json.loads(directory.tracking.read_text())["run_id"] != before
    assert history(directory, "train/loss") == [(1, 4.0), (2, 3.0)]


def test_records_are_sent_where_files_cannot_be(
    config: RunConfig, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As from a run that has moved to a machine without the place where its store was made."""
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/elsewhere")

    for name in ("log_artifact", "log_artifacts"):
        monkeypatch.setattr(LocalArtifactRepository, name, refuse)
    tracker = Tracker(directory, quiet(config), attempt=0)
    tracker.log(1, {"train/loss": 4.0, "train/tokens": 512.0})
    tracker.checkpoint(1, directory.checkpoints / "step-00000001")
    tracker.close("FINISHED")
    sender = Sender(directory)
    sender.send_new()
    assert not sender.send_new()
    assert history(directory, "train/loss") == [(1, 4.0)]
    run = sender._client.get_run(str(tracker.run_id))
    assert (run.info.status, len(run.outputs.model_outputs)) == ("FINISHED", 1)
    assert len([line for line in caplog.messages if "cannot be written: [Errno 13] Permission denied" in line]) == 3


def test_after_a_rollback_a_child_run_goes_on(config: RunConfig, directory: RunDirectory) -> None:
    directory.system.mkdir()

    def sample(attempt: int, step: int) -> None:
        record = {"time": 1e9 + step, "attempt": attempt, "step": step, "metrics": {"system/load": float(step)}}
        with open(directory.system / "node-0.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    tracker = Tracker(directory, quiet(config), attempt=0)
    tracker.log(1, {"train/loss": 1.0})
    tracker.log(2, {"train/loss": 2.0})
    tracker.bad_step(3, bad_step_record("loss nan", [16, 17], math.nan, {"norm": math.nan}, skipped=False))
    tracker.close("FAILED")
    sample(0, 0)
    Sender(directory).send_new()
    sample(0, 1)
    parent = stored_run(directory)
    assert tracker.run_id == parent.info.run_id
    assert json.loads(parent.data.tags["bad_step.3"])["samples"] == [16, 17]

    carry_out(directory, Rollback(0, "step-00000001", 1, (3,), ((16, 18),)))
    tracker = Tracker(directory, quiet(config), attempt=1)
    assert tracker.run_id is None, "checkpoints of the child would name its parent"
    tracker.log(2, {"train/loss": 20.0})
    tracker.close("FINISHED")
    sample(1, 2)
    Sender(directory).send_new()
    child = stored_run(directory)
    assert tracker.run_id == child.info.run_id != parent.info.run_id
    assert history(directory, "system/load") == [(2, 2.0)]
    assert parent_steps(directory, parent.info.run_id, "system/load") == [0, 1]
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
    facts = json.loads(directory.facts.read_text())
    facts["parameters"]["train.tokens"] = "changed by a restart"
    directory.facts.write_text(json.dumps(facts))
    sender = Sender(directory)
    sender.send_new()
    assert json.loads(directory.tracking.read_text())["run_id"] == state["run_id"]
    assert history(directory, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert len(stored_run(directory).outputs.model_outputs) == 1


def test_a_run_that_is_killed_ends_as_killed(config: RunConfig, directory: RunDirectory, tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
import time
from launch.config import load_run_config
from launch.run_directory import RunDirectory
from launch.tracking import NodeSampler, Tracker
from launch.engine import Alone
config = load_run_config({str(tmp_path / "run.yaml")!r}, ["tracking.system_metrics_seconds=0.1"])
directory = RunDirectory(config.run.dir)
tracker, sampler = Tracker(directory, config, 0), NodeSampler(directory, config, 0, Alone())
tracker.log(1, {{"train/loss": 5.0}})
time.sleep(1)  # a step that hangs
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"LOCAL_RANK": "0"}
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=environment)
    assert killed.returncode == -signal.SIGKILL
    wait_for(lambda: directory.tracking.exists() and stored_run(directory).info.status == "KILLED", 90)
    assert history(directory, "train/loss") == [(1, 5.0)]
    samples = [json.loads(line) for line in (directory.system / "node-0.jsonl").read_text().splitlines()]
    assert len(samples) > 5, "the load of a trainer that hangs was not sampled"
    name = "system/system_memory_usage_percentage"
    assert history(directory, name) == [(sample["step"], sample["metrics"][name]) for sample in samples]
    assert abs(stored_run(directory).info.end_time / 1000 - samples[-1]["time"]) < 1
