"""Processes, accumulation and ZeRO stages change how a step is computed, never what it computes."""

import gzip
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flash_model.export import load_model
from flash_model.generate import generate_text, load_tokenizer

STAGES = (0, 1, 2, 3)
COMPILED_STAGES = (1, 3)
# The short last window of the data is in the first step (tests assert it), so that masks are unequal.
SAMPLES = 4
SEEN_STAGES = (1, 3)
SEEN = [
    "evaluate.every_tokens=2048",
    "samples.prompts=[The,'']",
    "samples.max_tokens=20",
    "layer_metrics.every_steps=3",
]
SEEN += ["profile.steps=[2]", "profile.ranks=all", "checkpoint.every_tokens=1024", "checkpoint.background=false"]
"""All that looks at a run."""


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

    compiled = ["train.compile=true", "layer_metrics.every_steps=4"]
    more = [train(f"compiled-{stage}", stage, *compiled) for stage in COMPILED_STAGES]
    more += [train(f"seen-{stage}", stage, *SEEN) for stage in SEEN_STAGES]
    run_cases(folder, [gradient(1), train("one", 1)], 1)
    again = ["train.compile=true", "train.activation_checkpointing=all", "train.mock_step=true"]
    recomputed = [train("recomputed-3", 3, "train.activation_checkpointing=[1]"), train("again", 3, *again)]
    two = [train(f"two-{stage}", stage) for stage in STAGES]
    offloaded = [train("offloaded", 3, "train.offload=all")]
    run_cases(folder, [gradient(2), *two, *more, *recomputed, *offloaded], 2)
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


@pytest.mark.parametrize("stage", SEEN_STAGES)
def test_looking_at_a_run_changes_no_bit(
    folder: Path, metric: Callable[[Path, str], dict[int, float]], stage: int
) -> None:
    for name in ("train/loss", "train/grad_norm", "valid/loss"):
        seen, unseen = (metric(folder / f"{kind}-{stage}", name) for kind in ("seen", "two"))
        assert {step: seen[step] for step in unseen} == unseen, name
    path = "checkpoints/step-00000008/model/model.safetensors"
    seen_weights, weights = (load_file(folder / f"{kind}-{stage}" / path) for kind in ("seen", "two"))
    assert all(torch.equal(seen_weights[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("stage", SEEN_STAGES)
def test_the_model_writes_at_each_evaluation(folder: Path, stage: int) -> None:
    run = folder / f"seen-{stage}"
    names = ["step-00000004.md", "step-00000008.md"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == names
    text = (run / "samples" / names[-1]).read_text()
    assert text.startswith("# Step 8, 4,096 tokens\n\n")
    first, second = re.findall(r"````text\n(.*?)\n````", text, re.DOTALL)
    assert first.startswith("The")
    assert len(first) > 10
    assert len(second) > 5
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["text"] for record in records if "text" in record] == [f"samples/{name}" for name in names]
    # What was generated is what the saved model generates.
    model = load_model(run / "checkpoints/step-00000008")
    assert second == generate_text(
        model, load_tokenizer(run / "checkpoints/step-00000008/model"), "", max_tokens=20, temperature=0.8
    )


@pytest.mark.parametrize(
    "run", [*(f"seen-{stage}" for stage in SEEN_STAGES), *(f"compiled-{s}" for s in COMPILED_STAGES)]
)
def test_norms_by_layer(folder: Path, metric: Callable[[Path, str], dict[int, float]], run: str) -> None:
    steps = [4, 8] if "compiled" in run else [3, 6]
    total = metric(folder / run, "train/grad_norm")
    parts = [
        metric(folder / run, f"layers/grad_norm/{name}") for name in ("embedding", "positions", "00", "01", "norm")
    ]
    for step in steps:
        assert math.hypot(*(norms[step] for norms in parts)) == pytest.approx(total[step], rel=1e-6)
    for layer in ("00", "01"):
        rms, largest = (metric(folder / run, f"layers/activation_{kind}/{layer}") for kind in ("rms", "max"))
        assert list(rms) == list(largest) == steps
        assert all(0 < rms[step] < largest[step] < 100 * rms[step] for step in steps)
    assert metric(folder / "seen-3", "layers/activation_rms/01") == pytest.approx(
        metric(folder / "seen-1", "layers/activation_rms/01"), rel=1e-4
    )


@pytest.mark.parametrize("stage", SEEN_STAGES)
def test_a_trace_shows_phases_and_ops(folder: Path, stage: int) -> None:
    profiles = folder / f"seen-{stage}" / "profiles"
    assert sorted(path.name for path in profiles.iterdir()) == [f"rank{rank}-step2.json.gz" for rank in (0, 1)]
    for path in profiles.iterdir():
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
        names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
        assert [names.count(phase) for phase in ("data", "forward", "backward", "step")] == [1, 2, 2, 1]
        assert any("mixed_chunk" in str(event.get("name")) for event in events if event.get("cat") == "cpu_op")
