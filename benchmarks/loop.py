"""What the training loop costs beside its engine: `python -m benchmarks.loop [--checkpoint] [--json FILE]`.

The trainer as it is, on made-up shards, against a bare loop of forward, backward and step on the same engine and the
same batches, which are on the device before. Blocks of steps take turns in one process; a block ends when the device is
idle. With --checkpoint instead: how long training stands still for one, and how fast it goes while one is written.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.loop_table import loop_report
from benchmarks.machine import describe_machine, synchronize
from benchmarks.reading import VOCAB_SIZE, make_dataset
from benchmarks.report import DispatchLog, write_results
from flash_model.config import count_parameters
from launch import trainer
from launch.bad_steps import History
from launch.checkpoint import Progress
from launch.config import RunConfig, accumulation_steps
from launch.engine import Processes, build_engine, start_processes, update
from launch.evaluate import to_device
from launch.saving import CheckpointSaver, SavedCheckpoint
from launch.trainer import open_datasets, open_steps, open_stream
from pipeline.errors import run_command
from pipeline.prefetch import Step, StepLoader

SIZES: dict[str, dict[str, Any]] = {
    "110m": {
        "model": {"d_model": 768, "n_layers": 24},
        "data": {"seq_len": 8192},
        "train": {"tokens_per_step": 65_536, "micro_batch": 8, "precision": "bf16", "zero_stage": 1, "compile": True},
    },
    "1.3b": {
        "model": {"d_model": 2048, "n_layers": 48},
        "data": {"seq_len": 8192},
        "train": {"tokens_per_step": 32_768, "micro_batch": 4, "precision": "bf16", "zero_stage": 1, "compile": True},
    },
    "quickstart": {
        "model": {"d_model": 256, "n_layers": 4, "chunk_size": 128},
        "data": {"seq_len": 1024},
        "train": {"tokens_per_step": 4096, "micro_batch": 2, "precision": "fp32", "zero_stage": 2},
    },
    "tiny": {
        "model": {"d_model": 32, "n_layers": 2, "qk_dim": 16, "chunk_size": 64},
        "data": {"seq_len": 128},
        "train": {"tokens_per_step": 256, "micro_batch": 1, "precision": "fp32", "zero_stage": 1},
    },
}
CHECKPOINT_TOKENS = 2048
"""Tokens of a step beside the checkpoints: enough to see whether it slows down."""


def run_config(size: str, folder: Path, **train: Any) -> RunConfig:
    """A run of this size on the made-up data in `folder`; `train` replaces its settings."""
    chosen = SIZES[size]
    return RunConfig.model_validate(
        {
            "run": {"dir": folder / "run"},
            "model": {"vocab_size": VOCAB_SIZE, **chosen["model"]},
            "data": {"path": folder / "data", "seq_len": train.pop("seq_len", chosen["data"]["seq_len"])},
            "train": {**chosen["train"], "tokens": 1, **train},
            "optimizer": {"lr": 1e-5},
            "checkpoint": {"export_model": False},
            "tracking": {"enabled": False},
        }
    )


class AlternatingLoader:
    """The trainer's steps; after each `block` of them the bare loop takes the same ones, and both are timed."""

    def __init__(self, config: RunConfig, steps: StepLoader, processes: Processes, engine: Any, block: int) -> None:
        self._config, self._steps, self._processes, self._engine = config, steps, processes, engine
        self._block, self._position, self._began = block, 0, 0.0
        stream = open_stream(config, open_datasets(config)[0])
        ahead = config.model_copy(update={"data": config.data.model_copy(update={"prefetch": 0})})
        self._same = open_steps(ahead, stream, processes)
        self._loaded: list[tuple[float, list[tuple[torch.Tensor, ...]]]] = []
        self.trainer_ms: list[float] = []
        self.bare_ms: list[float] = []

    def next(self) -> Step:
        """The next step, as the trainer asks for it."""
        if self._position == self._block:
            self.trainer_ms.append(self._stop())
            self._take_bare_steps()
            self._position = 0
        if self._position == 0:
            self._loaded = [self._load() for _ in range(self._block)]
            self._start()
        self._position += 1
        return self._steps.next()

    def refill(self) -> None:
        """The trainer waits now."""
        self._steps.refill()

    def close(self) -> None:
        """End the trainer's loader."""
        self._steps.close()

    def _load(self) -> tuple[float, list[tuple[torch.Tensor, ...]]]:
        step, device = self._same.next(), self._processes.device
        accumulation = len(step.batches)
        batches = [tuple(x.clone() for x in to_device(batch, device)) for batch in step.batches]
        synchronize(device)  # the loader uses its memory again
        return self._processes.world_size * accumulation / max(step.targets, 1), batches

    def _take_bare_steps(self) -> None:
        engine = self._engine
        self._start()
        for scale, batches in self._loaded:
            for batch in batches:
                engine.backward(engine(*batch) * scale)
                engine.step()
        self.bare_ms.append(self._stop())
        print(f"a step, ms: trainer {self.trainer_ms[-1]:.2f}, bare {self.bare_ms[-1]:.2f}", flush=True)

    def _start(self) -> None:
        synchronize(self._processes.device)
        self._began = time.perf_counter()

    def _stop(self) -> float:
        synchronize(self._processes.device)
        return 1e3 * (time.perf_counter() - self._began) / self._block


def measure_loop(size: str, folder: Path, processes: Processes, *, block: int, blocks: int, tracking: bool) -> Any:
    """Milliseconds a step of the trainer and of the bare loop, by block. The first block of each is not counted."""
    config = run_config(size, folder)
    steps = block * (blocks + 1) + 1
    config = config.model_copy(
        update={
            "train": config.train.model_copy(update={"tokens": steps * config.train.tokens_per_step}),
            "tracking": config.tracking.model_copy(update={"enabled": tracking}),
        }
    )
    built: list[Any] = []
    loaders: list[AlternatingLoader] = []

    def build(config: RunConfig, processes: Processes) -> Any:
        built.append(build_engine(config, processes))
        return built[-1]

    def steps_of(config: RunConfig, stream: Any, processes: Processes) -> AlternatingLoader:
        loaders.append(AlternatingLoader(config, open_steps(config, stream, processes), processes, built[-1], block))
        return loaders[-1]

    with mock.patch.object(trainer, "build_engine", build), mock.patch.object(trainer, "open_steps", steps_of):
        status = trainer.train(config, open_datasets(config), processes)
    if status:
        raise RuntimeError(f"the run ended with status {status}")
    pairs = list(zip(loaders[-1].trainer_ms, loaders[-1].bare_ms, strict=True))[1:]
    return {
        "size": size,
        "parameters": count_parameters(config.model),
        "tokens_per_step": config.train.tokens_per_step,
        "seq_len": config.data.seq_len,
        "accumulation": accumulation_steps(config, processes.world_size),
        "compile": config.train.compile,
        "precision": config.train.precision,
        "zero_stage": config.train.zero_stage,
        "tracking": tracking,
        "block": block,
        "trainer_ms": [a for a, _ in pairs],
        "bare_ms": [b for _, b in pairs],
        "overhead": statistics.median(a / b for a, b in pairs) - 1,
    }


def measure_checkpoints(size: str, folder: Path, processes: Processes, *, saves: int) -> Iterator[dict[str, Any]]:
    """What one save costs in which training waits, then each of `saves` ones in the background."""
    context = min(CHECKPOINT_TOKENS, SIZES[size]["data"]["seq_len"])
    config = run_config(size, folder, seq_len=context, tokens_per_step=context, micro_batch=1, compile=False)
    engine = build_engine(config, processes)
    training, _ = open_datasets(config)
    tokens = torch.randint(VOCAB_SIZE, (1, context + 1), device=processes.device)

    def step() -> float:
        began = time.perf_counter()
        engine.backward(engine(tokens[:, :-1], tokens[:, 1:]) / context)
        update(engine)
        synchronize(processes.device)
        return 1e3 * (time.perf_counter() - began)

    state = open_stream(config, training).state
    for number in range(1 + saves):
        background = number > 0
        settings = config.checkpoint.model_copy(
            update={"background": background, "export_model": True, "keep": 1, "every_tokens": None}
        )
        saved: list[SavedCheckpoint] = []
        saver = CheckpointSaver(
            folder / "checkpoints",
            engine,
            processes,
            config.model_copy(update={"checkpoint": settings}),
            tokenizer=training.components[0].dataset.tokenizer_path,
            announce=saved.append,
        )
        usual = [step() for _ in range(8)][2:]
        saver.begin(Progress(number + 1, 0, state, 0, History()))
        beside = []
        while background and not saver.written:
            beside.append(step())
        saver.finish()
        saver.close()
        row = {
            "size": size,
            "parameters": count_parameters(config.model),
            "background": background,
            "bytes": saved[0].size,
            **saved[0].seconds,
            "step_ms": statistics.median(usual),
            "step_ms_beside": statistics.median(beside) if beside else None,
            "slowest_step_ms_beside": max(beside, default=None),
            "steps_beside": len(beside),
            "peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        print(f"{saved[0]}; step {row['step_ms']:.0f} ms, beside {row['step_ms_beside']}", flush=True)
        yield row


def main() -> int:
    """Command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description=__doc__)
    parser.add_argument("--checkpoint", action="store_true", help="measure checkpoints, not steps")
    parser.add_argument("--size", choices=SIZES, help="default: 110m (checkpoints: 1.3b) on a GPU, else quickstart")
    parser.add_argument("--blocks", type=int, default=9, help="timed blocks of each loop (default 9)")
    parser.add_argument("--block", type=int, default=20 if gpu else 5, help="steps of a block (default 20; CPU: 5)")
    parser.add_argument("--saves", type=int, default=2, help="checkpoints in the background (default 2)")
    parser.add_argument("--tracking", action="store_true", help="send the run to MLflow, a store in its directory")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to work; default: a temporary directory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    arguments = parser.parse_args()
    size = arguments.size or (("1.3b" if arguments.checkpoint else "110m") if gpu else "quickstart")
    processes = start_processes()
    log = DispatchLog()
    document: dict[str, Any] = {"benchmark": "loop", "machine": describe_machine(processes.device)}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        make_dataset(folder / "data", 30_000_000, seed=0)
        if arguments.checkpoint:
            document["checkpoints"] = []
            for row in measure_checkpoints(size, folder, processes, saves=arguments.saves):
                document["checkpoints"].append(row)
                if arguments.json:
                    write_results(arguments.json, document)
        else:
            document["loop"] = measure_loop(
                size, folder, processes, block=arguments.block, blocks=arguments.blocks, tracking=arguments.tracking
            )
    document["dispatch"] = log.lines
    processes.leave()
    if arguments.json:
        write_results(arguments.json, document)
    print(loop_report(document))
    return 0


if __name__ == "__main__":
    run_command(main)
