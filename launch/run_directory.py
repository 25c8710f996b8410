"""The directory that holds everything of a run.

config.yaml (resolved), run.json (environment and data, for the tracker), metrics.jsonl, system/ (load of each node),
tracking.json, data/ (cards and pictures of the datasets), checkpoints/, lock, DONE once the last step is reached, and
what launch.rollback keeps.
"""

import fcntl
import json
import uuid
from pathlib import Path
from typing import IO, Any

import yaml

from launch.config import RunConfig
from launch.retention import remove_leftovers
from launch.stop import forget_earlier
from pipeline.atomic import write_aside, write_json
from pipeline.errors import UserError


class RunDirectory:
    """Paths and state of a run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.facts = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.system = path / "system"
        self.tracking = path / "tracking.json"
        self.data = path / "data"
        self.checkpoints = path / "checkpoints"
        self.done = path / "DONE"
        self.over_budget = path / "OVER_BUDGET"
        self.rollbacks = path / "rollbacks.json"
        self._lock: IO[str] | None = None
        self._checked = False
        self._opened_before: int | None = None

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.config.exists()

    @property
    def opened(self) -> int | None:
        """When a trainer last opened the directory, in nanoseconds: all write the config then. None: none has."""
        try:
            return self.config.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    @property
    def uid(self) -> str:
        """The run's identity, which outlives restarts; there is one once the directory was opened."""
        return str(json.loads(self.facts.read_text())["uid"])

    def check(self, resume: str) -> None:
        """Raise `UserError` if the state on disk does not allow `resume` (never, auto, must)."""
        self._checked, self._opened_before = True, self.opened
        if self.exists and resume == "never":
            raise UserError(f"run.dir: {self.path} already holds a run; add --resume to continue it, or choose another")
        if resume == "must" and not self.exists:
            raise UserError(
                f"run.dir: nothing to resume from: {self.path} holds no run; leave --resume out to start one"
            )

    def check_unused(self) -> None:
        """Raise `UserError` if another trainer has the directory: what lies there is about to change."""
        if self.in_use:
            raise self._occupied()

    def _occupied(self) -> UserError:
        return UserError(f"run.dir: {self.path} is in use by another trainer; wait for it or choose another")

    def open(self, config: RunConfig, facts: dict[str, Any]) -> None:
        """Create the directory, lock it against a second trainer, write the resolved config (first process only).

        Raises `UserError` if that cannot be, or another trainer has had the directory since it was checked.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "w")  # noqa: SIM115 (held until close)
        except OSError as error:
            raise UserError(
                f"run.dir: cannot write to {self.path}: {error.strerror}; choose another directory"
            ) from error
        if not self._take(self._lock, fcntl.LOCK_EX):
            raise self._occupied()
        if self._checked and self.opened != self._opened_before:
            raise UserError(
                f"run.dir: another trainer has had {self.path} while this one was starting; start again, with --resume "
                "to continue what it did"
            )
        # Half a checkpoint that filled the disk would leave no room to start in.
        remove_leftovers(self.checkpoints)
        forget_earlier(self.path)
        self.done.unlink(missing_ok=True)
        with write_aside(self.config) as file:
            file.write(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
        # The identity outlives restarts: MLflow keeps one run for it.
        uid = self.uid if self.facts.exists() else uuid.uuid4().hex
        write_json(self.facts, {"uid": uid, **facts})

    @property
    def in_use(self) -> bool:
        """Whether a trainer has the directory."""
        try:
            with open(self.path / "lock") as lock:
                return not self._take(lock, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    def _take(self, lock: IO[str], kind: int) -> bool:
        """Whether the lock could be had."""
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise UserError(
                f"run.dir: {self.path}: its file system has no locks, which keep a second trainer out: "
                f"{error.strerror}; mount it with them (Lustre: -o flock), or choose another directory"
            ) from error
        return True

    def close(self) -> None:
        """Give up the lock."""
        if self._lock:
            self._lock.close()

    def finish(self, step: int, tokens: int) -> None:
        """Mark the run as finished."""
        write_json(self.done, {"step": step, "tokens": tokens})

    @property
    def done_tokens(self) -> int | None:
        """Tokens of the finished run, or None while it is not finished."""
        return int(json.loads(self.done.read_text())["tokens"]) if self.done.exists() else None
