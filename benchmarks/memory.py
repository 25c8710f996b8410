"""Memory and speed of training by setting: `python -m benchmarks.memory [--sizes 110m …] [--settings zero1 …]`.

For each model size and setting, in a process of its own, the trainer's own engine takes a few steps of two micro
batches over random tokens. GiB are the most that torch had allocated on the GPU, from the building of the engine on;
the plan's are what `launch.plan` says for the same configuration.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.machine import TimeLimit, describe_machine, synchronize
from benchmarks.report import write_results
from benchmarks.table import memory_report
from flash_model.config import ModelConfig, count_parameters
from flash_model.init import initial_distribution
from flash_model.lm import FlashLM
from launch.config import RunConfig

ACCUMULATION = 2

SIZES: Mapping[str, dict[str, Any]] = {
    "110m": {"d_model": 768, "n_layers": 24, "seq_len": 8192, "micro_batch": 8},
    "350m": {"d_model": 1024, "n_layers": 48, "seq_len": 8192, "micro_batch": 4},
    "1.3b": {"d_model": 2048, "n_layers": 48, "seq_len": 8192, "micro_batch": 2},
    "tiny": {"d_model": 64, "n_layers": 4, "seq_len": 256, "micro_batch": 2, "vocab_size": 512, "qk_dim": 16},
}
DEFAULT_SIZES = ("110m", "350m", "1.3b")

SETTINGS: Mapping[str, dict[str, Any]] = {
    "zero1": {"zero_stage": 1},
    "zero1-recompute-2": {"zero_stage": 1, "activation_checkpointing": 2},
    "zero1-recompute-all": {"zero_stage": 1, "activation_checkpointing": "all"},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "zero3-recompute-all": {"zero_stage": 3, "activation_checkpointing": "all"},
    "zero2-offload-optimizer": {"zero_stage": 2, "offload": "optimizer"},
    "zero3-offload-all": {"zero_stage": 3, "offload": "all"},
    "zero3-offload-all-recompute-all": {"zero_stage": 3, "offload": "all", "activation_checkpointing": "all"},
}
DEFAULT_SETTINGS = tuple(name for name in SETTINGS if name not in ("zero2", "zero3-recompute-all"))


def cell_config(size: str, setting: str, *, compiled: bool) -> RunConfig:
    """The run's configuration of a cell. Its data are never opened."""
    shape = dict(SIZES[size])
    seq_len, micro_batch = shape.pop("seq_len"), shape.pop("micro_batch")
    tokens = seq_len * micro_batch * ACCUMULATION
    model = {"vocab_size": 32_000, "chunk_size": 256 if seq_len >= 512 else 64, **shape}
    train = {"tokens": 1000 * tokens, "tokens_per_step": tokens, "micro_batch": micro_batch, "compile": compiled}
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": model,
            "data": {"path": "unused", "seq_len": seq_len},
            "train": {**train, "precision": "bf16", **SETTINGS[setting]},
        }
    )


def build_quickly(config: ModelConfig, *, seed: int) -> FlashLM:
    """A model whose matrices repeat the same few random numbers: drawing a billion takes longer than a cell's steps."""
    with torch.device("meta"):
        model = FlashLM(config)
    model.to_empty(device="cpu")
    table = torch.randn(2**22 - 1, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, std = initial_distribution(name, config)
            repeated = table.repeat(-(-parameter.numel() // len(table)))[: parameter.numel()]
            parameter.copy_(repeated.view(parameter.shape).mul_(std).add_(mean))
    return model


class Peaks:
    """The most that torch had allocated on the GPU, in all and by what the process was doing."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self.gib: dict[str, float] = {}

    def note(self, phase: str) -> None:
        """`phase` is over: what was allocated since the last call belongs to it."""
        if self._gpu:
            self.gib[phase] = max(self.gib.get(phase, 0.0), torch.cuda.max_memory_allocated() / 2**30)
            torch.cuda.reset_peak_memory_stats()

    @property
    def highest(self) -> float | None:
        """GiB; None without a GPU."""
        return max(self.gib.values(), default=None)


def measure(config: RunConfig, steps: int) -> dict[str, Any]:
    """Train a few steps as the trainer does; returns what was measured. The first step is not timed."""
    from launch import engine as engines
    from launch.gradients import GradientNorms, total_norm

    processes = engines.start_processes()
    device, peaks = processes.device, Peaks(processes.device)
    with mock.patch.object(engines, "build_model", build_quickly):
        engine = engines.build_engine(config, processes)
    gc.collect()
    peaks.note("build")
    norms = GradientNorms(engine, processes)
    batch, seq_len = config.train.micro_batch, config.data.seq_len
    generator = torch.Generator(device).manual_seed(0)
    seconds = []
    for _ in range(1 + steps):
        synchronize(device)
        began = time.perf_counter()
        nats = torch.zeros((), dtype=torch.float64, device=device)
        for position in range(ACCUMULATION):
            tokens = torch.randint(config.model.vocab_size, (batch, seq_len + 1), device=device, generator=generator)
            inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            mask, doc_ids = torch.ones_like(inputs, dtype=torch.bool), torch.zeros_like(inputs)
            summed = engine(inputs, targets, mask, doc_ids)
            peaks.note("forward")
            nats += summed.detach().double()
            engine.backward(summed / (batch * seq_len))
            peaks.note("backward")
            if position < ACCUMULATION - 1:
                engine.step()
        total, by_layer = norms.reduce(nats)
        engines.update(engine)
        synchronize(device)
        peaks.note("update")
        seconds.append(time.perf_counter() - began)
    per_step = ACCUMULATION * batch * seq_len
    kept = torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else None
    return {
        "step_seconds": seconds,
        "tokens_per_second": per_step / statistics.median(seconds[1:]),
        "loss": total / per_step,
        "grad_norm": total_norm(by_layer),
        "peak_gib": peaks.highest,
        "peak_gib_by_phase": peaks.gib,
        "kept_gib": kept,
    }


def work() -> int:
    """What a process of the benchmark does: import everything, wait for a cell, measure it."""
    from launch import engine, gradients  # noqa: F401 (slow to import)

    line = sys.stdin.readline()
    if not line:
        return 0
    cell = json.loads(line)
    config = cell_config(cell["size"], cell["setting"], compiled=cell["compile"])
    try:
        result = {"status": "ok", **measure(config, cell["steps"])}
    except torch.OutOfMemoryError as error:
        result = {"status": "out of memory", "message": str(error).partition(". GPU")[0]}
    except Exception as error:
        result = {"status": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"}
    Path(cell["out"]).write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # Freeing tens of GiB of pinned memory page by page takes longer than to measure.


class Workers:
    """Processes for one cell each; the next one imports while the last one measures."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting = self._start()

    def _start(self) -> "subprocess.Popen[str]":
        with open(self._folder / "log", "a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.memory", "--worker"],
                stdin=subprocess.PIPE, stdout=log, stderr=log, text=True,
            )  # fmt: skip

    def run(self, cell: dict[str, Any], *, last: bool, timeout: float) -> dict[str, Any]:
        """Measure `cell` in a fresh process."""
        out, worker = self._folder / "result.json", self._waiting
        out.unlink(missing_ok=True)
        if not last:
            self._waiting = self._start()
        try:
            worker.communicate(json.dumps(cell | {"out": str(out)}) + "\n", timeout=timeout)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
            return {"status": f"took more than {timeout:.0f} s"}
        if not out.exists():
            log = (self._folder / "log").read_text().splitlines()
            return {"status": f"ended with {worker.returncode}", "message": "\n".join(log[-20:])}
        result: dict[str, Any] = json.loads(out.read_text())
        return result

    def close(self) -> None:
        """End the process that waits for a cell, if there is one."""
        if self._waiting.poll() is None:
            self._waiting.communicate("")


def measured_rows(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield each cell's row when it is measured."""
    from launch.memory import estimate_memory

    cells = [(size, setting) for size in arguments.sizes for setting in arguments.settings]
    workers, limit = Workers(folder), TimeLimit(arguments.seconds)
    for number, (size, setting) in enumerate(cells):
        config = cell_config(size, setting, compiled=arguments.compile)
        planned = estimate_memory(config, 1)
        row: dict[str, Any] = {
            "size": size,
            "setting": setting,
            "parameters": count_parameters(config.model),
            "tokens_per_micro_batch": config.train.micro_batch * config.data.seq_len,
            "planned_gib": planned.total / 2**30,
            "planned_gib_by_part": {name: size / 2**30 for name, size in planned.parts.items()},
        }
        began = time.monotonic()
        if limit.allows_another():
            cell = {"size": size, "setting": setting, "compile": arguments.compile, "steps": arguments.steps}
            row |= workers.run(cell, last=number == len(cells) - 1, timeout=arguments.timeout)
        else:
            row["status"] = "left out: no time"
        yield row | {"seconds": time.monotonic() - began}
    workers.close()


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    default = DEFAULT_SIZES if torch.cuda.is_available() else ("tiny",)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=default)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=DEFAULT_SETTINGS)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a cell, after one that is not (default 3)")
    parser.add_argument("--compile", action="store_true", help="torch.compile, as train.compile: a minute more a cell")
    parser.add_argument("--seconds", type=float, help="leave out cells that would take longer than this in all")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that a cell may take (default 300)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results, after each cell")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps: give 1 or more")
    return arguments


def main() -> int:
    """Command line."""
    arguments = parse_arguments()
    if arguments.worker:
        return work()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    document: dict[str, Any] = {
        "benchmark": "memory",
        "compile": arguments.compile,
        "machine": describe_machine(device),
        "rows": [],
    }
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        for row in measured_rows(arguments, Path(folder)):
            document["rows"].append(row)
            speed = f"{row['tokens_per_second']:,.0f} tokens/s" if row["status"] == "ok" else row["status"]
            peak = f"{row['peak_gib']:.1f} GiB" if row.get("peak_gib") else "no GPU"
            print(
                f"{row['size']:>5} {row['setting']}: {peak}, planned {row['planned_gib']:.1f}; {speed} "
                f"({row['seconds']:.0f} s)",
                flush=True,
            )
            if "message" in row:
                print(row["message"], flush=True)
            if arguments.json:
                write_results(arguments.json, document)
    print(memory_report(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
