"""A run's config file that is right, for tests to spoil."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

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
