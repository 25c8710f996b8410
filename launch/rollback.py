"""Going back before bad steps: a run over its budget goes on from the checkpoint before them, without their samples.

RUN_DIR/OVER_BUDGET says that the run stopped so, and why; RUN_DIR/rollbacks.json lists every rollback. From then on the
samples of all rollbacks are passed over, and checkpoints that a rollback went back behind lie in
checkpoints/rolled-back/, where nothing looks for them. All of it can be repeated after a crash at any moment.
"""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launch.bad_steps import History, Ranges, describe_ranges, merge_ranges
from launch.checkpoint import damage, read_manifest
from launch.engine import Processes
from launch.retention import list_checkpoints
from launch.run_directory import RunDirectory
from pipeline.atomic import write_aside, write_json
from pipeline.batches import DataState
from pipeline.errors import UserError


@dataclass(frozen=True)
class Rollback:
    """One way back.

    Attributes:
        attempt: number of the attempt that stopped over its budget.
        checkpoint, step: where the run goes on.
        bad_steps, samples: what was bad, and is passed over from now on.
    """

    attempt: int
    checkpoint: str
    step: int
    bad_steps: tuple[int, ...]
    samples: Ranges

    def __str__(self) -> str:
        steps = ", ".join(map(str, self.bad_steps))
        return f"{self.checkpoint}, before the bad steps {steps}; passing over samples {describe_ranges(self.samples)}"


def record_stop(directory: RunDirectory, attempt: int, history: History) -> None:
    """Leave word that attempt number `attempt` stopped over its budget. Called by the first process."""
    steps = [step for step, _ in history.skipped]
    samples = merge_ranges(part for _, ranges in history.skipped for part in ranges)
    write_json(directory.over_budget, {"attempt": attempt, "bad_steps": steps, "samples": samples})


def plan_rollback(directory: RunDirectory, processes: Processes) -> Rollback | None:
    """Where to go back to; None if the run did not stop over its budget, or has gone back since.

    That is the newest undamaged checkpoint before the first bad step; if there is none, the oldest.
    Called by all processes. Raises `UserError` if no checkpoint is usable.
    """
    stop = processes.once(lambda: _pending_stop(directory))
    if stop is None:
        return None
    found = processes.once(lambda: list_checkpoints(directory.checkpoints))
    usable = [path for path in found if damage(path, processes) is None]
    if not usable:
        raise UserError(
            f"run.dir: nothing to go back to: {directory.checkpoints} holds no usable checkpoint; "
            "delete the directory to start anew"
        )
    steps = processes.once(lambda: {path: int(read_manifest(path)["step"]) for path in usable})
    chosen = next((path for path in usable if steps[path] < min(stop["bad_steps"])), usable[-1])
    ranges = tuple((start, end) for start, end in stop["samples"])
    return Rollback(stop["attempt"], chosen.name, steps[chosen], tuple(stop["bad_steps"]), ranges)


def _pending_stop(directory: RunDirectory) -> dict[str, Any] | None:
    if not directory.over_budget.exists():
        return None
    stop: dict[str, Any] = json.loads(directory.over_budget.read_text())
    return None if any(done.attempt >= stop["attempt"] for done in list_rollbacks(directory)) else stop


def carry_out(directory: RunDirectory, rollback: Rollback | None) -> None:
    """Make `rollback` the state of the run; without one, forget a stop over the budget. Called by the first process."""
    if rollback:
        write_json(directory.rollbacks, [asdict(r) for r in (*list_rollbacks(directory), rollback)])
        set_aside(directory)
    directory.over_budget.unlink(missing_ok=True)


def set_aside(directory: RunDirectory) -> None:
    """Move checkpoints away that a rollback went back behind."""
    rollbacks = list_rollbacks(directory)
    for checkpoint in list_checkpoints(directory.checkpoints) if rollbacks else ():
        try:
            manifest = read_manifest(checkpoint)
        except UserError:
            continue
        if any(manifest["attempt"] <= r.attempt and manifest["step"] > r.step for r in rollbacks):
            with write_aside(directory.checkpoints / "latest") as file:
                file.write(f"{rollbacks[-1].checkpoint}\n".encode())
            aside = directory.checkpoints / "rolled-back" / checkpoint.name
            aside.parent.mkdir(exist_ok=True)
            if aside.exists():
                shutil.rmtree(aside)
            checkpoint.rename(aside)


def pass_over(directory: RunDirectory, state: DataState) -> DataState:
    """`state` without the samples of all rollbacks."""
    samples = (part for rollback in list_rollbacks(directory) for part in rollback.samples)
    return replace(state, skipped=merge_ranges([*state.skipped, *samples]))


def list_rollbacks(directory: RunDirectory) -> list[Rollback]:
    """Every rollback of the run, in order."""
    if not directory.rollbacks.exists():
        return []
    return [_from_dict(entry) for entry in json.loads(directory.rollbacks.read_text())]


def unrecorded(directory: RunDirectory) -> list[dict[str, Any]]:
    """Rollbacks that metrics.jsonl does not have yet, numbered from 1, as plain data."""
    rollbacks = list_rollbacks(directory)
    known = _recorded(directory.metrics) if rollbacks else set()
    numbered = enumerate(rollbacks, start=1)
    return [{"number": number, **asdict(rollback)} for number, rollback in numbered if number not in known]


def _recorded(metrics: Path) -> set[int]:
    if not metrics.exists():
        return set()
    with open(metrics, encoding="utf-8") as file:
        return {json.loads(line)["rollback"]["number"] for line in file if '"rollback": {' in line}


def _from_dict(entry: dict[str, Any]) -> Rollback:
    samples = tuple((start, stop) for start, stop in entry["samples"])
    return Rollback(**{**entry, "bad_steps": tuple(entry["bad_steps"]), "samples": samples})
