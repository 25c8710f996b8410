"""Load of a node, sampled by a process of its own as long as the trainer that started it lives.

Each sample is a line of RUN_DIR/system/NODE.jsonl, in the form of metrics.jsonl; `launch.replay` sends it on. A trainer
that hangs is sampled too, a server that is dead costs no sample, and what cannot be read is left out. Names and units
are MLflow's, so that its pages show them as system metrics. A sample's step is its number, counted on by every restart.
"""

import argparse
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from launch.records import drop_torn_line, last_record

FIRST_SECONDS = 1.0
"""The first sample comes so early that a short run has one; a processor's utilisation needs a while to be one."""


class Load:
    """Reads the load of this machine, of the disk that `run_dir` is on and of the process `trainer`."""

    def __init__(self, run_dir: Path, trainer: int) -> None:
        self._run_dir, self._trainer = run_dir, trainer
        self._gpus = visible_gpus()
        self._received, self._sent = _network_bytes()
        psutil.cpu_percent()

    def read(self) -> dict[str, float]:
        """Percentages, megabytes (10⁶ bytes; of the network since the start) and watts by name."""
        found: dict[str, float] = {}
        parts: tuple[Callable[[], Iterator[tuple[str, float]]], ...] = (
            self._processors,
            self._disk,
            self._network,
            self._process,
            self._graphics,
        )
        for part in parts:
            with suppress(Exception):  # whatever it is, the next sample and the other parts come all the same
                found |= {name: round(value, 1) for name, value in part()}
        return found

    def _processors(self) -> Iterator[tuple[str, float]]:
        yield "cpu_utilization_percentage", psutil.cpu_percent()
        memory = psutil.virtual_memory()
        yield "system_memory_usage_megabytes", memory.used / 1e6
        yield "system_memory_usage_percentage", memory.percent

    def _disk(self) -> Iterator[tuple[str, float]]:
        disk = psutil.disk_usage(str(self._run_dir))
        yield "disk_usage_percentage", disk.percent
        yield "disk_usage_megabytes", disk.used / 1e6
        yield "disk_available_megabytes", disk.free / 1e6

    def _network(self) -> Iterator[tuple[str, float]]:
        received, sent = _network_bytes()
        yield "network_receive_megabytes", (received - self._received) / 1e6
        yield "network_transmit_megabytes", (sent - self._sent) / 1e6

    def _process(self) -> Iterator[tuple[str, float]]:
        yield "process_memory_megabytes", psutil.Process(self._trainer).memory_info().rss / 1e6

    def _graphics(self) -> Iterator[tuple[str, float]]:
        import pynvml

        for index, gpu in self._gpus.items():
            with suppress(pynvml.NVMLError):
                memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
                yield f"gpu_{index}_memory_usage_megabytes", memory.used / 1e6
                yield f"gpu_{index}_memory_usage_percentage", 100 * memory.used / memory.total
            with suppress(pynvml.NVMLError):
                yield f"gpu_{index}_utilization_percentage", pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
            with suppress(pynvml.NVMLError):
                milliwatts, limit = pynvml.nvmlDeviceGetPowerUsage(gpu), pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu)
                yield f"gpu_{index}_power_usage_watts", milliwatts / 1e3
                yield f"gpu_{index}_power_usage_percentage", 100 * milliwatts / limit


def visible_gpus() -> dict[int, Any]:
    """NVML's handles of the GPUs that the trainers of this node may use, by NVML's number; none without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = {i: pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())}
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        if chosen is None:
            return handles
        names = [name.strip() for name in chosen.split(",") if name.strip()]
        uuids = {index: pynvml.nvmlDeviceGetUUID(handle) for index, handle in handles.items()}
    except ImportError:
        if Path("/dev/nvidiactl").exists():
            print("GPUs are not sampled: `pip install nvidia-ml-py` brings what reads them", file=sys.stderr)
        return {}
    except Exception:
        return {}
    return {i: h for i, h in handles.items() if str(i) in names or any(uuids[i].startswith(n) for n in names)}


def _network_bytes() -> tuple[int, int]:
    counters = psutil.net_io_counters()
    return (counters.bytes_recv, counters.bytes_sent) if counters else (0, 0)


def sample(path: Path, load: Load, *, prefix: str, attempt: int, seconds: float, parent: int) -> None:
    """Append a sample to `path` every `seconds`, and a last one when standard input or the process `parent` ends."""
    drop_torn_line(path)
    before = last_record(path)
    step = 0 if before is None else before["step"] + 1
    due = time.monotonic() + min(FIRST_SECONDS, seconds)
    over = False
    while not over:
        # Standard input ends when the trainer closes it or dies, unless a child of its has it too.
        wait = min(max(due - time.monotonic(), 0), 1.0)
        over = bool(select.select([sys.stdin], [], [], wait)[0]) or os.getppid() != parent
        if not over and time.monotonic() < due:
            continue
        due = max(due + seconds, time.monotonic())
        metrics = {f"{prefix}{name}": value for name, value in load.read().items()}
        record = {"time": round(time.time(), 3), "attempt": attempt, "step": step, "metrics": metrics}
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            step += 1
        except OSError:  # a full disk may have room again later
            drop_torn_line(path)


def main() -> int:
    """Command line, for the trainer."""
    parser = argparse.ArgumentParser(prog="python -m launch.system_metrics", description=__doc__)
    parser.add_argument("file", type=Path, help="RUN_DIR/system/NODE.jsonl")
    parser.add_argument("--prefix", required=True, help="what the metrics' names start with")
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="interval")
    parser.add_argument("--follow", type=int, required=True, metavar="PID", help="the process that started this one")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # for the trainer, which saves before it ends: this one ends with it
    path: Path = arguments.file
    path.parent.mkdir(parents=True, exist_ok=True)
    sample(
        path,
        Load(path.parent, arguments.follow),
        prefix=arguments.prefix,
        attempt=arguments.attempt,
        seconds=arguments.seconds,
        parent=arguments.follow,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
