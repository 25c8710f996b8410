"""The learning rate as a function of tokens."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.config import RunConfig, load_run_config
from launch.schedule import learning_rate

PEAK = 1e-2


@pytest.fixture
def config(write_config: Callable[..., Path]) -> Callable[..., RunConfig]:
    def make(tokens_per_step: int = 128, **schedule: Any) -> RunConfig:
        train = {"tokens": 128_000, "tokens_per_step": tokens_per_step, "micro_batch": 1}
        return load_run_config(write_config(train=train, schedule=schedule, optimizer={"lr": PEAK}))

    return make


def curve(config: RunConfig) -> list[float]:
    return [learning_rate(config, step) for step in range(config.steps)]


def test_linear(config: Callable[..., RunConfig]) -> None:
    lrs = curve(config(kind="linear", warmup_tokens=12_800, final_fraction=0.1))
    assert len(lrs) == 1000
    assert lrs[0] == pytest.approx(PEAK * 0.5 / 100)
    assert lrs[49] == pytest.approx(PEAK * 49.5 / 100)
    assert max(lrs) == pytest.approx(PEAK, rel=0.01)
    assert lrs[549] == pytest.approx(PEAK * (0.1 + 0.9 * (1 - 449.5 / 900)))
    assert lrs[999] == pytest.approx(PEAK * (0.1 + 0.9 * 0.5 / 900))


def test_cosine(config: Callable[..., RunConfig]) -> None:
    lrs = curve(config(kind="cosine"))
    assert lrs[249] == pytest.approx(PEAK * 0.5 * (1 + math.cos(math.pi * 0.2495)))
    assert lrs[499] == pytest.approx(PEAK / 2, rel=0.01)
    assert all(before > after for before, after in itertools.pairwise(lrs))


def test_warm_up_stable_decay(config: Callable[..., RunConfig]) -> None:
    lrs = curve(config(kind="wsd", warmup_tokens=12_800, decay_tokens=25_600))
    assert set(lrs[100:800]) == {PEAK}
    assert lrs[99] < PEAK
    assert lrs[899] == pytest.approx(PEAK * (1 - 99.5 / 200))
    assert 0 < lrs[999] < PEAK / 100


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_tokens_decide_and_not_steps(config: Callable[..., RunConfig], kind: str) -> None:
    fine, coarse = curve(config(kind=kind, warmup_tokens=25_600)), curve(config(1280, kind=kind, warmup_tokens=25_600))
    for step, lr in enumerate(coarse):
        around = fine[10 * step : 10 * step + 10]
        assert min(around) <= lr <= max(around)
