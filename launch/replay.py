"""Send a run's metrics.jsonl to MLflow: `python -m launch.replay RUN_DIR`.

A (metric, step) that the store has already is never sent again, so it does not matter how often this is called, or
where it was interrupted. How far it came is kept in RUN_DIR/tracking.json.
"""

import argparse
import fcntl
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from launch.bad_steps import describe_ranges
from launch.datasets_used import dataset_entity, folder_names, keep_cards
from launch.run_directory import RunDirectory
from pipeline.atomic import write_json
from pipeline.errors import UserError, run_command

BATCH = 1000
"""MLflow takes at most 1,000 metrics and 100 parameters or tags at once."""
POLL_SECONDS = 1.0
RETRY_SECONDS = 5.0
PATIENCE_SECONDS = 30.0
"""How long a dead server is waited for after the run itself has ended."""

FINAL = ("FINISHED", "FAILED", "KILLED")

logger = logging.getLogger("launch.replay")


class Sender:
    """Carries one run's records, in order, from its directory to an MLflow store."""

    def __init__(self, directory: RunDirectory) -> None:
        # MLflow's own retries take minutes and say nothing; this module has its own.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        import mlflow

        self._directory = directory
        self._facts: dict[str, Any] = json.loads(directory.facts.read_text())
        self._state: dict[str, Any] = {"uri": self._facts["uri"], "offset": 0}
        if directory.tracking.exists():
            self._state |= json.loads(directory.tracking.read_text())
        mlflow.set_tracking_uri(self._state["uri"])
        self._client = mlflow.MlflowClient()
        self._last_step: dict[str, int] = {}
        self.status: str | None = None

    def send_new(self) -> bool:
        """Send what was appended since the last call; True if there was anything. Raises MLflow's errors."""
        with open(self._directory.metrics, "rb") as file:
            file.seek(self._state["offset"])
            lines = file.readlines()
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        if not lines:
            return False
        run_id = self._run_id()
        self._log_datasets(run_id)
        pending: list[dict[str, Any]] = []
        size = sent = 0
        for line in lines:
            record = json.loads(line)
            if pending and ("metrics" not in record or size + len(record["metrics"]) > BATCH):
                self._send_metrics(run_id, pending)
                self._advance(sent)
                pending, size, sent = [], 0, 0
            sent += len(line)
            if "metrics" in record:
                pending.append(record)
                size += len(record["metrics"])
            else:
                self._send_event(run_id, record)
                self._advance(sent)
                sent = 0
                if "rollback" in record:
                    run_id = self._run_id()
                    self._log_datasets(run_id)
        if pending:
            self._send_metrics(run_id, pending)
            self._advance(sent)
        return True

    def _advance(self, size: int) -> None:
        self._state["offset"] += size
        write_json(self._directory.tracking, self._state)

    def _run_id(self) -> str:
        """The id of the run, or of its newest child; on first use the run is created."""
        if "run_id" not in self._state:
            self._state["run_id"] = self._open_run(self._facts["uid"], self._facts["name"], {})
            write_json(self._directory.tracking, self._state)
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
        self._last_step.clear()
        self._state = self._state | {"run_id": child, "datasets": []}

    def _open_run(self, uid: str, name: str, tags: dict[str, str]) -> str:
        """The id of a new run, or of the one that an earlier sender created just before it died."""
        from mlflow.entities import Param, RunTag

        facts = self._facts
        experiment = self._client.get_experiment_by_name(facts["experiment"])
        if experiment is None:
            local = str(self._state["uri"]).startswith("sqlite:")
            artifacts = (self._directory.path / "artifacts").as_uri() if local else None
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
        parameters = [Param(key, value[:6000]) for key, value in facts["parameters"].items()]
        for start in range(0, len(parameters), 100):
            self._client.log_batch(run_id, params=parameters[start : start + 100])
        self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in facts["tags"].items()])
        self._client.log_artifact(run_id, str(self._directory.config))
        return run_id

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
                self._client.log_artifacts(run_id, str(folder), f"data/{name}")
        self._state["datasets"] = [*self._state.get("datasets", ()), *new]
        write_json(self._directory.tracking, self._state)

    def _send_metrics(self, run_id: str, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = []
        for record in records:
            step, milliseconds = record["step"], int(record["time"] * 1000)
            for name, value in record["metrics"].items():
                if step > self._stored_step(run_id, name):
                    metrics.append(Metric(name, value, milliseconds, step))
                    self._last_step[name] = step
        if metrics:
            try:
                self._client.log_batch(run_id, metrics=metrics)
            except Exception:
                self._last_step.clear()
                raise

    def _stored_step(self, run_id: str, name: str) -> int:
        if name not in self._last_step:
            history = self._client.get_metric_history(run_id, name)
            self._last_step[name] = max((metric.step for metric in history), default=-1)
        return self._last_step[name]

    def _send_event(self, run_id: str, record: dict[str, Any]) -> None:
        if "checkpoint" in record:
            self._register_checkpoint(run_id, record)
            return
        if "rollback" in record:
            self._begin_child(run_id, record["rollback"])
            return
        if "text" in record:
            if (path := self._directory.path / record["text"]).exists():
                self._client.log_artifact(run_id, str(path), "samples")
            return
        if "bad_step" in record:
            self._client.set_tag(run_id, f"bad_step.{record['step']}", json.dumps(record["bad_step"])[:5000])
            return
        self.status = record["status"]
        if self.status == "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
            return
        self._log_figure(run_id)
        self._client.set_terminated(run_id, status=self.status, end_time=int(record["time"] * 1000))

    def end_killed(self) -> None:
        """Record that the run ended without a word, as after SIGKILL."""
        self._client.set_terminated(self._run_id(), status="KILLED")

    def _register_checkpoint(self, run_id: str, record: dict[str, Any]) -> None:
        import mlflow
        from mlflow.entities import LoggedModelOutput

        path = Path(record["checkpoint"])
        run = self._client.get_run(run_id)
        experiment_id = run.info.experiment_id
        same = f"name = '{path.name}' AND source_run_id = '{run_id}'"
        known = self._client.search_logged_models([experiment_id], filter_string=same, max_results=1)
        if known:
            model = known[0]
        else:
            model = mlflow.create_external_model(
                name=path.name,
                source_run_id=run_id,
                experiment_id=experiment_id,
                model_type="checkpoint",
                tags={"path": str(path), "step": str(record["step"])},
            )
        if model.model_id not in [output.model_id for output in run.outputs.model_outputs]:
            self._client.log_outputs(run_id, [LoggedModelOutput(model_id=model.model_id, step=record["step"])])

    def _log_figure(self, run_id: str) -> None:
        from launch.figures import loss_curves

        figure = loss_curves(self._directory.metrics)
        if figure is not None:
            self._client.log_figure(run_id, figure, "figures/loss.png")


def replay(directory: RunDirectory, *, follow: int | None) -> int:
    """Send everything; with `follow`, go on until that parent process has ended. Returns the exit status.

    A server that does not answer is tried again: without end while the parent lives, for `PATIENCE_SECONDS` after.
    """
    keep_cards(directory.data, json.loads(directory.facts.read_text())["datasets"])
    sender: Sender | None = None
    ended_at: float | None = None
    while True:
        alive = os.getppid() == follow
        if not alive and ended_at is None:
            ended_at = time.monotonic()
        try:
            sender = sender or Sender(directory)
            sent = sender.send_new()
            if sender.status in FINAL:
                return 0
            if not alive and not sent:
                if follow is not None:
                    sender.end_killed()
                return 0
            if alive:
                time.sleep(POLL_SECONDS)
        except Exception as error:
            logger.warning("MLflow did not take the records, they are kept: %s: %s", type(error).__name__, error)
            if ended_at is not None and time.monotonic() - ended_at > PATIENCE_SECONDS:
                return 1
            time.sleep(RETRY_SECONDS)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.replay", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--follow", type=int, metavar="PID", help="go on until the process that started this one ends")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    directory = RunDirectory(arguments.run_dir.absolute())
    if not directory.facts.exists():
        raise UserError(f"{directory.path}: not a run directory: run.json is missing")
    with open(directory.path / "replay.lock", "w") as lock:
        # The sender of an attempt that was killed may still be at work.
        fcntl.flock(lock, fcntl.LOCK_EX)
        return replay(directory, follow=arguments.follow)


if __name__ == "__main__":
    run_command(main)
