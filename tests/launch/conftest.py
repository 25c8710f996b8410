"""A run's config file that is right, for tests to spoil, and checkpoints without a model."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.checkpoint import seal_manifest
from launch.engine import Alone, Processes
from pipeline.atomic import hash_file

RIGHT: dict[str, Any] = {
    "run": {"dir": "runs/test", "seed": 7},
    "model": {"vocab_size": 384, "d_model": 32, "n_layers": 2, "qk_dim": 16, "chunk_size": 16},
    "data": {"path": "nowhere", "seq_len": 64},
    "train": {"tokens": 4096, "tokens_per_step": 512, "micro_batch": 2, "precision": "fp32", "zero_stage": 2},
}


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Write a run's config file; keywords replace keys of a section, or add sections."""

    def write(**sections: dict[str, Any]) -> Path:
        values = copy.deepcopy(RIGHT)
        for name, section in sections.items():
            values.setdefault(name, {}).update(section)
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def written_checkpoint(directory: Path, step: int, run_uid: str = "this", attempt: int = 0) -> Path:
    final, checkpoint = directory / f"step-{step:08d}", directory / f".writing-{step}"
    (checkpoint / "deepspeed").mkdir(parents=True)
    names = ["deepspeed/one.pt", "deepspeed/two.pt", "latest"]
    files = {}
    for number, name in enumerate(names):
        (checkpoint / name).write_bytes(random.Random(f"{step} {number} {attempt}").randbytes(300 + number))
        files[name] = {"size": 300 + number, "sha256": hash_file(checkpoint / name)}
    manifest = {"format_version": 2, "step": step, "attempt": attempt, "run_uid": run_uid, "files": files}
    (checkpoint / "manifest.json").write_text(json.dumps(seal_manifest(manifest), separators=(",", ":")))
    # Appears whole, as a real one does: a copy may be looking for it.
    return checkpoint.rename(final)


@pytest.fixture
def write_checkpoint() -> Callable[..., Path]:
    """Write a checkpoint of a step, with files and manifest as they should be but nothing of a model in them."""
    return written_checkpoint


@pytest.fixture
def alone() -> Processes:
    """The only process of a run, without a process group."""
    return Alone()
