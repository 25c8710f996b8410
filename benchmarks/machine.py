"""The machine under the benchmark: what it is, what it can do at best, and how its work is timed."""

import datetime
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flash_model.flops import data_sheet_tflops

HEAD_START_CYCLES = 4_000_000  # about 2 ms: longer than Python takes to enqueue what is timed
REPETITION_SECONDS = 0.3  # how long a short run is repeated
CACHE_BYTES = 2**28  # written between repetitions; several times the L2 cache of any GPU


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_milliseconds(run: Callable[[], object], device: torch.device, *, repetitions: int | None = None) -> float:
    """Return the median time of `run` on `device` in milliseconds, warm and with a cold cache.

    On a GPU, device time between events: each repetition is enqueued whole while the GPU still sleeps, so that the
    time Python takes to launch is not in it. repetitions: default as many as fit REPETITION_SECONDS, 5 to 50.
    """
    run()
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    seconds = time.perf_counter() - began
    repetitions = repetitions or min(50, max(5, int(REPETITION_SECONDS / seconds)))
    if device.type != "cuda":
        return statistics.median(_wall_milliseconds(run) for _ in range(repetitions))
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)]
    for start, end in events:
        cache.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        run()
        end.record()
    synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events)


def _wall_milliseconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return date, commit, versions, GPU and its measured ceilings: copy in GB/s, bf16 product in TFLOP/s."""
    described: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }
    described["data_sheet_tflops"] = data_sheet_tflops(described["device"])
    described["copy_gb_per_s"] = _copy_rate(2**30 if device.type == "cuda" else 2**20, device)
    described["matmul_tflops"] = _product_rate(8192 if device.type == "cuda" else 256, device)
    return described


def _copy_rate(elements: int, device: torch.device) -> float:
    source = torch.empty(elements, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    return 4e-6 * elements / median_milliseconds(lambda: target.copy_(source), device)


def _product_rate(side: int, device: torch.device) -> float:
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    return 2e-9 * side**3 / median_milliseconds(lambda: a @ b, device)


def _commit() -> str | None:
    if "GIT_COMMIT" in os.environ:  # of a copy of the working tree without its history
        return os.environ["GIT_COMMIT"]
    here = str(Path(__file__).resolve().parent)
    commit = _output("git", "-C", here, "rev-parse", "--short=12", "HEAD")
    changed = commit and _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if changed else commit


def _triton_version() -> str | None:
    try:
        import triton  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return None
    version: str = triton.__version__
    return version


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] or None


class TimeLimit:
    """Says when the next part of a benchmark no longer fits its seconds; it is taken to last as long as the last."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._part_start = time.monotonic()
        self._spent = False

    def allows_another(self) -> bool:
        """Whether another part is to be started; called before each. Once no, always no."""
        now = time.monotonic()
        previous, self._part_start = now - self._part_start, now
        self._spent = self._spent or (self._end is not None and now + previous > self._end)
        return not self._spent
