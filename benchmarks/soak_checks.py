"""What must hold after a soak, read off the run's own record, its last checkpoint and MLflow's store."""

import json
import sqlite3
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launch.checkpoint import read_manifest
from launch.conversion import MOMENTS, Records

COMPARED = ("train/loss", "train/grad_norm", "train/lr", "valid/loss")


@dataclass(frozen=True)
class Verdict:
    """Whether something holds, and the figures that say so."""

    name: str
    passed: bool
    found: str


class Record:
    """metrics.jsonl of a run, and the load of its nodes (RUN_DIR/system/)."""

    def __init__(self, run_dir: Path) -> None:
        self.entries = _read_lines(run_dir / "metrics.jsonl")
        self._load = [entry for file in sorted((run_dir / "system").glob("*.jsonl")) for entry in _read_lines(file)]

    def steps(self) -> list[dict[str, Any]]:
        """Every recorded step, repeated ones too."""
        return [entry for entry in self.entries if "samples" in entry]

    def committed(self) -> list[dict[str, Any]]:
        """The steps that the last weights come from: of each attempt those before the first step of any later one."""
        kept: list[dict[str, Any]] = []
        first = float("inf")
        attempts: dict[int, list[dict[str, Any]]] = {}
        for entry in self.steps():
            attempts.setdefault(entry["attempt"], []).append(entry)
        for attempt in sorted(attempts, reverse=True):
            kept += [entry for entry in attempts[attempt] if entry["step"] < first]
            first = min(first, attempts[attempt][0]["step"])
        return sorted(kept, key=lambda entry: int(entry["step"]))

    def values(self, name: str) -> list[tuple[int, float]]:
        """Every recorded value of a metric, with its step."""
        return [(e["step"], e["metrics"][name]) for e in self.entries if name in e.get("metrics", {})]

    def first_values(self) -> dict[tuple[str, int], float]:
        """The first value of each (metric, step): what the store is to hold."""
        found: dict[tuple[str, int], float] = {}
        for entry in (*self.entries, *self._load):
            for name, value in entry.get("metrics", {}).items():
                found.setdefault((name, entry["step"]), value)
        return found


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_numbers(run: Record, reference: Record, tolerance: float) -> Verdict:
    """All numbers of `COMPARED` that any attempt recorded are within `tolerance` of the undisturbed run's.

    Gradient norms are left out where rounding may differ: there they have no tolerance of their own.
    """
    names = COMPARED if tolerance == 0 else ("train/loss", "train/lr", "valid/loss")
    worst, compared, missing = 0.0, 0, 0
    for name in names:
        expected, values = dict(reference.values(name)), run.values(name)
        missing += len(expected.keys() - dict(values).keys())
        for step, value in values:
            # An attempt can have come further than the end that the soak chose later.
            if step in expected:
                compared += 1
                worst = max(worst, abs(value - expected[step]))
    found = f"{compared:,} numbers of {', '.join(names)}; largest difference {worst:.3g}"
    return Verdict(
        "losses", compared > 0 and not missing and worst <= tolerance, found + f"; {missing} missing" * bool(missing)
    )


def same_weights(run_dir: Path, reference_dir: Path, *, exact: bool) -> Verdict:
    """Weights and both moments of the last checkpoints are equal; not `exact`: the largest difference is only said."""
    mine, expected = (_last_state(folder) for folder in (run_dir, reference_dir))
    differing, worst = 0, 0.0
    for name, tensor in expected.items():
        differing += not torch.equal(mine[name], tensor)
        worst = max(worst, float((mine[name] - tensor).abs().max()))
    numbers = sum(tensor.numel() for tensor in expected.values())
    found = f"{numbers:,} weights and moments; largest difference {worst:.3g}"
    return Verdict("weights", mine.keys() == expected.keys() and not (exact and differing), found)


def _last_state(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = run_dir / "checkpoints" / (run_dir / "checkpoints/latest").read_text().strip()
    records = Records(checkpoint, read_manifest(checkpoint))
    return {f"{record.name} {what}": record.read(what).detach() for record in records for what in ("weight", *MOMENTS)}


def exact_samples(run: Record, steps: int, samples_per_step: int) -> Verdict:
    """The committed steps are 1 to `steps`, and their samples all numbers from 0 on, each once."""
    committed = run.committed()
    numbers = [entry["step"] for entry in committed]
    taken = Counter(n for entry in committed for start, stop in entry["samples"] for n in range(start, stop))
    lost = steps * samples_per_step - len(taken.keys() & set(range(steps * samples_per_step)))
    doubled = taken.total() - len(taken)
    repeated = len(run.steps()) - len(committed)
    found = (
        f"{taken.total():,} of {len(committed):,} steps; {lost} lost, {doubled} doubled; {repeated:,} steps done again"
    )
    passed = numbers == list(range(1, steps + 1)) and not lost and not doubled
    return Verdict("samples", passed and len(taken) == steps * samples_per_step, found)


def exact_store(run: Record, store: Path) -> Verdict:
    """MLflow's tables hold the first value of each recorded (metric, step) once, of one finished run."""
    with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as database:
        rows = database.execute("SELECT key, step, value FROM metrics").fetchall()
        statuses = [status for (status,) in database.execute("SELECT status FROM runs")]
        models = [name for (name,) in database.execute("SELECT name FROM logged_models")]
    expected = run.first_values()
    stored = Counter((key, step) for key, step, _ in rows)
    lost = len(expected.keys() - stored.keys())
    doubled, strange = stored.total() - len(stored), len(stored.keys() - expected.keys())
    other = sum(expected.get((key, step)) != value for key, step, value in rows)
    saved = {Path(entry["checkpoint"]).name for entry in run.entries if "checkpoint" in entry}
    found = f"{len(expected):,} points; {lost} lost, {doubled} doubled, {strange} unknown, {other} of another value"
    found += f"; {len(saved)} checkpoints, {len(models)} in the store; runs: {', '.join(statuses)}"
    passed = not (lost or doubled or strange or other) and statuses == ["FINISHED"] and sorted(models) == sorted(saved)
    return Verdict("MLflow store", passed, found)


def noticed(damaged: list[str], logs: str) -> Verdict:
    """Each checkpoint that was damaged has been passed over."""
    seen = sum(logs.count(f"{name} passed over") >= times for name, times in Counter(damaged).items())
    return Verdict(
        "damage noticed",
        seen == len(set(damaged)),
        f"{len(damaged)} damaged; {seen} of {len(set(damaged))} passed over",
    )
