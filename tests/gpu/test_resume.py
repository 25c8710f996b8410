"""k + (N − k) steps are N steps on a GPU, bit for bit: the kernels, torch.compile and DeepSpeed together."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
STEPS = 24


def run_config(folder: Path, stage: int) -> dict[str, Any]:
    return {
        "model": {"vocab_size": 32_000, "d_model": 128, "n_layers": 3, "qk_dim": 64, "chunk_size": 128},
        "data": {"path": str(folder / "data"), "seq_len": 512},
        "train": {
            "tokens": STEPS * 8192,
            "tokens_per_step": 8192,
            "micro_batch": 8,
            "precision": "bf16",
            "zero_stage": stage,
            "compile": True,
            "deterministic": True,
        },
        "optimizer": {"lr": 1e-3},
        "tracking": {"enabled": False},
    }


def launch(folder: Path, *cases: dict[str, Any]) -> list[int]:
    spec = folder / "cases.json"
    common = {"config": str(folder / "run.yaml"), "action": "train", "message": str(folder / "message")}
    spec.write_text(json.dumps([common | case for case in cases]))
    command = [sys.executable, str(ROOT / "tests/distributed/driver.py"), str(spec)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    if (folder / "message").exists():
        pytest.fail((folder / "message").read_text())
    statuses: list[int] = json.loads(spec.with_suffix(".statuses").read_text())
    return statuses


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_cut_run_equals_a_whole_one(
    stage: int, metric: Callable[[Path, str], dict[int, float]], tmp_path: Path
) -> None:
    from benchmarks.reading import make_dataset

    make_dataset(tmp_path / "data", 400_000, seed=0)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_config(tmp_path, stage)))
    whole, cut = ({"overrides": [f"run.dir={tmp_path / name}"]} for name in ("whole", "cut"))
    assert launch(tmp_path, whole) == [0]
    assert launch(tmp_path, cut | {"stop_after": 3}) == [75]
    assert launch(tmp_path, {"overrides": [*cut["overrides"], "run.resume=must"]}) == [0]
    weights, expected = (weights_of(tmp_path / name) for name in ("cut", "whole"))
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []
    losses = metric(tmp_path / "whole", "train/loss")
    assert metric(tmp_path / "cut", "train/loss") == losses
    assert len(losses) == STEPS


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / f"checkpoints/step-{STEPS:08}/model/model.safetensors")
