"""k + (N − k) steps are N steps, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def folder(run_cases: Callable[..., list[int]], run_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each stage a run of 8 steps, and one that is stopped after 3 and continued in another launch."""
    folder = tmp_path_factory.mktemp("resume")

    def case(name: str, stage: int, *extra: str, **more: Any) -> dict[str, Any]:
        overrides = [f"run.dir={folder / name}", f"train.zero_stage={stage}", *extra]
        return {"config": str(run_config), "overrides": overrides, "action": "train", **more}

    first = [case(f"whole-{stage}", stage) for stage in STAGES]
    first += [case(f"cut-{stage}", stage, stop_after=3) for stage in STAGES]
    assert run_cases(folder, first, 2) == [0] * 4 + [75] * 4
    for stage in STAGES:
        assert not (folder / f"cut-{stage}" / "DONE").exists()
    assert run_cases(folder, [case(f"cut-{stage}", stage, "run.resume=must") for stage in STAGES], 2) == [0] * 4
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_cut_run_equals_a_whole_one(
    folder: Path, metric: Callable[[Path, str], dict[int, float]], stage: int
) -> None:
    whole, cut = folder / f"whole-{stage}", folder / f"cut-{stage}"
    assert (cut / "DONE").read_text() == (whole / "DONE").read_text()
    attempts = [line for line in (cut / "metrics.jsonl").read_text().splitlines() if '"attempt": 1' in line]
    assert any('"train/loss"' in line for line in attempts), "the second launch had nothing left to do"
    for name in ("train/loss", "train/grad_norm", "train/lr", "valid/loss"):
        assert metric(cut, name) == metric(whole, name), name
    weights, expected = (load_file(run / "checkpoints/step-00000008/model/model.safetensors") for run in (cut, whole))
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("stage", STAGES)
def test_optimizer_states_are_equal_too(folder: Path, stage: int) -> None:
    whole, cut = (folder / f"{kind}-{stage}" / "checkpoints/step-00000008/deepspeed" for kind in ("whole", "cut"))
    files = sorted(path.name for path in whole.glob("*.pt"))
    compared = 0
    for file in files:
        tensors, expected = (dict(tensors_of(torch.load(side / file, weights_only=False))) for side in (cut, whole))
        assert tensors.keys() == expected.keys()
        # Not the flat float32 weights: ZeRO-3 never initialises their padding. The test above compares the weights.
        for name, tensor in expected.items():
            if "/state/" in name:
                assert torch.equal(tensors[name], tensor), f"{file} {name}"
                compared += "exp_avg" in name
    assert compared >= 2


def tensors_of(value: Any, name: str = "") -> Any:
    """Every tensor in nested containers, with a path that names it."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors_of(inner, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for position, inner in enumerate(value):
            yield from tensors_of(inner, f"{name}/{position}")
