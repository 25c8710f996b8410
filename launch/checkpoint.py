"""Checkpoints: directories that appear by rename once every file of theirs is on disk, hashed and listed.

checkpoints/step-00000100/
  manifest.json     written last: hashes, step, data state, layout of parameters and optimizer partitions
  deepspeed/        DeepSpeed's own files
  rng/rank-0.pt     random number generators, one file a process
  model/            float32 export that flash_model.export reads (checkpoint.export_model)
checkpoints/latest  name of the newest
"""

import json
import os
import platform
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flash_model.export import save_model
from launch.bad_steps import History
from launch.config import RunConfig
from launch.engine import Processes
from pipeline.atomic import hash_file, sync_directory, write_aside, write_json
from pipeline.batches import DataState
from pipeline.errors import UserError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Progress:
    """What a run has done: all that a checkpoint holds beside weights, optimizer and random number generators."""

    step: int
    tokens: int
    data: DataState
    attempt: int
    history: History


def save_checkpoint(
    directory: Path,
    engine: Any,
    processes: Processes,
    config: RunConfig,
    progress: Progress,
    *,
    tokenizer: Path,
    mlflow_run_id: str | None,
) -> Path:
    """Write a checkpoint of the run into `directory` and return its path. Called by all processes."""
    name = f"step-{progress.step:08d}"
    final, aside = directory / name, directory / f".writing-{name}"
    if processes.rank == 0:
        for left in directory.glob(".writing-*"):
            shutil.rmtree(left)
        (aside / "rng").mkdir(parents=True)
    processes.barrier()
    engine.save_checkpoint(str(aside), tag="deepspeed", save_latest=True)
    torch.save(_random_states(), aside / "rng" / f"rank-{processes.rank}.pt")
    if config.checkpoint.export_model:
        weights = _full_weights(engine, keep=processes.rank == 0)
        if processes.rank == 0:
            save_model(aside / "model", config.model, weights, tokenizer)
        else:
            for _ in weights:
                pass
    layout = parameter_layout(engine)
    processes.barrier()
    files = _hash_files(aside, processes)
    if processes.rank == 0:
        manifest = {
            "format": "flash-pretrain checkpoint",
            "format_version": FORMAT_VERSION,
            "step": progress.step,
            "tokens": progress.tokens,
            "attempt": progress.attempt,
            "data": progress.data.to_dict(),
            "history": progress.history.to_dict(),
            "world_size": processes.world_size,
            "zero_stage": config.train.zero_stage,
            "precision": config.train.precision,
            "mlflow_run_id": mlflow_run_id,
            "config": config.model_dump(mode="json"),
            "versions": _versions(),
            "layout": layout,
            "files": files,
        }
        write_json(aside / "manifest.json", manifest)
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        sync_directory(directory)
        with write_aside(directory / "latest") as file:
            file.write(f"{name}\n".encode())
        for old in list_checkpoints(directory)[config.checkpoint.keep :]:
            shutil.rmtree(old)
    processes.barrier()
    return final


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints in `directory`, newest first. Those being written do not count."""
    return sorted((p for p in directory.glob("step-*") if p.is_dir()), reverse=True)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises `UserError` if it is missing or unreadable."""
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{checkpoint}: manifest.json is missing or damaged ({error}); use another checkpoint"
        ) from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{checkpoint}: unknown checkpoint format {manifest.get('format_version')}")
    return manifest


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None: every file is read and its SHA-256 compared."""
    try:
        manifest = read_manifest(checkpoint)
    except UserError as error:
        return str(error)
    for name, expected in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{path} has {path.stat().st_size:,} bytes instead of {expected['size']:,}"
        if hash_file(path) != expected["sha256"]:
            return f"{path} has other content than when it was saved"
    return None


def newest_usable(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint and the reasons why newer ones were passed over."""
    reasons: list[str] = []
    for checkpoint in list_checkpoints(directory):
        found = damage(checkpoint)
        if found is None:
            return checkpoint, reasons
        reasons.append(f"{checkpoint.name} passed over: {found}")
    return None, reasons


def check_compatible(checkpoint: Path, manifest: dict[str, Any], config: RunConfig, world_size: int) -> None:
    """Raise `UserError` that names all that differs, if the run of `config` cannot continue from `checkpoint`."""
    now, then = config.model_dump(mode="json"), manifest["config"]
    fixed = [("model", key) for key in now["model"]]
    fixed += [("run", "seed"), ("data", "split"), ("data", "seq_len"), ("data", "masked_lm")]
    fixed += [("train", "tokens_per_step"), ("train", "precision")]
    problems = [
        f"{section}.{key}: {then[section].get(key)} in the checkpoint, {now[section][key]} now"
        for section, key in fixed
        if then[section].get(key) != now[section][key]
    ]
    if manifest["zero_stage"] != config.train.zero_stage:
        problems.append(f"train.zero_stage: {manifest['zero_stage']} in the checkpoint, {config.train.zero_stage} now")
    if manifest["world_size"] != world_size:
        problems.append(f"processes: {manifest['world_size']} wrote the checkpoint, {world_size} would read it")
    if problems:
        raise UserError(
            f"{checkpoint} is of another model or run and cannot be continued; "
            "restore these settings or start a new run.dir:\n  " + "\n  ".join(problems)
        )


def load_checkpoint(checkpoint: Path, manifest: dict[str, Any], engine: Any, processes: Processes) -> Progress:
    """Put weights, optimizer and random number generators back as they were saved. Called by all processes."""
    loaded, _ = engine.load_checkpoint(str(checkpoint), tag="deepspeed")
    if loaded is None:
        raise RuntimeError(f"DeepSpeed found nothing to load in {checkpoint}")
    states = torch.load(checkpoint / "rng" / f"rank-{processes.rank}.pt", weights_only=False)
    _restore_random_states(states)
    return Progress(
        step=manifest["step"],
        tokens=manifest["tokens"],
        data=DataState.from_dict(manifest["data"]),
        attempt=manifest["attempt"],
        history=History.from_dict(manifest.get("history", {})),
    )


def parameter_layout(engine: Any) -> dict[str, Any]:
    """How parameters lie in the optimizer's flat partitions: enough to cut and join them for another world size.

    Groups list parameters in their flat order. With stages 1 and 2 a group is one flat vector, padded and cut evenly
    over processes; with stage 3 each parameter is padded and cut by itself; with stage 0 nothing is cut.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        names = {id(p): name for name, p in engine.module.named_parameters()}
        groups = [
            [{"name": names[id(p)], "shape": list(p.shape)} for p in group["params"]]
            for group in engine.optimizer.param_groups
        ]
        return {"stage": 0, "groups": [{"parameters": parameters} for parameters in groups]}
    groups = [
        [{"name": name, "shape": list(shape)} for name, shape in shapes.items()]
        for shapes in engine._get_zero_param_shapes()
    ]
    if stage == 3:
        partition = {name: int(p.ds_tensor.ds_numel) for name, p in engine.module.named_parameters()}
        for group in groups:
            for parameter in group:
                parameter["partition_numel"] = partition[parameter["name"]]
        return {"stage": 3, "groups": [{"parameters": parameters} for parameters in groups]}
    flat = (
        engine.optimizer.single_partition_of_fp32_groups
        if hasattr(engine.optimizer, "single_partition_of_fp32_groups")
        else engine.optimizer.fp32_groups_flat_partition
    )
    return {
        "stage": stage,
        "groups": [
            {"parameters": parameters, "partition_numel": int(partition.numel())}
            for parameters, partition in zip(groups, flat, strict=True)
        ],
    }


def _full_weights(engine: Any, *, keep: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole float32 weight of each parameter, one at a time. Every process has to walk through it."""
    from deepspeed.utils import safe_get_full_fp32_param

    partitioned = engine.zero_optimization_stage() > 0
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter) if partitioned else parameter.detach()
        if keep:
            yield name, full.float().cpu()
        else:
            yield name, torch.empty(0)


def _hash_files(directory: Path, processes: Processes) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below `directory`, each flushed and hashed by one of the processes."""
    names = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    mine = {}
    for name in names[processes.rank :: processes.world_size]:
        with open(directory / name, "rb") as file:
            os.fsync(file.fileno())
        mine[name] = {"size": (directory / name).stat().st_size, "sha256": hash_file(directory / name)}
    merged = {name: entry for part in processes.gather(mine) for name, entry in part.items()}
    return dict(sorted(merged.items()))


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _versions() -> dict[str, str]:
    import deepspeed

    return {"python": platform.python_version(), "torch": torch.__version__, "deepspeed": deepspeed.__version__}
