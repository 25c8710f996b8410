"""Which checkpoints of a run stay, and how the others go."""

import math
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from launch.operation_config import CheckpointSection
from pipeline.atomic import sync_directory


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk: its step and the validation scores measured at that step, as `SET/loss`."""

    path: Path
    step: int
    scores: dict[str, float]


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints in `directory`, newest first. Those being written do not count."""
    return sorted((p for p in directory.glob("step-*") if p.is_dir()), reverse=True)


def kept(saved: Collection[Saved], rules: CheckpointSection) -> set[Path]:
    """Those of `saved` that the rules keep.

    The newest `keep`; of every `keep_every_steps` steps the first one, whatever its step is, so that no rhythm of
    saving is left without; the one with the lowest loss on `keep_best`, the earliest of equals.
    """
    in_order = sorted(saved, key=lambda checkpoint: checkpoint.step)
    stay = {checkpoint.path for checkpoint in in_order[-rules.keep :]}
    if rules.keep_every_steps is not None:
        firsts: dict[int, Path] = {}
        for checkpoint in in_order:
            firsts.setdefault(checkpoint.step // rules.keep_every_steps, checkpoint.path)
        firsts.pop(0, None)
        stay |= set(firsts.values())
    losses = {c.path: c.scores.get(f"{rules.keep_best}/loss", math.nan) for c in in_order}
    scored = [path for path, loss in losses.items() if not math.isnan(loss)]
    if scored:
        stay.add(min(scored, key=lambda path: losses[path]))
    return stay


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint.

    What cannot be deleted now, or was left by a process that died here, goes at the next call of `remove_leftovers`.
    """
    shutil.rmtree(hide(checkpoint), ignore_errors=True)


def hide(checkpoint: Path) -> Path:
    """Rename a checkpoint that is to be deleted, so that half of one never looks like one; returns what to delete."""
    aside = checkpoint.with_name(f".deleting-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    sync_directory(checkpoint.parent)
    return aside


def remove_leftovers(directory: Path) -> None:
    """Delete what dead processes were writing to or deleting from `directory`."""
    for pattern in (".writing-*", ".deleting-*"):
        for left in directory.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)
