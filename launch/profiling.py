"""Traces and memory snapshots of the steps that ask for them, and what filled a GPU that ran out of memory."""

import gzip
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from launch.config import RunConfig
from launch.console import say
from launch.engine import Processes

HISTORY_ENTRIES = 200_000
"""Allocations and frees that are remembered: some hundred steps, and some hundred MB of host memory."""


class Profiler:
    """Writes into profiles/ of the run directory while its context lasts. Wherever that ends by an out-of-memory error,
    a snapshot is written and a message says what the memory was used for.
    """

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        self._config, self._settings, self._rank = config, config.profile, processes.rank
        self._folder = config.run.dir / "profiles"
        self._gpu = processes.device.type == "cuda"
        self._chosen = processes.rank == 0 or config.profile.ranks == "all"
        self._trace: profile | None = None
        self._recording = False
        self._range: Any = None
        self._step, self._phase = 0, "start"
        self._explained = False
        self.engine: Any = None
        """Once there is one: its state is named in the message."""

    def __enter__(self) -> Self:
        if not self._gpu and (self._settings.memory_steps or self._settings.memory_history):
            say("note: profile.memory_steps and memory_history show GPU memory: without a GPU nothing is written")
        if self._gpu and self._settings.memory_history:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.explain(error)
        self.enter(None)
        if self._trace:
            self._trace.stop()
        if self._recording or (self._gpu and self._settings.memory_history):
            torch.cuda.memory._record_memory_history(enabled=None)

    def start(self, step: int) -> None:
        """A step begins."""
        self._step = step
        if not self._chosen:
            return
        if self._gpu and step in self._settings.memory_steps:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)
            self._recording = True
        if step in self._settings.steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._gpu else [])]
            self._trace = profile(activities=activities, record_shapes=True)
            self._trace.start()

    def enter(self, phase: str | None) -> None:
        """A phase of the step begins; it is a range of the trace."""
        if self._range:
            self._range.__exit__(None, None, None)
            self._range = None
        if phase is not None:
            self._phase = phase
        if phase is not None and self._trace:
            self._range = record_function(phase)
            self._range.__enter__()

    def stop(self) -> bool:
        """The step is done: write what was asked for; whether anything was."""
        self.enter(None)
        written = []
        if self._trace:
            self._trace.stop()
            written.append(self._write_trace(self._trace, self._path(".json.gz")))
            self._trace = None
        if self._recording:
            written.append(self._dump_memory(self._path("-memory.pickle")))
            self._recording = False
            if not self._settings.memory_history:
                torch.cuda.memory._record_memory_history(enabled=None)
        if written:
            say(f"profiled step {self._step}: {', '.join(map(str, written))}")
        return bool(written)

    def explain(self, error: BaseException) -> None:
        """If this is an out-of-memory error of the GPU, write a snapshot and say what the memory is used for, once.

        Called while the error's traceback, and with it what filled the memory, still exists.
        """
        if self._explained or not isinstance(error, torch.OutOfMemoryError):
            return
        self._explained = True
        first = str(error).partition(".")[0].strip()
        lines = [
            f"error: rank {self._rank} ran out of GPU memory in phase {self._phase} of step {self._step}: {first}",
            ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in self._memory_by_part()),
            self.snapshot(),
            "; ".join(self._advice()),
        ]
        sys.stderr.write("\n  ".join(filter(None, lines)) + "\n")
        sys.stderr.flush()

    def snapshot(self) -> str:
        """Write what fills the GPU, and say where; empty without a GPU."""
        if not self._gpu:
            return ""
        try:
            path = self._dump_memory(self._path("-out-of-memory.pickle"))
        except Exception as failure:
            return f"no snapshot of it could be written: {type(failure).__name__}: {failure}"
        return f"its allocations: {path}, to be opened at https://pytorch.org/memory_viz"

    def _memory_by_part(self) -> Iterator[tuple[str, float]]:
        if not torch.cuda.is_available():
            return
        free, total = torch.cuda.mem_get_info()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        weights, optimizer = _state_bytes(self.engine)
        yield "the GPU has", total
        yield "weights", weights
        yield "float32 weights and moments", optimizer
        yield "gradients, activations and buffers", allocated - weights - optimizer
        yield "reserved and not used", reserved - allocated
        yield "used outside of PyTorch's allocator", total - free - reserved
        yield "largest use so far", torch.cuda.max_memory_allocated()

    def _advice(self) -> Iterator[str]:
        train = self._config.train
        if train.micro_batch > 1:
            yield f"lower train.micro_batch ({train.micro_batch})"
        yield "set train.activation_checkpointing"
        if train.zero_stage < 3:
            yield f"raise train.zero_stage ({train.zero_stage})"
        yield "python -m launch.plan CONFIG says what fits"

    def _path(self, ending: str) -> Path:
        return self._folder / f"rank{self._rank}-step{self._step}{ending}"

    def _write_trace(self, trace: profile, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = path.with_name(f".{path.name}.plain")
        trace.export_chrome_trace(str(plain))
        aside = path.with_name(f".{path.name}")
        with open(plain, "rb") as source, gzip.open(aside, "wb", compresslevel=3) as target:
            shutil.copyfileobj(source, target)
        plain.unlink()
        os.replace(aside, path)
        return path

    def _dump_memory(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}")
        torch.cuda.memory._dump_snapshot(str(aside))
        os.replace(aside, path)
        return path


def _state_bytes(engine: Any) -> tuple[int, int]:
    """Bytes on the GPU of an engine's weights, and of its optimizer's float32 weights and moments."""
    if engine is None:
        return 0, 0
    weights: dict[int, int] = {}
    for parameter in engine.module.parameters():
        _add(weights, parameter)
        _add(weights, getattr(parameter, "ds_tensor", None))
    states: dict[int, int] = {}
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for group in getattr(optimizer, "param_groups", ()):
        for parameter in group["params"]:
            _add(states, parameter)
    for state in getattr(optimizer, "state", {}).values():
        for value in state.values():
            _add(states, value)
    return sum(weights.values()), sum(size for place, size in states.items() if place not in weights)


def _add(sizes: dict[int, int], tensor: Any) -> None:
    """Count a tensor's memory once, whatever views of it there are."""
    if isinstance(tensor, torch.Tensor) and tensor.is_cuda and tensor.numel():
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
