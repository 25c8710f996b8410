"""What the nodes of a run have in common, checked before it begins: settings, data, the file system of run.dir."""

import os
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from launch.config import RunConfig
from launch.engine import Processes
from launch.tracking import flattened
from pipeline.errors import UserError
from pipeline.mixture import Mixture
from pipeline.shards import TokenDataset

PATIENCE_SECONDS = 90.0
"""How late a node may see a new file: on NFS, that a directory was not there is remembered for a minute."""


def check_same(
    config: RunConfig, training: Mixture, validation: Mapping[str, TokenDataset], processes: Processes
) -> None:
    """Raise `UserError` if a process has other settings or other data than the first one. Called by all processes.

    Where its data lies is each node's own affair: there may be copies.
    """
    mine = _settings(config)
    mine["the digest of what is trained on"] = training.digest
    for name, dataset in validation.items():
        mine[f"the digest of data.validation.{name}"] = dataset.digest
    host = socket.gethostname()
    first, first_host = processes.once(lambda: (mine, host))
    differing = [
        f"{key}: {mine.get(key, 'missing')} on {host} (rank {processes.rank}), {first.get(key, 'missing')} on "
        f"{first_host} (rank 0)"
        for key in {**first, **mine}
        if mine.get(key) != first.get(key)
    ]
    found = next(filter(None, processes.gather(differing)), None)
    if found:
        raise UserError(
            "the processes do not agree; give all nodes the same config, environment and data:\n  " + "\n  ".join(found)
        )


def _settings(config: RunConfig) -> dict[str, str]:
    """By key, without places of data and of offloaded states."""
    values = config.model_dump(mode="json", exclude={"data": {"path", "mixture"}})
    for reference in values["data"]["validation"].values():
        del reference["path"]
    return {key: value for key, value in flattened(values).items() if not key.endswith(".nvme_path")}


def check_shared(run_dir: Path, processes: Processes) -> None:
    """Raise `UserError` if a process does not see what the first one writes to `run_dir`: its checkpoints would have
    nowhere to go. Called by all processes; a directory that cannot be written to is left to others to complain of.
    """
    mark = processes.once(lambda: _leave_mark(run_dir)) if processes.world_size > 1 else None
    if mark is None:
        return
    blind = None if _appears(mark) else f"{socket.gethostname()} (rank {processes.rank})"
    found = [host for host in processes.gather(blind) if host]
    processes.once(lambda: _remove_mark(mark, directory_too=bool(found)))
    if found:
        raise UserError(
            f"run.dir: {run_dir} is not the same directory on all nodes: {', '.join(found)} cannot see what rank 0 "
            "writes there; choose one on a file system that they share"
        )


def _leave_mark(run_dir: Path) -> Path | None:
    mark = run_dir / f".mark-{uuid.uuid4().hex}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError:
        return None
    return mark


def _remove_mark(mark: Path, *, directory_too: bool) -> None:
    mark.unlink(missing_ok=True)
    if directory_too and not any(mark.parent.iterdir()):
        mark.parent.rmdir()


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not os.path.exists(file):  # whatever keeps it from being seen
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
