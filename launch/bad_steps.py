"""Steps that must not be learnt from: a loss or gradient norm that is no number, a loss that jumps."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launch.operation_config import BadStepsSection

Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of sample numbers, in order."""

TO_SIGMA = 1.4826
"""The median absolute deviation of a normal distribution times this is its standard deviation."""
SMALLEST_DEVIATION = 1e-3
"""Of the median: losses that hardly differ would make a spike of every small change."""


@dataclass(frozen=True)
class History:
    """What the next step is judged by; a checkpoint holds it, so that a resumed run judges as an undisturbed one.

    Attributes:
        losses: of the last steps that were learnt from.
        skipped: the steps skipped lately, each with its samples.
    """

    losses: tuple[float, ...] = ()
    skipped: tuple[tuple[int, Ranges], ...] = ()

    def learnt(self, loss: float, settings: BadStepsSection) -> "History":
        """With the loss of one more step."""
        return replace(self, losses=(*self.losses, loss)[-settings.spike_window :])

    def skip(self, step: int, samples: Sequence[int], settings: BadStepsSection) -> "History":
        """With one more skipped step; those that have left the budget are forgotten."""
        return replace(self, skipped=(*self.counted(step, settings), (step, sample_ranges(samples))))

    def counted(self, step: int, settings: BadStepsSection) -> tuple[tuple[int, Ranges], ...]:
        """The skipped steps that count for the budget at `step`."""
        return tuple(entry for entry in self.skipped if entry[0] > step - settings.budget_steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"losses": list(self.losses), "skipped": [[step, list(ranges)] for step, ranges in self.skipped]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "History":
        """The history that `to_dict` described; an empty one for the {} of older checkpoints."""
        skipped = tuple((step, tuple((a, b) for a, b in ranges)) for step, ranges in data.get("skipped", ()))
        return cls(tuple(data.get("losses", ())), skipped)


def find_fault(history: History, loss: float, grad_norm: float, settings: BadStepsSection) -> str | None:
    """Why a step is bad, or None. The same numbers give the same answer in every process."""
    if not math.isfinite(loss):
        return f"loss {loss}"
    if not math.isfinite(grad_norm):
        return f"gradient norm {grad_norm}"
    if settings.spike_threshold is not None and len(history.losses) == settings.spike_window:
        score = robust_z(loss, history.losses)
        if score > settings.spike_threshold:
            median = statistics.median(history.losses)
            return f"loss {loss:.4f}, {score:.1f} robust deviations above the median {median:.4f}"
    return None


def robust_z(value: float, others: Sequence[float]) -> float:
    """Distance of `value` from the median of `others`, in standard deviations estimated from their median absolute
    deviation (Iglewicz & Hoaglin 1993).
    """
    median = statistics.median(others)
    deviation = TO_SIGMA * statistics.median(abs(other - median) for other in others)
    return (value - median) / max(deviation, SMALLEST_DEVIATION * abs(median), 1e-30)


def sample_ranges(samples: Iterable[int]) -> Ranges:
    """Sample numbers as the fewest half-open ranges."""
    ranges: list[tuple[int, int]] = []
    for sample in sorted(set(samples)):
        if ranges and ranges[-1][1] == sample:
            ranges[-1] = (ranges[-1][0], sample + 1)
        else:
            ranges.append((sample, sample + 1))
    return tuple(ranges)


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The union of half-open ranges."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def describe_ranges(ranges: Iterable[tuple[int, int]]) -> str:
    """Ranges of samples as a person writes them: 8–15, 40."""
    return ", ".join(str(start) if stop == start + 1 else f"{start}–{stop - 1}" for start, stop in ranges)


def bad_step_record(
    fault: str, samples: list[int], loss: float, grad_norms: dict[str, float], *, skipped: bool
) -> dict[str, Any]:
    """What is kept of a bad step, as plain data; `grad_norms` by layer. Numbers that are not finite become text."""
    return {
        "fault": fault,
        "skipped": skipped,
        "samples": samples,
        "loss": _plain(loss),
        "grad_norms": {layer: _plain(norm) for layer, norm in grad_norms.items()},
    }


def over_budget_message(history: History, settings: BadStepsSection) -> str:
    """Why the run stops, naming steps and samples, and what can be done."""
    steps = "; ".join(f"step {step} (samples {describe_ranges(ranges)})" for step, ranges in history.skipped)
    return (
        f"error: {len(history.skipped)} bad steps within {settings.budget_steps:,} are over bad_steps.budget "
        f"{settings.budget}: {steps}. None of them was learnt from. Go back before them and pass over their samples "
        "with --rollback, or go on from here with --resume and a lower optimizer.lr or a larger bad_steps.budget"
    )


def _plain(number: float) -> float | str:
    """For JSON, which knows neither nan nor inf."""
    return number if math.isfinite(number) else str(number)
