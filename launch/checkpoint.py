"""Checkpoints: directories that appear by rename once every file of theirs is on disk, hashed and listed.

checkpoints/step-00000100/
  manifest.json     written last: hashes (its own too), step, data state, layout of parameters and optimizer partitions
  deepspeed/        DeepSpeed's own files
  rng/rank-0.pt     random number generators, one file a process
  model/            float32 export that flash_model.export reads (checkpoint.export_model)
checkpoints/latest  name of the newest
"""

import hashlib
import json
import random
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch.bad_steps import History
from launch.config import RunConfig
from launch.conversion import Records, load_records, parameter_layout
from launch.engine import Processes
from launch.retention import Saved, list_checkpoints
from pipeline.atomic import hash_file
from pipeline.batches import DataState
from pipeline.errors import UserError

FORMAT_VERSION = 2
HYPERPARAMETERS = ("betas", "eps", "weight_decay")
"""Of AdamW, beside the learning rate, which every step sets."""


@dataclass(frozen=True)
class Progress:
    """What a run has done: all that a checkpoint holds beside weights, optimizer and random number generators."""

    step: int
    tokens: int
    data: DataState
    attempt: int
    history: History


def saved_checkpoints(directory: Path) -> list[Saved]:
    """Those whose manifests can be read: one that cannot does not count as kept, and is left to be looked at."""
    found = []
    for path in list_checkpoints(directory):
        with suppress(UserError):
            manifest = read_manifest(path)
            found.append(Saved(path, manifest["step"], manifest["scores"]))
    return found


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises `UserError` if it is missing or damaged."""
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text())
        intact = manifest.pop("sha256", None) == _digest(manifest) or "its SHA-256 is another"
        version = manifest.get("format_version")
    except (OSError, ValueError, AttributeError) as error:
        intact, version = str(error), None
    if version not in (None, FORMAT_VERSION):
        raise UserError(f"{checkpoint}: checkpoint format {version} is not this version's, {FORMAT_VERSION}")
    if intact is not True:
        raise UserError(f"{checkpoint}: manifest.json is missing or damaged ({intact}); use another checkpoint")
    return manifest


def seal_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with its own SHA-256 in it."""
    return manifest | {"sha256": _digest(manifest)}


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def damage(checkpoint: Path, processes: Processes) -> str | None:
    """What is wrong with the files of a checkpoint, or None. Called by all processes.

    Every file is read by one of them and its SHA-256 compared.
    """

    def listed() -> dict[str, Any] | str:
        try:
            files: dict[str, Any] = read_manifest(checkpoint)["files"]
            return files
        except UserError as error:
            return str(error)

    files = processes.once(listed)
    if isinstance(files, str):
        return files
    mine = list(files.items())[processes.rank :: processes.world_size]
    found = next((reason for name, entry in mine if (reason := _file_damage(checkpoint / name, entry))), None)
    return next(filter(None, processes.gather(found)), None)


def _file_damage(path: Path, expected: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            return f"{path} has {size:,} bytes instead of {expected['size']:,}"
        return None if hash_file(path) == expected["sha256"] else f"{path} has other content than when it was saved"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"


def newest_usable(directory: Path, processes: Processes) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint and the reasons why newer ones were passed over. Called by all processes."""
    reasons: list[str] = []
    for checkpoint in processes.once(lambda: list_checkpoints(directory)):
        found = damage(checkpoint, processes)
        if found is None:
            return checkpoint, reasons
        reasons.append(f"{checkpoint.name} passed over: {found}")
    return None, reasons


def check_compatible(checkpoint: Path, manifest: dict[str, Any], config: RunConfig) -> None:
    """Raise `UserError` that names all that differs, if the run of `config` cannot continue from `checkpoint`.

    Number of processes, micro batch and ZeRO stage may differ.
    """
    now, then = config.model_dump(mode="json"), manifest["config"]
    fixed = [("model", key) for key in now["model"]]
    fixed += [("run", "seed"), ("data", "split"), ("data", "seq_len"), ("data", "masked_lm")]
    fixed += [("train", "tokens_per_step"), ("train", "precision")]
    problems = [
        f"{section}.{key}: {then[section].get(key)} in the checkpoint, {now[section][key]} now"
        for section, key in fixed
        if then[section].get(key) != now[section][key]
    ]
    if problems:
        raise UserError(
            f"{checkpoint} is of another model or run and cannot be continued; "
            "restore these settings or start a new run.dir:\n  " + "\n  ".join(problems)
        )


def load_checkpoint(checkpoint: Path, manifest: dict[str, Any], engine: Any, processes: Processes) -> Progress:
    """Put weights and optimizer back as they were saved. Called by all processes.

    Where parameters lie as they lay, DeepSpeed loads its own files and random number generators go on too: what follows
    is bit for bit what would have followed. Elsewhere every process takes its parts of the records (conversion.py).
    Decay rates and weight decay are those that the engine was built with, here as there.
    """
    world_size = processes.world_size
    if (manifest["world_size"], manifest["layout"]) == (world_size, parameter_layout(engine)):
        built_with = [{key: group[key] for key in HYPERPARAMETERS} for group in engine.optimizer.param_groups]
        loaded, _ = engine.load_checkpoint(str(checkpoint), tag="deepspeed")
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found nothing to load in {checkpoint}")
        # The files have those of the run that wrote them too, and torch takes them from there.
        for group, settings in zip(engine.optimizer.param_groups, built_with, strict=True):
            group |= settings
        states = torch.load(checkpoint / "rng" / f"rank-{processes.rank}.pt", weights_only=False)
        _restore_random_states(states)
    else:
        load_records(Records(checkpoint, manifest), engine, processes.rank, world_size, moments=True)
        engine.global_steps = manifest["step"]
        engine.global_samples = manifest["step"] * engine.train_batch_size()
    return Progress(
        step=manifest["step"],
        tokens=manifest["tokens"],
        data=DataState.from_dict(manifest["data"]),
        attempt=manifest["attempt"],
        history=History.from_dict(manifest.get("history", {})),
    )


def _restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
