"""Send a run's records to MLflow: `python -m launch.replay RUN_DIR`.

Records are metrics.jsonl and system/*.jsonl. How far it came is kept in RUN_DIR/tracking.json, and of every metric only
steps behind the last one that the store has are sent, so it does not matter how often this is called, or where it was
interrupted. A point has the time of its record: even one that two requests carry is one row of MLflow's database.
"""

import argparse
import errno
import fcntl
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.bad_steps import describe_ranges
from launch.datasets_used import dataset_entity, folder_names, keep_cards
from launch.records import batches, last_record
from launch.run_directory import RunDirectory
from pipeline.atomic import read_json, write_json
from pipeline.errors import UserError, run_command

BATCH = 1000
"""MLflow takes at most 1,000 metrics and 100 parameters or tags at once."""
POLL_SECONDS = 1.0
RETRY_SECONDS = 5.0
PATIENCE_SECONDS = 10.0
"""How long a server may have been dead once the run has ended, before it is given up."""
REPEAT_SECONDS = 600.0
"""How often it is said again that a server is dead."""
NICENESS = 10
"""The sender's share of a processor that training wants too: about a tenth."""

FINAL = ("FINISHED", "FAILED", "KILLED")

logger = logging.getLogger("launch.replay")


class Sender:
    """Carries one run's records, in order, from its directory to an MLflow store.

    last_attempt: leaves later attempts to their own senders; default: all.
    advances: how often it has made headway.
    """

    def __init__(self, directory: RunDirectory, last_attempt: int | None = None) -> None:
        # MLflow's own retries take minutes, say nothing, and create a run a second time; this module has its own.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        import mlflow

        self._directory = directory
        self._last_attempt = last_attempt
        self._facts: dict[str, Any] = json.loads(directory.facts.read_text())
        place = {key: self._facts[key] for key in ("uri", "experiment")}
        self._state: dict[str, Any] = {**place, "offset": 0, "attempt": -1, "system": {}}
        saved = read_json(directory.tracking) or {}
        # Another place, or the run's directory has moved and its own store with it: all is sent that is not there.
        if place == {key: saved.get(key, place[key]) for key in place}:
            self._state |= saved
        mlflow.set_tracking_uri(self._state["uri"])
        self._client = mlflow.MlflowClient()
        self._stored: dict[str, int] | None = None
        self.advances = 0

    def send_new(self) -> bool:
        """Send what was appended since the last call; True if there was anything. Raises MLflow's errors."""
        try:
            moved = self._send_records()
            return self._send_samples(self._state["attempt"]) or moved
        except Exception:
            self._stored = None  # the store may have what it did not say that it has
            raise

    def _send_records(self) -> bool:
        moved = False
        for records, end in batches(self._directory.metrics, self._state["offset"], BATCH):
            attempt = records[0]["attempt"]
            if self._last_attempt is not None and attempt > self._last_attempt:
                break
            if not moved:
                self._log_datasets(self._run_id())
            if "metrics" in records[0]:
                self._send_metrics(records)
            else:
                self._send_event(records[0])
            self._advance(offset=end, attempt=attempt)
            moved = True
        return moved

    def _send_samples(self, attempt: int) -> bool:
        """Send what the nodes' load was in attempts up to `attempt`: later ones may belong to another run."""
        moved = False
        for path in sorted(self._directory.system.glob("*.jsonl")):
            for records, end in batches(path, self._state["system"].get(path.name, 0), BATCH):
                if records[0]["attempt"] > attempt:
                    break
                self._send_metrics(records)
                self._advance(system={**self._state["system"], path.name: end})
                moved = True
        return moved

    def _advance(self, **changes: Any) -> None:
        self.advances += 1
        self._state |= changes
        write_json(self._directory.tracking, self._state)

    def _run_id(self) -> str:
        """The id of the run, or of its newest child; on first use the run is created."""
        if "run_id" not in self._state:
            self._advance(run_id=self._open_run(self._facts["uid"], self._facts["name"], {}))
        return str(self._state["run_id"])

    def _begin_child(self, parent: str, rollback: dict[str, Any]) -> None:
        """After a rollback steps come again with other values: they are a run of their own."""
        number = rollback["number"]
        tags = {
            "mlflow.parentRunId": parent,
            "rollback.step": str(rollback["step"]),
            "rollback.bad_steps": json.dumps(rollback["bad_steps"]),
            "rollback.samples": describe_ranges(rollback["samples"])[:5000],
        }
        name = f"{self._facts['name']}, rollback {number}"
        child = self._open_run(f"{self._facts['uid']}-{number}", name, tags)
        self._stored = None
        self._advance(run_id=child, rollbacks=number, datasets=[])
        self._log_datasets(child)

    def _open_run(self, uid: str, name: str, tags: dict[str, str]) -> str:
        """The id of a new run, or of the one that an earlier sender created just before it died."""
        from mlflow.entities import Param

        facts = self._facts
        experiment = self._client.get_experiment_by_name(facts["experiment"])
        if experiment is None:
            # A server says itself where artifacts lie. Those of a file lie beside it: other runs may share it.
            kind, _, file = str(self._state["uri"]).partition(":///")
            artifacts = (Path(file).absolute().parent / "artifacts").as_uri() if kind == "sqlite" else None
            experiment_id = self._client.create_experiment(facts["experiment"], artifact_location=artifacts)
        else:
            experiment_id = experiment.experiment_id
        found = self._client.search_runs([experiment_id], f"tags.uid = '{uid}'", max_results=1)
        if found:
            run = found[0]
        else:
            tags = {"uid": uid, "run_directory": str(self._directory.path), **tags}
            run = self._client.create_run(experiment_id, run_name=name, tags=tags)
        run_id = str(run.info.run_id)
        # MLflow refuses to change one: those of the first start stay.
        new = {key: value for key, value in facts["parameters"].items() if key not in run.data.params}
        parameters = [Param(key, value[:6000]) for key, value in new.items()]
        for start in range(0, len(parameters), 100):
            self._client.log_batch(run_id, params=parameters[start : start + 100])
        return run_id

    def _log_start(self, run_id: str) -> None:
        """What a restart may have changed, and that the run goes on."""
        from mlflow.entities import RunTag

        self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in self._facts["tags"].items()])
        self._send_files(self._client.log_artifact, run_id, str(self._directory.config))
        self._client.update_run(run_id, status="RUNNING")

    def _log_datasets(self, run_id: str) -> None:
        """One input for each use of a dataset; a restart may have brought others."""
        from mlflow.entities import DatasetInput, InputTag, RunTag

        uses = {f"{d['context']} {d['name']} {d['digest']}": d for d in self._facts["datasets"]}
        new = {use: dataset for use, dataset in uses.items() if use not in self._state.get("datasets", ())}
        if not new:
            return
        for start in range(0, len(new), 100):
            part = list(new.values())[start : start + 100]
            inputs = [DatasetInput(dataset_entity(d), [InputTag("mlflow.data.context", d["context"])]) for d in part]
            self._client.log_inputs(run_id, datasets=inputs)
            tags = [RunTag(f"dataset.{d['context']}.digest", d["digest"]) for d in part]
            self._client.log_batch(run_id, tags=tags)
        names = folder_names(self._facts["datasets"])
        for name in dict.fromkeys(names[dataset["digest"]] for dataset in new.values()):
            if (folder := self._directory.data / name).is_dir():
                self._send_files(self._client.log_artifacts, run_id, str(folder), f"data/{name}")
        self._advance(datasets=[*self._state.get("datasets", ()), *new])

    def _send_metrics(self, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        run_id = self._run_id()
        stored = self._stored_steps(run_id)
        metrics = []
        for record in records:
            step, milliseconds = record["step"], int(record["time"] * 1000)
            for name, value in record["metrics"].items():
                if step > stored.get(name, -1):
                    metrics.append(Metric(name, value, milliseconds, step))
                    stored[name] = step
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + BATCH])

    def _stored_steps(self, run_id: str) -> dict[str, int]:
        """The last step of each metric that the store has: one request, however long the run is."""
        if self._stored is None:
            # The public `metrics` leaves the steps out; a batch and these are one transaction of the store.
            latest = self._client.get_run(run_id).data._metric_objs
            self._stored = {metric.key: metric.step for metric in latest}
        return self._stored

    def _send_event(self, record: dict[str, Any]) -> None:
        run_id = self._run_id()
        if "checkpoint" in record:
            self._register_checkpoint(run_id, record)
        elif "rollback" in record:
            self._send_samples(record["attempt"] - 1)
            self._begin_child(run_id, record["rollback"])
        elif "text" in record:
            if (path := self._directory.path / record["text"]).exists():
                self._send_files(self._client.log_artifact, run_id, str(path), "samples")
        elif "bad_step" in record:
            self._client.set_tag(run_id, f"bad_step.{record['step']}", json.dumps(record["bad_step"])[:5000])
        elif record["status"] == "RUNNING":
            self._log_start(run_id)
        else:
            self._log_figure(run_id)
            self._end(run_id, record["status"], record["time"])

    def end_killed(self) -> None:
        """Record that the run ended without a word, as after SIGKILL, when its last record or sample was written."""
        files = [self._directory.metrics, *self._directory.system.glob("*.jsonl")]
        self._end(self._run_id(), "KILLED", max(record["time"] for file in files if (record := last_record(file))))

    def _end(self, run_id: str, status: str, seconds: float) -> None:
        self._client.set_terminated(run_id, status=status, end_time=int(seconds * 1000))

    def _register_checkpoint(self, run_id: str, record: dict[str, Any]) -> None:
        import mlflow
        from mlflow.entities import LoggedModelOutput

        path = Path(record["checkpoint"])
        run = self._client.get_run(run_id)
        experiment_id = run.info.experiment_id
        same = f"name = '{path.name}' AND source_run_id = '{run_id}'"

        def find() -> Any:
            return self._client.search_logged_models([experiment_id], filter_string=same, max_results=1)

        if not find():
            self._send_files(
                mlflow.create_external_model,
                name=path.name,
                source_run_id=run_id,
                experiment_id=experiment_id,
                model_type="checkpoint",
                tags={"path": str(path), "step": str(record["step"])},
            )
        (model,) = find()
        if model.model_id not in [output.model_id for output in run.outputs.model_outputs]:
            self._client.log_outputs(run_id, [LoggedModelOutput(model_id=model.model_id, step=record["step"])])

    def _log_figure(self, run_id: str) -> None:
        from launch.figures import loss_curves

        figure = loss_curves(self._directory.metrics)
        if figure is not None:
            self._send_files(self._client.log_figure, run_id, figure, "figures/loss.png")

    def _send_files(self, send: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        """Send artifacts, unless this machine may not write where the store says that they lie: the records count.

        A store that has moved with its run still names the place where it was made.
        """
        try:
            send(*arguments, **keywords)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            logger.warning("files are in the run directory alone, MLflow's place for them cannot be written: %s", error)


def replay(directory: RunDirectory, *, follow: int | None = None, attempt: int | None = None) -> int:
    """Send everything; with `follow`, go on until that parent process or its `attempt` has ended. Returns the status.

    A server that does not answer is tried again: without end while the run goes on, for `PATIENCE_SECONDS` after.
    """
    keep_cards(directory.data, json.loads(directory.facts.read_text())["datasets"])
    sender: Sender | None = None
    dead_since: float | None = None
    said_at = 0.0
    while True:
        # Looked at before sending: what was there then has been sent when nothing is new.
        ended, alive, last = _has_ended(directory, follow), _is_alive(directory, follow), _last_record(directory)
        advances = sender.advances if sender else 0
        try:
            sender = sender or Sender(directory, attempt)
            moved = sender.send_new()
            if dead_since is not None:
                logger.warning("MLflow takes the records again")
                dead_since = None
            if ended and not moved:
                # If a later attempt has started meanwhile, its own sender tells how the run ends.
                later = attempt is not None and last["attempt"] > attempt
                if last.get("status") not in FINAL and not alive and not later:
                    sender.end_killed()
                return 0
            if not ended:
                time.sleep(POLL_SECONDS)
        except Exception as error:
            now = time.monotonic()
            if dead_since is None or now - said_at > REPEAT_SECONDS:
                logger.warning("MLflow did not take the records, they are kept: %s: %s", type(error).__name__, error)
                said_at = now
            if dead_since is None or (sender and sender.advances > advances):
                dead_since = now
            if ended and now - dead_since > PATIENCE_SECONDS:
                return 1
            while time.monotonic() - now < RETRY_SECONDS and _has_ended(directory, follow) == ended:
                time.sleep(POLL_SECONDS / 4)


def _has_ended(directory: RunDirectory, follow: int | None) -> bool:
    return follow is None or not _is_alive(directory, follow) or _last_record(directory).get("status") in FINAL


def _is_alive(directory: RunDirectory, follow: int | None) -> bool:
    return directory.in_use if follow is None else os.getppid() == follow


def _last_record(directory: RunDirectory) -> dict[str, Any]:
    return last_record(directory.metrics) or {"attempt": -1}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.replay", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--follow", type=int, metavar="PID", help="go on until the process that started this one ends")
    parser.add_argument("--attempt", type=int, help="with --follow: which attempt to send, after those before it")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    directory = RunDirectory(arguments.run_dir.absolute())
    if not directory.facts.exists() or not directory.metrics.exists():
        raise UserError(f"{directory.path}: not a run directory: run.json or metrics.jsonl is missing")
    with open(directory.path / "replay.lock", "w") as lock:
        if arguments.follow is None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"{directory.path}: its records are being sent by another process already; it sends them all"
                ) from error
        else:
            os.nice(NICENESS)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for the trainer, which saves before it ends
            # The sender of an attempt that was killed may still be at work.
            fcntl.flock(lock, fcntl.LOCK_EX)
        return replay(directory, follow=arguments.follow, attempt=arguments.attempt)


if __name__ == "__main__":
    run_command(main)
