"""Processes, accumulation and ZeRO stages change how a step is computed, never what it computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

STAGES = (0, 1, 2, 3)
COMPILED_STAGES = (1, 3)
# The short last window of the data is in the first step (tests assert it), so that masks are unequal.
SAMPLES = 4


@pytest.fixture(scope="module")
def folder(
    run_cases: Callable[..., list[int]],
    run_config: Path,
    all_windows: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Runs of 8 steps by 1 and 2 processes, and the first gradient of 1, 2 and 4 processes over a whole epoch."""
    folder = tmp_path_factory.mktemp("equivalence")

    def train(name: str, stage: int, *extra: str) -> dict[str, Any]:
        overrides = [f"run.dir={folder / name}", f"train.zero_stage={stage}", *extra]
        return {"config": str(run_config), "overrides": overrides, "action": "train"}

    def gradient(processes: int) -> dict[str, Any]:
        micro_batch = all_windows // 4
        overrides = [
            f"run.dir={folder / 'none'}",
            f"train.tokens_per_step={all_windows * 64}",
            f"train.tokens={all_windows * 64}",
            f"train.micro_batch={micro_batch}",
            "schedule.warmup_tokens=0",
        ]
        output = str(folder / f"gradient-{processes}.pt")
        return {"config": str(run_config), "overrides": overrides, "action": "gradients", "output": output}

    compiled = [train(f"compiled-{stage}", stage, "train.compile=true") for stage in COMPILED_STAGES]
    run_cases(folder, [gradient(1), train("one", 1)], 1)
    again = ["train.compile=true", "train.activation_checkpointing=all", "train.mock_step=true"]
    recomputed = [train("recomputed-3", 3, "train.activation_checkpointing=[1]"), train("again", 3, *again)]
    two = [train(f"two-{stage}", stage) for stage in STAGES]
    offloaded = [train("offloaded", 3, "train.offload=all")]
    run_cases(folder, [gradient(2), *two, *compiled, *recomputed, *offloaded], 2)
    run_cases(folder, [gradient(4)], 4)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_lose_what_one_loses(
    folder: Path, metric: Callable[[Path, str], dict[int, float]], stage: int
) -> None:
    one, two = metric(folder / "one", "train/loss"), metric(folder / f"two-{stage}", "train/loss")
    assert len(one) == 8
    assert two == pytest.approx(one, abs=1e-4)
    assert one[8] < one[1] - 0.5, "the run does not learn: equal losses would show nothing"
    valid = metric(folder / f"two-{stage}", "valid/loss")
    assert valid == pytest.approx(metric(folder / "one", "valid/loss"), abs=1e-4)


@pytest.mark.parametrize("stage", COMPILED_STAGES)
def test_a_compiled_run_loses_what_an_uncompiled_one_loses(
    folder: Path, metric: Callable[[Path, str], dict[int, float]], stage: int
) -> None:
    eager, compiled = folder / f"two-{stage}", folder / f"compiled-{stage}"
    for name in ("train/loss", "train/grad_norm", "valid/loss"):
        assert metric(compiled, name) == pytest.approx(metric(eager, name), rel=1e-5), name


def test_recomputed_layers_change_no_bit(folder: Path, metric: Callable[[Path, str], dict[int, float]]) -> None:
    for name in ("train/loss", "train/grad_norm", "valid/loss"):
        assert metric(folder / "recomputed-3", name) == metric(folder / "two-3", name), name


def test_compiled_ones_and_a_mock_step_change_rounding_at_most(
    folder: Path, metric: Callable[[Path, str], dict[int, float]]
) -> None:
    """What enters a recomputed layer is added up outside of its graph."""
    for name in ("train/loss", "train/grad_norm", "valid/loss"):
        assert metric(folder / "again", name) == pytest.approx(metric(folder / "compiled-3", name), rel=1e-5), name


def test_an_offloaded_run_loses_what_another_one_loses(
    folder: Path, metric: Callable[[Path, str], dict[int, float]]
) -> None:
    for name in ("train/loss", "train/grad_norm", "valid/loss"):
        assert metric(folder / "offloaded", name) == pytest.approx(metric(folder / "two-3", name), rel=1e-5), name


def test_gradient_norms_agree_over_stages(folder: Path, metric: Callable[[Path, str], dict[int, float]]) -> None:
    one = metric(folder / "one", "train/grad_norm")
    for stage in STAGES:
        assert metric(folder / f"two-{stage}", "train/grad_norm") == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_and_accumulation_give_the_same_gradient(folder: Path, processes: int) -> None:
    alone, shared = (torch.load(folder / f"gradient-{n}.pt") for n in (1, processes))
    per_micro_batch = [count for process in shared["targets"] for count in process]
    assert len(per_micro_batch) == 4
    assert len(set(per_micro_batch)) > 1, "every micro batch has as many targets: the masks are equal"
    for name, gradient in alone["gradients"].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(shared["gradients"][name], gradient, rtol=0, atol=1e-6, msg=name)
