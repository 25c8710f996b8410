"""k + (N − k) steps are N steps, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

BF16 = ("train.precision=bf16",)
KINDS: dict[str, tuple[str, ...]] = {
    **{str(stage): (f"train.zero_stage={stage}",) for stage in (0, 1, 2, 3)},
    "1-offloaded": ("train.zero_stage=1", "train.offload=optimizer", *BF16),
    "2-offloaded": ("train.zero_stage=2", "train.offload=optimizer", "train.activation_checkpointing=2", *BF16),
    "3-all-offloaded": ("train.zero_stage=3", "train.offload=all", "train.activation_checkpointing=all", *BF16),
}


@pytest.fixture(scope="module")
def folder(run_cases: Callable[..., list[int]], run_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each kind a run of 8 steps, and one that is stopped after 3 and continued in another launch.

    Those that are stopped begin with a step on made-up tokens, which leaves no trace.
    """
    folder = tmp_path_factory.mktemp("resume")

    def case(name: str, kind: str, *extra: str, **more: Any) -> dict[str, Any]:
        overrides = [f"run.dir={folder / name}-{kind}", *KINDS[kind], *extra]
        return {"config": str(run_config), "overrides": overrides, "action": "train", **more}

    first = [case("whole", kind) for kind in KINDS]
    mock = "train.mock_step=true"
    first += [case("cut", kind, mock, stop_after=3) for kind in KINDS]
    first.append(case("small", "1", mock, out_of_memory="all", message=str(folder / "message")))
    first.append(case("limited", "1", "run.max_hours=1e-6"))
    assert run_cases(folder, first, 2) == [0] * len(KINDS) + [75] * len(KINDS) + [2, 75]
    for kind in KINDS:
        assert not (folder / f"cut-{kind}" / "DONE").exists()
    second = [case("cut", kind, mock, "run.resume=must") for kind in KINDS]
    copies = {"slow_copy": str(folder / "copied")}
    second.append(
        case("limited", "1", "run.resume=must", "run.max_hours=100", f"checkpoint.copy_to={folder}", **copies)
    )
    assert run_cases(folder, second, 2) == [0] * (len(KINDS) + 1)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_run_equals_a_whole_one(folder: Path, metric: Callable[[Path, str], dict[int, float]], kind: str) -> None:
    whole, cut = folder / f"whole-{kind}", folder / f"cut-{kind}"
    assert (cut / "DONE").read_text() == (whole / "DONE").read_text()
    attempts = [line for line in (cut / "metrics.jsonl").read_text().splitlines() if '"attempt": 1' in line]
    assert any('"train/loss"' in line for line in attempts), "the second launch had nothing left to do"
    for name in ("train/loss", "train/grad_norm", "train/lr", "valid/loss"):
        assert metric(cut, name) == metric(whole, name), name
    weights, expected = (load_file(run / "checkpoints/step-00000008/model/model.safetensors") for run in (cut, whole))
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_optimizer_states_are_equal_too(folder: Path, kind: str) -> None:
    whole, cut = (folder / f"{name}-{kind}" / "checkpoints/step-00000008/deepspeed" for name in ("whole", "cut"))
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


@pytest.mark.parametrize("kind", KINDS)
def test_random_numbers_go_on_as_without_a_mock_step(folder: Path, kind: str) -> None:
    states = [
        torch.load(folder / f"{n}-{kind}/checkpoints/step-00000008/rng/rank-0.pt", weights_only=False)["torch"]
        for n in ("whole", "cut")
    ]
    assert torch.equal(*states)


def test_too_little_memory_is_found_before_the_run_exists(folder: Path) -> None:
    assert "asked for 3.00 GiB" in (folder / "message").read_text()
    assert not (folder / "small-1").exists()


def test_processes_leave_together_when_all_is_copied(folder: Path) -> None:
    """The launch would have failed if the second one had left before: some launchers kill the first one then."""
    assert (folder / "copied").exists()
    assert (folder / "step-00000008/manifest.json").exists()


def test_a_run_at_its_time_limit_is_saved(folder: Path, metric: Callable[[Path, str], dict[int, float]]) -> None:
    assert (folder / "limited-1/checkpoints/step-00000000/manifest.json").exists()
    assert metric(folder / "limited-1", "train/loss") == metric(folder / "whole-1", "train/loss")


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
