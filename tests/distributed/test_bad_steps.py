"""Bad steps leave no trace in weights and optimizer, in every precision and stage; over the budget the run stops."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_resume import tensors_of

KINDS = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]
KINDS += [("fp32-offload", 2), ("bf16-offload", 3)]
BAD = {"16": "loss", "24": "gradient", "48": "spike"}
"""What goes wrong in steps 3, 4 and 7, which begin with these samples, in one of two processes."""


@pytest.fixture(scope="module")
def folder(run_cases: Callable[..., list[int]], run_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 8 steps, saved after each; one is over its budget in step 7 and goes on with a larger one."""
    folder = tmp_path_factory.mktemp("bad")

    def case(name: str, precision: str, stage: int, *extra: str) -> dict[str, Any]:
        overrides = [
            f"run.dir={folder / name}",
            f"train.precision={precision[:4]}",
            f"train.zero_stage={stage}",
            "checkpoint.every_tokens=512",
            "checkpoint.keep=8",
            "bad_steps.spike_threshold=10",
            "bad_steps.spike_window=4",
            *extra,
            *(["train.offload=all" if stage == 3 else "train.offload=optimizer"] if "offload" in precision else []),
        ]
        return {"config": str(run_config), "overrides": overrides, "action": "train", "spoil": BAD}

    cases = [case(f"{precision}-{stage}", precision, stage) for precision, stage in KINDS]
    small = ["bad_steps.budget=2", "checkpoint.every_tokens=2048"]
    cases += [case("over", "fp32", 2, *small), case("back", "fp32", 3, "bad_steps.budget=2")]
    assert run_cases(folder, cases, 2) == [0] * 9 + [70] * 2
    assert (folder / "back/OVER_BUDGET").exists()
    saved = sorted(path.name for path in (folder / "over/checkpoints").glob("step-*"))
    assert saved == ["step-00000004", "step-00000006"], "the last good state was not saved"
    resumed = case("over", "fp32", 2, "run.resume=must")
    back = case("back", "fp32", 3, "bad_steps.budget=0", "bad_steps.rollback=true", "run.resume=must")
    assert run_cases(folder, [resumed, back], 2) == [0, 0]
    return folder


def states(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, moments and their counts, of all processes."""
    checkpoint = run / f"checkpoints/step-{step:08d}"
    found = dict(load_file(checkpoint / "model/model.safetensors"))
    for file in (checkpoint / "deepspeed").glob("*.pt"):
        for name, tensor in tensors_of(torch.load(file, weights_only=False)):
            # ZeRO-3 never initialises the padding of the flat weights; the whole ones are in model/.
            if "/state/" in name or "/module/" in name:
                found[f"{file.name}{name}"] = tensor
    assert sum(name.endswith("/exp_avg_sq") for name in found) >= 2
    assert any(name.endswith("/step") for name in found)
    return found


@pytest.mark.parametrize(("precision", "stage"), KINDS)
def test_a_skipped_step_changes_no_bit(folder: Path, precision: str, stage: int) -> None:
    run = folder / f"{precision}-{stage}"
    for before, after in ((2, 3), (3, 4), (6, 7)):
        one, other = states(run, before), states(run, after)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.equal(other[name], tensor), f"{name} changed in step {after}"
    learnt, next_learnt = states(run, 4), states(run, 5)
    steps = [name for name in learnt if name.endswith("/step")]
    assert {float(learnt[name]) for name in steps} == {2.0}
    assert {float(next_learnt[name]) for name in steps} == {3.0}


@pytest.mark.parametrize(("precision", "stage"), KINDS)
def test_what_was_skipped_leaves_nothing_in_the_next_gradient(
    folder: Path, metric: Callable[[Path, str], dict[int, float]], precision: str, stage: int
) -> None:
    reference = folder / f"{precision[:4]}-1"
    for name in ("train/loss", "train/grad_norm"):
        values = metric(folder / f"{precision}-{stage}", name)
        assert list(values) == [1, 2, 5, 6, 8]
        assert values == pytest.approx(metric(reference, name), rel=1e-3 if "fp32" in precision else 3e-2), name
    tokens = metric(folder / f"{precision}-{stage}", "train/tokens")
    assert tokens == {step: 512 * step for step in range(1, 9)}
    assert metric(folder / f"{precision}-{stage}", "train/skipped_steps") == {3: 1, 4: 2, 5: 2, 6: 2, 7: 3, 8: 3}


def bad_steps(run: Path) -> dict[int, dict[str, Any]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["bad_step"] for record in records if "bad_step" in record}


@pytest.mark.parametrize(("precision", "stage"), KINDS)
def test_what_was_skipped_is_recorded(folder: Path, precision: str, stage: int) -> None:
    found = bad_steps(folder / f"{precision}-{stage}")
    assert [found[step]["samples"] for step in (3, 4, 7)] == [list(range(a, a + 8)) for a in (16, 24, 48)]
    assert found[3]["fault"] == "loss nan"
    assert found[3]["loss"] == "nan"
    assert found[4]["fault"].startswith("gradient norm ")
    assert 4 < found[4]["loss"] < 7
    assert "robust deviations above the median" in found[7]["fault"]
    assert found[7]["loss"] > 10
    assert found[7]["grad_norms"].keys() == {"embedding", "positions", "layers.0", "layers.1", "norm"}
    assert all(norm > 0 for norm in found[7]["grad_norms"].values())
    assert all(entry["skipped"] for entry in found.values())


def test_norms_by_layer_agree_over_stages_and_add_up(folder: Path) -> None:
    whole = bad_steps(folder / "fp32-0")[7]["grad_norms"]
    for stage in (1, 2, 3):
        assert bad_steps(folder / f"fp32-{stage}")[7]["grad_norms"] == pytest.approx(whole, rel=1e-3)


def test_a_run_over_its_budget_goes_on_with_a_larger_one_as_if_it_had_never_stopped(
    folder: Path, metric: Callable[[Path, str], dict[int, float]]
) -> None:
    stopped = [json.loads(line) for line in (folder / "over/metrics.jsonl").read_text().splitlines()]
    assert [r["status"] for r in stopped if "status" in r] == ["RUNNING", "FAILED", "RUNNING", "FINISHED"]
    assert [r["bad_step"]["skipped"] for r in stopped if "bad_step" in r] == [True, True, False, True]
    for name in ("train/loss", "train/grad_norm", "train/skipped_steps"):
        assert metric(folder / "over", name) == metric(folder / "fp32-2", name)
    for name, tensor in states(folder / "fp32-2", 8).items():
        assert torch.equal(states(folder / "over", 8)[name], tensor), name


def test_a_rollback_goes_on_from_before_the_bad_steps_without_their_samples(
    folder: Path, metric: Callable[[Path, str], dict[int, float]]
) -> None:
    run = folder / "back"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (child,) = [number for number, record in enumerate(records) if "rollback" in record]
    assert records[child]["rollback"]["step"] == 2
    assert records[child]["rollback"]["bad_steps"] == [3, 4, 7]
    assert records[child]["rollback"]["samples"] == [[16, 32], [48, 56]]
    later = [record for record in records[child:] if "train/loss" in record.get("metrics", {})]
    assert [record["step"] for record in later] == [3, 4, 5, 6, 7, 8]
    assert not any("bad_step" in record for record in records[child:])
    data = json.loads((run / "checkpoints/step-00000008/manifest.json").read_text())["data"]
    assert (data["next_sample"], data["skipped"]) == (8 * 8 + 24, [[16, 32], [48, 56]])
    aside = sorted(path.name for path in (run / "checkpoints/rolled-back").iterdir())
    assert aside == [f"step-{step:08d}" for step in (3, 4, 5, 6)]
    assert not (run / "OVER_BUDGET").exists()
    # What is learnt in step 3 now is what step 5 learnt with the skips: weights and samples are the same.
    losses = metric(folder / "fp32-3", "train/loss")
    assert later[0]["metrics"]["train/loss"] == losses[5]
