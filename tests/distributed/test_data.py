"""What reaches the loop: masked language models, mixtures, and steps prepared ahead."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Metric = Callable[[Path, str], dict[int, float]]
MASKED_STEPS = 60


@pytest.fixture(scope="module")
def folder(
    run_cases: Callable[..., list[int]], run_config: Path, prepared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Masked and mixed runs; each mixed one is also stopped after 3 steps and continued in another launch."""
    folder = tmp_path_factory.mktemp("data")
    data = str(prepared_data)
    mixture = f"[{{path: {data}, weight: 0.7}}, {{path: {data}, split: valid, weight: 0.3, name: rest}}]"
    kinds = {
        "mixed": ["data.path=null", f"data.mixture={mixture}"],
        "masked": [
            "model.causal=false",
            "model.norm=scalenorm",
            "data.masked_lm={}",
            f"train.tokens={MASKED_STEPS * 512}",
        ],
    }

    def case(name: str, kind: str, *extra: str, **more: Any) -> dict[str, Any]:
        overrides = [f"run.dir={folder / name}", *kinds[kind], *extra]
        return {"config": str(run_config), "overrides": overrides, "action": "train", **more}

    first = [
        case("masked", "masked"),
        case("masked-not-ahead", "masked", "data.prefetch=0"),
        case("mixed", "mixed"),
        case("mixed-far-ahead", "mixed", "data.prefetch=7"),
        case("mixed-cut", "mixed", stop_after=3),
    ]
    assert run_cases(folder, first, 2) == [0, 0, 0, 0, 75]
    assert run_cases(folder, [case("mixed-cut", "mixed", "run.resume=must", "data.prefetch=1")], 2) == [0]
    return folder


@pytest.mark.parametrize(
    ("one", "other"), [("masked", "masked-not-ahead"), ("mixed", "mixed-far-ahead"), ("mixed", "mixed-cut")]
)
def test_prefetch_and_restarts_change_nothing(folder: Path, metric: Metric, one: str, other: str) -> None:
    for name in ("train/loss", "train/grad_norm", "train/lr", "valid/loss"):
        assert metric(folder / one, name) == metric(folder / other, name), name
    (last,) = {path.name for run in (one, other) for path in newest(folder / run)}
    weights, expected = (
        load_file(folder / run / "checkpoints" / last / "model/model.safetensors") for run in (one, other)
    )
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    states = [json.loads((folder / run / "checkpoints" / last / "manifest.json").read_text()) for run in (one, other)]
    assert states[0]["data"] == states[1]["data"]
    assert states[0]["data"]["next_sample"] == 8 * states[0]["step"], "what was only prepared is not counted"


def newest(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))[-1:]


def test_a_masked_model_learns(folder: Path, metric: Metric) -> None:
    losses = list(metric(folder / "masked", "train/loss").values())
    assert losses[0] == pytest.approx(math.log(384), rel=0.05)
    (scored,) = metric(folder / "masked", "valid/loss").values()
    assert scored < losses[0] - 0.3
    # A loss over hidden tokens is no likelihood of the text.
    for name in ("valid/bits_per_byte", "valid/perplexity"):
        assert metric(folder / "masked", name) == {}
    waited = metric(folder / "masked", "perf/data_wait_fraction")
    assert len(waited) == MASKED_STEPS
    assert all(0 <= fraction < 1 for fraction in waited.values())


def test_a_mixtures_datasets_are_recorded_each(folder: Path) -> None:
    facts = json.loads((folder / "mixed/run.json").read_text())["datasets"]
    assert [entry["context"] for entry in facts] == ["training/data", "training/rest", "valid"]
