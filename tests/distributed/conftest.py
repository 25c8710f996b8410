"""Launches: the real deepspeed launcher with small models."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--master_addr", "127.0.0.1"]

Launch = Callable[..., "subprocess.CompletedProcess[str]"]


def environment() -> dict[str, str]:
    return os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Finds a port that is free now."""
    from launch.engine import free_port as find

    return find


@pytest.fixture(scope="session")
def launcher_environment() -> dict[str, str]:
    """The environment launches run in."""
    return environment()


@pytest.fixture(scope="session")
def launcher_command(free_port: Callable[[], int]) -> Callable[[int], list[str]]:
    """The launcher's command for so many processes of this machine."""

    def command(processes: int) -> list[str]:
        return [*LAUNCHER, "--master_port", str(free_port()), "--num_accelerators", str(processes)]

    return command


@pytest.fixture(scope="session")
def launch(launcher_command: Callable[[int], list[str]]) -> Launch:
    """Run `deepspeed SCRIPT ARGUMENTS` with so many processes to its end."""

    def run(
        *arguments: str, processes: int = 2, options: Sequence[str] = (), cwd: Path = ROOT
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*launcher_command(processes), *options, *arguments],
            cwd=cwd,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=400,
        )

    return run


@pytest.fixture(scope="session")
def run_cases(launch: Launch) -> Callable[[Path, Sequence[dict[str, Any]], int], list[int]]:
    """Run cases of driver.py in one launch and return their exit statuses."""

    def run(folder: Path, cases: Sequence[dict[str, Any]], processes: int) -> list[int]:
        spec = folder / f"cases-{processes}.json"
        spec.write_text(json.dumps(cases))
        done = launch(str(ROOT / "tests/distributed/driver.py"), str(spec), processes=processes)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        statuses: list[int] = json.loads(spec.with_suffix(".statuses").read_text())
        return statuses

    return run


@pytest.fixture(scope="session")
def run_config(prepared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small model, in fp32 and without MLflow; run.dir is to be given."""
    values = {
        "run": {"dir": "unset", "seed": 7},
        "model": {"vocab_size": 384, "d_model": 32, "n_layers": 2, "qk_dim": 16, "chunk_size": 16},
        "data": {
            "path": str(prepared_data),
            "seq_len": 64,
            "validation": {"valid": {"path": str(prepared_data), "split": "valid"}},
        },
        "train": {
            "tokens": 8 * 512,
            "tokens_per_step": 512,
            "micro_batch": 2,
            "precision": "fp32",
            "zero_stage": 2,
            "log_every": 1,
        },
        "optimizer": {"lr": 0.01, "gradient_clip": 1.0, "betas": [0.9, 0.98]},
        "schedule": {"warmup_tokens": 1024},
        "tracking": {"enabled": False},
        # Left at its default, ZeRO-3 would not partition anything as small as this model.
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    }
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
