"""`run.init_from`: a new run that starts from the weights of another one's checkpoint."""

from pathlib import Path
from typing import Any

from flash_model.config import ModelConfig
from flash_model.lm import build_model
from launch.checkpoint import damage, newest_usable, read_manifest
from launch.config import RunConfig
from launch.console import say
from launch.conversion import Records, load_records
from launch.engine import Processes
from pipeline.errors import UserError

LISTED = 8


def find_origin(config: RunConfig, tokenizer_sha256: str | None, processes: Processes) -> Path | None:
    """The checkpoint that `run.init_from` names, or None. Called by all processes.

    tokenizer_sha256: of the data; None: not known, and not compared.
    Raises `UserError` if there is none, it is damaged, or its weights are those of another model or tokenizer.
    """
    path = config.run.init_from
    if path is None:
        return None
    if processes.once(lambda: (path / "checkpoints").is_dir()):
        checkpoint, passed_over = newest_usable(path / "checkpoints", processes)
        for reason in passed_over:
            say(reason)
    else:
        found = damage(path, processes)
        if found is not None:
            raise UserError(f"run.init_from: {found}; name a checkpoint (step-…) or a run directory")
        checkpoint = path
    if checkpoint is None:
        raise UserError(f"run.init_from: {path}/checkpoints holds no usable checkpoint; name another run")
    processes.once(lambda: _check_fits(checkpoint, config.model, tokenizer_sha256))
    return checkpoint


def load_weights(origin: Path, engine: Any, processes: Processes) -> None:
    """Put the weights of the checkpoint `origin` into a fresh engine. Called by all processes."""
    records = Records(origin, read_manifest(origin))
    load_records(records, engine, processes.rank, processes.world_size, moments=False)


def _check_fits(checkpoint: Path, model: ModelConfig, tokenizer_sha256: str | None) -> None:
    manifest = read_manifest(checkpoint)
    then = {p["name"]: tuple(p["shape"]) for group in manifest["layout"]["groups"] for p in group["parameters"]}
    now = _shapes(model)
    differing = [name for name in {**now, **then} if now.get(name) != then.get(name)]
    saved = manifest["config"]["model"]
    changed = {
        key: saved[key] for key in ModelConfig.model_fields if key in saved and saved[key] != getattr(model, key)
    }
    if differing:
        lines = [
            f"{name}: {_written(then.get(name))} in the checkpoint, {_written(now.get(name))} in this run"
            for name in differing[:LISTED]
        ]
        if len(differing) > LISTED:
            lines.append(f"and {len(differing) - LISTED} more")
        # Those keys alone that have a part in it.
        for key, value in changed.items():
            if _shapes(model.model_copy(update={key: value})) != now:
                lines.append(f"set model.{key}: {getattr(model, key)} to the checkpoint's: {value}")
        raise UserError(f"run.init_from: the weights of {checkpoint} do not fit:\n  " + "\n  ".join(lines))
    if tokenizer_sha256 is not None and manifest["tokenizer_sha256"] != tokenizer_sha256:
        raise UserError(
            f"run.init_from: {checkpoint} was trained with another tokenizer than that of data; prepare the data with "
            "content.tokenizer.path set to the tokenizer.model of the data that the checkpoint was trained on"
        )
    say(f"starting from the weights of {checkpoint}, {manifest['tokens']:,} tokens old")
    for key, value in changed.items():
        say(f"note: model.{key}: {value} in {checkpoint.name}, {getattr(model, key)} in this run")


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in build_model(model, device="meta").named_parameters()}


def _written(shape: tuple[int, ...] | None) -> str:
    return "no such parameter" if shape is None else str(list(shape))
