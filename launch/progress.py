"""What a person sees of a running job: one line a step, in a terminal or a log file."""

import os
import time

import torch

from launch.config import RunConfig
from launch.engine import Processes

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0, "L40S": 362.0, "B200": 2250.0}
"""Dense bf16 matrix throughput by the vendor's data sheets, TFLOP/s."""


def say(message: str) -> None:
    """Print a line, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


class Pace:
    """Times the steps and keeps what is known of speed."""

    def __init__(self, config: RunConfig, training_flops_per_token: float, processes: Processes) -> None:
        self._tokens = config.train.tokens_per_step
        self._flops = training_flops_per_token
        self._world_size = processes.world_size
        self._gpu = processes.device.type == "cuda"
        self._peak = config.train.peak_tflops or self._known_peak(config)
        self._recent: list[float] = []
        self._began = self._ready = 0.0
        self._mark: float | None = None
        self.metrics: dict[str, float] = {}

    def _known_peak(self, config: RunConfig) -> float | None:
        if not self._gpu or config.train.precision != "bf16":
            return None
        name = torch.cuda.get_device_name()
        return next((peak for model, peak in PEAK_TFLOPS.items() if model in name), None)

    def start_step(self) -> None:
        """A step begins: right where the one before ended, unless something else took place in between."""
        self._began = time.perf_counter() if self._mark is None else self._mark

    def data_ready(self) -> None:
        """The step's batches are there."""
        self._ready = time.perf_counter()

    def end_step(self) -> None:
        """The update is done."""
        self._mark = time.perf_counter()
        seconds = self._mark - self._began
        self._recent = [*self._recent[-49:], seconds]
        speed = self._tokens / seconds
        self.metrics = {
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": speed,
            "perf/data_wait_fraction": (self._ready - self._began) / seconds,
        }
        if self._peak:
            self.metrics["perf/mfu"] = speed * self._flops / (self._world_size * self._peak * 1e12)
        if self._gpu:
            self.metrics["perf/gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30

    def pause(self) -> None:
        """What happened since the last step (evaluation, saving) does not count as training."""
        self._mark = None

    def seconds_left(self, steps: int) -> float:
        """Expected seconds of `steps` more steps, from the median of recent ones."""
        return sorted(self._recent)[len(self._recent) // 2] * steps if self._recent else float("nan")


def progress_line(config: RunConfig, step: int, metrics: dict[str, float], pace: Pace, fault: str | None = None) -> str:
    """One line: step, tokens, loss, learning rate, gradient norm, speed, utilisation, memory, steps skipped lately,
    time left; of a bad step what was wrong with it.
    """
    number = f"step {step:>{len(str(config.steps))}}/{config.steps}"
    if fault:
        return f"{number}  BAD, not learnt from: {fault}"
    parts = [
        number,
        f"tokens {_short(metrics['train/tokens'])}",
        f"loss {metrics['train/loss']:.4f}",
        f"lr {metrics['train/lr']:.2e}",
        f"grad {metrics['train/grad_norm']:.3f}",
        f"{_short(metrics['perf/tokens_per_second'])} tok/s",
    ]
    if "perf/mfu" in metrics:
        parts.append(f"mfu {metrics['perf/mfu']:.1%}")
    if "perf/gpu_memory_gib" in metrics:
        parts.append(f"mem {metrics['perf/gpu_memory_gib']:.1f} GiB")
    if "train/skipped_steps" in metrics:
        parts.append(f"skipped {metrics['train/skipped_steps']:.0f}")
    parts.append(f"left {duration(pace.seconds_left(config.steps - step))}")
    return "  ".join(parts)


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Seconds as a person writes them: 45s, 3m20s, 2h05m, 4d03h."""
    if seconds != seconds:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
