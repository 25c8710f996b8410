"""The plan's memory beside what torch allocates, and the message of a device that has too little."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from flash_model import add_norm_linear
from flash_model.config import ModelConfig, count_parameters
from flash_model.lm import FlashLM
from flash_model.ops import dispatch
from launch.config import RunConfig, load_run_config
from launch.engine import Processes
from launch.first_step import memory_errors_explained
from launch.memory import GIB, OUTSIDE_TORCH, estimate_memory, fitting_settings, layer_parameters
from pipeline.errors import UserError
from tests.launch.allocations import KINDS, Allocations

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """By kind the bytes that a training process allocated and the plan's; graphs compiled by a mock step and in all."""
    results = tmp_path_factory.mktemp("memory") / "results.json"
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/launch/allocations.py"), str(results)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, list[float]] = json.loads(results.read_text())
    return found


@pytest.mark.parametrize(("precision", "stage"), KINDS)
def test_the_plan_is_what_deepspeed_allocates(trained: dict[str, list[float]], precision: str, stage: int) -> None:
    allocated, planned = trained[f"{precision}-{stage}"]
    assert planned == pytest.approx(allocated, rel=0.15)


def test_a_mock_step_compiles_what_steps_need(trained: dict[str, list[float]]) -> None:
    by_mock_step, in_all = trained["graphs"]
    assert by_mock_step == in_all > 0


def bytes_kept(model: dict[str, Any], layers: int, recomputed: range, dtype: torch.dtype) -> int:
    """Bytes that are there between forward and backward, as on a GPU: of the kernels' ops, without a GPU."""
    with torch.device("meta"):
        lm = FlashLM(ModelConfig.model_validate({**model, "n_layers": layers})).to(dtype)
        tokens = torch.zeros(2, 2048, dtype=torch.int64)
    lm.recomputed = frozenset(recomputed)
    with (
        mock.patch.object(add_norm_linear, "_has_kernels", return_value=True),
        mock.patch.object(dispatch, "use_kernel", return_value=True),
        Allocations([*lm.parameters(), tokens]) as allocations,
    ):
        nats = lm(tokens, tokens, None, tokens)
        return allocations.current if nats.requires_grad else 0


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"causal": False},
        {"architecture": "flash_quad", "norm_length": 2048},
        {"norm": "scalenorm", "chunk_size": 512},
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
def test_the_plan_is_what_layers_keep(model: dict[str, Any], precision: str, recompute: bool) -> None:
    shape = {"vocab_size": 1000, "d_model": 256, **model}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    kept = [bytes_kept(shape, layers, range(layers * recompute), dtype) for layers in (2, 5)]
    plans = []
    for layers in (2, 5):
        config = RunConfig.model_validate(
            {
                "run": {"dir": "unused"},
                "model": {**shape, "n_layers": layers},
                "data": {"path": "unused", "seq_len": 2048, **({} if shape.get("causal", True) else {"masked_lm": {}})},
                "train": {
                    "tokens": 4096,
                    "tokens_per_step": 4096,
                    "micro_batch": 2,
                    "precision": precision,
                    "activation_checkpointing": "all" if recompute else "none",
                },
            }
        )
        plans.append(estimate_memory(config, 1).parts["activations"])
    again = 0.0
    if recompute:  # a layer that is run again is there once, however many are
        again = plans[0] - 2 * 4096 * 256 * dtype.itemsize - 4 * 2048 * 256
        assert again >= 0
    assert plans[1] - plans[0] == pytest.approx(kept[1] - kept[0], rel=0.01)


def test_partitions_and_offload_move_what_they_say(write_config: Callable[..., Path]) -> None:
    config = load_run_config(write_config(), ["train.precision=bf16"])
    P = count_parameters(config.model)
    by_stage = [estimate_memory(config, 4, stage).parts for stage in (1, 2, 3)]
    assert [parts["optimizer"] for parts in by_stage] == [3 * P] * 3
    assert [parts["weights"] for parts in by_stage[:2]] == [2 * P] * 2
    offloaded = load_run_config(write_config(), ["train.precision=bf16", "train.offload=optimizer"])
    memory = estimate_memory(offloaded, 4)
    assert memory.parts["optimizer"] == 0
    assert memory.host >= 4 * P
    assert layer_parameters(config.model) * 2 < P


@pytest.fixture
def large() -> RunConfig:
    """1.3 billion parameters with 65,536 tokens a micro batch."""
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"vocab_size": 32_000, "d_model": 2048, "n_layers": 48},
            "data": {"path": "unused", "seq_len": 8192},
            "train": {"tokens": 131_072, "tokens_per_step": 131_072, "micro_batch": 8},
        }
    )


def test_the_mildest_settings_that_fit_are_named(large: RunConfig) -> None:
    needed = estimate_memory(large, 1)
    assert needed.total == sum(needed.parts.values())
    assert not needed.fits(80 * GIB)
    settings = fitting_settings(large, 1, 80 * GIB)
    assert any(setting.startswith("train.activation_checkpointing=all (") for setting in settings)
    assert any(setting.startswith("train.micro_batch=4 (") for setting in settings)
    assert not any("offload" in setting for setting in settings), "activations alone are more than that"
    for setting in settings:
        key, value = setting.removeprefix("train.").partition(" ")[0].split("=")
        changed = large.train.model_copy(update={key: int(value) if value.isdigit() else value})
        memory = estimate_memory(large.model_copy(update={"train": changed}), 1)
        assert memory.total + OUTSIDE_TORCH <= 80 * GIB
    (combination,) = fitting_settings(large, 1, 12 * GIB)
    assert combination.startswith("train.activation_checkpointing=all train.micro_batch=1 train.zero_stage=3 train.off")
    assert fitting_settings(large, 1, GIB) == []


def test_a_device_with_too_little_memory_is_a_user_error(large: RunConfig, alone: Processes) -> None:
    torchs = "CUDA out of memory. Tried to allocate 12.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which …"
    with pytest.raises(UserError) as caught, memory_errors_explained(large, alone, snapshot=lambda: "see there"):
        raise torch.OutOfMemoryError(torchs)
    message = str(caught.value)
    said = ("asked for 12.50 GiB", "by formula a step needs", "activations 9", "to fit, one of: train.", "see there")
    for expected in said:
        assert expected in message
    with pytest.raises(RuntimeError, match="another"), memory_errors_explained(large, alone):
        raise RuntimeError("another")
