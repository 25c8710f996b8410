"""A run goes on with another number of processes, micro batch or ZeRO stage."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch.checkpoint import read_manifest
from launch.conversion import Records

STAGES = {"fp32": (0, 1, 2, 3), "bf16": (1, 2, 3)}
KINDS = [(precision, stage) for precision, stages in STAGES.items() for stage in stages]
PAIRS = [(p, old, new) for p, stages in STAGES.items() for old, new in itertools.product(stages, repeat=2)]
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-3}
ZERO = "deepspeed.zero_optimization"
# Other layouts of the same stage: (precision, stage, setting).
LAYOUTS = {
    "sub-groups": ("fp32", 3, f"{ZERO}.sub_group_size=5000"),
    "persistent": ("bf16", 3, f"{ZERO}.stage3_param_persistence_threshold=1000000"),
    "round-robin": ("fp32", 2, f"{ZERO}.round_robin_gradients=true"),
    "aligned": ("fp32", 1, f"{ZERO}.parameter_alignment=true"),
    "offloaded": ("bf16", 1, "train.offload=optimizer"),
    "all-offloaded": ("bf16", 3, "train.offload=all"),
}
SAME = ("persistent", "all-offloaded")  # parameters lie in the same places, on another device or whole


def after(precision: str, stage: int, steps: int) -> int:
    stages = STAGES[precision]
    return stages[(stages.index(stage) + steps) % len(stages)]


@pytest.fixture(scope="module")
def folder(run_cases: Callable[..., list[int]], run_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 12 steps by two processes; the same, but stopped after 3 steps, continued by one process with another
    stage, stopped again and continued by two with a third one. And checkpoints loaded and saved by every stage.
    """
    folder = tmp_path_factory.mktemp("conversion")

    def case(name: str, precision: str, stage: int, *extra: str, action: str = "train", **more: Any) -> dict[str, Any]:
        overrides = [f"run.dir={folder / name}", f"train.precision={precision}", f"train.zero_stage={stage}"]
        overrides += ["train.tokens=6144", *extra]
        return {"config": str(run_config), "overrides": overrides, "action": action, **more}

    def resaves(processes: int, source: str) -> list[dict[str, Any]]:
        def resave(output: str, origin: str, precision: str, stage: int, *extra: str) -> dict[str, Any]:
            paths = {"source": str(folder / origin), "output": str(folder / output)}
            return case("none", precision, stage, *extra, action="resave", **paths)

        cases = []
        for precision, old, new in PAIRS:
            output = f"{precision}-{old}-{new}-by-{processes}/checkpoints"
            cases.append(resave(output, source.format(precision, old), precision, new))
        for name, (precision, stage, setting) in LAYOUTS.items():
            there, back = f"{name}-by-{processes}", f"{name}-back-by-{processes}"
            cases.append(resave(f"{there}/checkpoints", source.format(precision, stage), precision, stage, setting))
            cases.append(resave(f"{back}/checkpoints", there, precision, stage))
        return cases

    def starts(processes: int) -> list[dict[str, Any]]:
        still = ["train.tokens=512", "optimizer.lr=1e-30", "schedule.warmup_tokens=0"]
        still.append(f"run.init_from={folder / 'bf16-1-cut'}")
        return [case(f"started-{p}-{stage}-by-{processes}", p, stage, *still) for p, stage in KINDS]

    first = [case(f"{p}-whole", p, 2) for p in STAGES]
    first += [case(f"{p}-{stage}", p, stage, stop_after=3) for p, stage in KINDS]
    assert run_cases(folder, first, 2) == [0] * 2 + [75] * 7
    for precision, stage in KINDS:
        shutil.copytree(folder / f"{precision}-{stage}", folder / f"{precision}-{stage}-cut")

    second = [
        case(f"{p}-{old}", p, after(p, old, 1), "run.resume=must", "train.micro_batch=4", stop_after=6)
        for p, old in KINDS
    ]
    cases = [*second, *starts(1), *resaves(1, "{}-{}-cut")]
    assert run_cases(folder, cases, 1) == [75] * 7 + [0] * (len(cases) - 7)
    third = [case(f"{p}-{old}", p, after(p, old, 2), "run.resume=must", "train.micro_batch=1") for p, old in KINDS]
    cases = [*third, *starts(2), *resaves(2, "{0}-{1}-{1}-by-1")]
    assert run_cases(folder, cases, 2) == [0] * len(cases)
    return folder


@pytest.mark.parametrize(("precision", "stage"), KINDS)
def test_losses_go_on(
    folder: Path, metric: Callable[[Path, str], dict[int, float]], precision: str, stage: int
) -> None:
    whole, changed = folder / f"{precision}-whole", folder / f"{precision}-{stage}"
    attempts = [line for line in (changed / "metrics.jsonl").read_text().splitlines() if '"train/loss"' in line]
    assert [sum(f'"attempt": {n}' in line for line in attempts) >= 1 for n in (0, 1, 2)] == [True] * 3
    losses = metric(changed, "train/loss")
    assert losses == pytest.approx(metric(whole, "train/loss"), abs=TOLERANCE[precision])
    assert len(losses) == 12
    assert losses[12] < losses[1] - 0.5, "the run does not learn: equal losses would show nothing"
    assert metric(changed, "train/lr") == metric(whole, "train/lr")
    states = [read_manifest(run / "checkpoints/step-00000012")["data"] for run in (changed, whole)]
    assert states[0] == states[1]


def manifest_of(run: Path) -> dict[str, Any]:
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    return read_manifest(checkpoint)


def records(run: Path) -> Records:
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    return Records(checkpoint, read_manifest(checkpoint))


def assert_equal(found: Records, expected: Records) -> None:
    assert sorted(found.shapes) == sorted(expected.shapes)
    for record in expected:
        other = found[record.name]
        assert other.shape == record.shape
        assert other.step == record.step >= 3
        for what in ("weight", "exp_avg", "exp_avg_sq"):
            assert record.read(what).abs().max() > 0, f"{record.name} {what}"
            assert torch.equal(other.read(what), record.read(what)), f"{record.name} {what}"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("precision", "old", "new"), PAIRS)
def test_every_stage_loads_every_other_exactly(
    folder: Path, precision: str, old: int, new: int, processes: int
) -> None:
    """By one process what two have saved, then by two what one has saved."""
    saved = folder / f"{precision}-{old}-{new}-by-{processes}"
    assert_equal(records(saved), records(folder / f"{precision}-{old}-cut"))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("precision", "stage"), KINDS)
def test_a_new_run_starts_from_the_weights(folder: Path, precision: str, stage: int, processes: int) -> None:
    """Its first step has a learning rate that changes nothing."""
    origin = records(folder / "bf16-1-cut")
    for record in records(folder / f"started-{precision}-{stage}-by-{processes}"):
        assert record.step == 1
        assert torch.equal(record.read("weight"), origin[record.name].read("weight")), record.name


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_of_a_stage(folder: Path, layout: str, processes: int) -> None:
    precision, stage, _ = LAYOUTS[layout]
    expected = records(folder / f"{precision}-{stage}-cut")
    layouts = [manifest_of(folder / f"{name}-by-{processes}")["layout"] for name in (layout, f"{layout}-back")]
    # A process alone has whole parameters anyway, in the order that it had.
    assert layouts[0] != layouts[1] or (processes == 1 and layout == "round-robin") or layout in SAME
    for saved in (f"{layout}-by-{processes}", f"{layout}-back-by-{processes}"):
        assert_equal(records(folder / saved), expected)


@pytest.mark.parametrize(("precision", "stage"), KINDS)
def test_records_are_what_the_export_holds(folder: Path, precision: str, stage: int) -> None:
    (checkpoint,) = (folder / f"{precision}-{stage}-cut/checkpoints").glob("step-*")
    exported = load_file(checkpoint / "model/model.safetensors")
    for record in Records(checkpoint, read_manifest(checkpoint)):
        assert torch.equal(record.read("weight").view(record.shape), exported.pop(record.name)), record.name
    assert not exported
