"""What tracking costs a training step on CPU: `python -m benchmarks.tracking [--json FILE] …`.

One run of the real training loop, whose record goes to another place in each block of steps: nowhere, to metrics.jsonl
alone, and to MLflow as well with a server that is fine, slow, dead, or takes connections and never answers. Every block
is compared with the block of its round without a record; a second one without a record shows the noise. On a machine
with other work the trainer's processor time, and the time that it spends on the record, say more than the clock.

The trainer has one processor, what runs beside it (senders, samplers, servers) the others, unless --together. Senders
and samplers of the other blocks are stopped meanwhile. Then the end of the run is timed, and a backlog is sent.
"""

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from benchmarks.machine import describe_machine
from benchmarks.mlflow_server import MLflowServer
from benchmarks.reading import VOCAB_SIZE, make_dataset
from benchmarks.report import write_results
from benchmarks.table import tracking_report
from launch import trainer
from launch.config import RunConfig, load_run_config
from launch.engine import Processes, free_port, start_processes
from launch.records import batches, last_record
from launch.replay import BATCH, Sender
from launch.run_directory import RunDirectory
from launch.tracking import NodeSampler, Tracker, run_facts
from pipeline.errors import UserError, run_command

SETTLING_STEPS = 5
"""At the start of each block; not counted."""
STARTS = 50


class Measured(Exception):  # noqa: N818 (no error)
    """All blocks are done."""


@dataclass
class Block:
    """The steps of a block: seconds, the trainer's processor time in seconds, and seconds spent on the record."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    record: list[float] = field(default_factory=list)


class Place:
    """Where the record goes in some of the blocks."""

    def __init__(self, name: str, uri: str | None, config: RunConfig, folder: Path) -> None:
        self.name, self.blocks = name, list[Block]()
        self.tracker: Tracker | None = None
        self.close_seconds = 0.0
        if "no record" in name:
            return
        tracking = config.tracking.model_copy(update={"enabled": uri is not None, "uri": uri})
        run = config.run.model_copy(update={"dir": folder / name.replace(" ", "-").replace(",", "")})
        config = config.model_copy(update={"run": run, "tracking": tracking})
        self.directory = RunDirectory(run.dir)
        self.directory.open(config, run_facts(config, [], 1))
        self.tracker = Tracker(self.directory, config, 0)
        self._sampler = NodeSampler(self.directory, config, 0, Alone(0, 1, torch.device("cpu"), None))
        children = (self.tracker._sender, self._sampler._sampler)
        self.children = [psutil.Process(child.pid) for child in children if child]

    def wait(self) -> None:
        """Until its sender has found the server or found it dead."""
        while self.tracker and self.tracker._sender and self.tracker.run_id is None:
            log = self.directory.path / "replay.log"
            if log.exists() and "did not take" in log.read_text():
                return
            time.sleep(0.5)

    def run_children(self, number: int) -> None:
        """Stop them, or let them go on."""
        for child in self.children if self.tracker else ():
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    def cpu_seconds(self) -> float | None:
        """Of sender and sampler so far."""
        if self.tracker is None or not self.children:
            return None
        times = [child.cpu_times() for child in self.children]
        return float(sum(t.user + t.system for t in times))

    def close(self) -> None:
        """End the run here, as the trainer does."""
        if self.tracker is None:
            return
        self.run_children(signal.SIGCONT)
        began = time.monotonic()
        self._sampler.close()
        self.tracker.close("FINISHED")
        self.close_seconds = time.monotonic() - began
        self.directory.close()


class Alone(Processes):
    """The only process of a run."""

    def gather(self, value: Any) -> list[Any]:
        """`value` alone."""
        return [value]


class Alternating(Tracker):
    """Takes the place of the trainer's tracker, and of its sampler; hands each block of steps to another place."""

    run_id = None

    def __init__(self, places: Sequence[Place], *, rounds: int, steps: int, settle: Callable[[], None]) -> None:
        self._places, self._rounds, self._steps = places, rounds, steps
        self._settle = settle
        self._order: list[Place] = []
        self._current: Place | None = None
        self._left = SETTLING_STEPS
        self._used = 0.0

    def log(self, step: int, metrics: dict[str, float], samples: Sequence[int] | None = None) -> None:
        """Take the time of the step, and record it where it belongs."""
        used = time.process_time()
        if self._current:
            block = self._current.blocks[-1]
            began = time.perf_counter()
            if self._current.tracker:
                self._current.tracker.log(step, metrics, samples)
            if self._left <= self._steps:
                block.wall.append(metrics["perf/step_seconds"])
                block.processor.append(used - self._used)
                block.record.append(time.perf_counter() - began)
        self._used = used
        self._left -= 1
        if self._left == 0:
            self._next_block()

    def _next_block(self) -> None:
        if self._current is None:
            self._settle()
        else:
            self._current.run_children(signal.SIGSTOP)
        if not self._order:
            if self._rounds == 0:
                raise Measured
            self._rounds -= 1
            self._order = random.sample(list(self._places), len(self._places))
        self._current = self._order.pop()
        self._current.blocks.append(Block())
        self._current.run_children(signal.SIGCONT)
        self._left = self._steps + SETTLING_STEPS

    def close(self, status: str = "") -> None:
        """Nothing: the places are closed one by one."""

    def checkpoint(self, step: int, path: Path) -> None:
        """Not recorded."""

    def lost(self) -> None:
        """Not recorded."""


def serve_slowly(port: int, seconds: float) -> None:
    """Pass connections on to `port`, each way of each piece of data `seconds` late; prints its own port."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(seconds)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    while True:
        client, _ = listener.accept()
        server = socket.create_connection(("127.0.0.1", port))
        for ends in ((client, server), (server, client)):
            threading.Thread(target=pump, args=ends, daemon=True).start()


def measure_steps(arguments: argparse.Namespace, folder: Path, server: str, slow: int) -> list[dict[str, Any]]:
    """Train with the places taking turns; returns a row for each."""
    silent = socket.create_server(("127.0.0.1", 0))
    make_dataset(folder / "data", 2_000_000, seed=1)
    tokens = 256
    values = {
        "run": {"dir": str(folder / "run")},
        "model": {"vocab_size": VOCAB_SIZE, "d_model": 32, "n_layers": 2, "qk_dim": 16, "chunk_size": 64},
        "data": {"path": str(folder / "data"), "seq_len": 128},
        "train": {"tokens": 10**9, "tokens_per_step": tokens, "micro_batch": 2, "precision": "fp32", "log_every": 1000},
        "tracking": {"enabled": False, "experiment": "benchmark"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    config = load_run_config(folder / "run.yaml")
    uris = {
        "no record": None,
        "no record, again": None,
        "metrics.jsonl alone": None,
        "MLflow, server fine": server,
        "MLflow, server slow": f"http://127.0.0.1:{slow}",
        "MLflow, server dead": f"http://127.0.0.1:{free_port()}",
        "MLflow, server silent": f"http://127.0.0.1:{silent.getsockname()[1]}",
    }
    processes = start_processes()
    places = [Place(name, uri, config, folder) for name, uri in uris.items()]
    started: dict[str, float | None] = {}

    def settle() -> None:
        for place in places:
            place.wait()
            place.run_children(signal.SIGSTOP)
            started[place.name] = place.cpu_seconds()

    # The loop stays as it is.
    alternating = Alternating(places, rounds=arguments.rounds, steps=arguments.steps, settle=settle)
    vars(trainer)["Tracker"] = lambda *_: alternating
    vars(trainer)["NodeSampler"] = lambda *_: alternating
    with suppress(Measured):
        trainer.train(config, trainer.open_datasets(config), processes)
    rows = []
    for place in places:
        used = place.cpu_seconds()
        place.close()
        active = sum(sum(block.wall) for block in place.blocks) * (1 + SETTLING_STEPS / arguments.steps)
        before = started[place.name]
        rows.append(
            {
                "place": place.name,
                "wall": compare([block.wall for block in place.blocks], [block.wall for block in places[0].blocks]),
                "processor": compare(
                    [block.processor for block in place.blocks], [block.processor for block in places[0].blocks]
                ),
                "record_ms": 1e3 * statistics.median(seconds for block in place.blocks for seconds in block.record),
                "start_cpu_seconds": before,
                "cpu_share": None if used is None or before is None else (used - before) / active,
                "close_seconds": place.close_seconds if place.tracker else None,
            }
        )
    silent.close()
    processes.leave()
    return rows


def compare(blocks: Sequence[Sequence[float]], bases: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Median step of each block in ms, their median, and that of the ratios to the base of the same round."""
    own, base = ([statistics.median(seconds) for seconds in part] for part in (blocks, bases))
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    interval = interval_of_median(ratios)
    found = {"block_ms": [1e3 * seconds for seconds in own], "ms": 1e3 * statistics.median(own)}
    return found | {"ratio": statistics.median(ratios), "ratio_interval": interval}


def interval_of_median(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the median, by bootstrap."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws // 40], medians[-draws // 40]


def measure_backlog(folder: Path, uris: dict[str, str], steps: int) -> list[dict[str, Any]]:
    """How fast the records of `steps` steps are sent that no server has, and what a sender's start costs then."""
    rows = []
    for name, uri in uris.items():
        directory = RunDirectory(folder / f"backlog-{name.replace(' ', '-')}")
        directory.checkpoints.mkdir(parents=True)
        directory.config.write_text("{}\n")
        facts = {"uid": name, "name": name, "experiment": "benchmark", "uri": uri, "parameters": {}}
        directory.facts.write_text(json.dumps(facts | {"datasets": [], "tags": {}}))
        write_steps(directory.metrics, steps)
        points = steps * 8
        sender = Sender(directory)
        began = time.monotonic()
        sender.send_new()
        seconds = time.monotonic() - began
        with open(directory.metrics, "a") as file:
            file.write(step_line(steps + 1))
        began = time.monotonic()
        Sender(directory).send_new()
        rows.append(
            {
                "store": name,
                "points": points,
                "seconds": seconds,
                "points_per_second": points / seconds,
                "restart_seconds": time.monotonic() - began,
            }
        )
    return rows


def measure_files(folder: Path, steps: int) -> dict[str, Any]:
    """Reading the records of a long run: from the start, and what a restart looks at."""
    path = folder / "long.jsonl"
    write_steps(path, steps)
    began = time.monotonic()
    read = sum(len(records) for records, _ in batches(path, 0, BATCH))
    seconds = time.monotonic() - began
    began = time.monotonic()
    for _ in range(STARTS):
        last_record(path)
    found = {"steps": read, "megabytes": path.stat().st_size / 1e6, "read_seconds": seconds}
    return found | {"last_record_ms": 1e3 * (time.monotonic() - began) / STARTS}


def step_line(step: int) -> str:
    """A step's record, with as many metrics as a run on a GPU has."""
    names = ("train/lr", "train/tokens", "train/loss", "train/grad_norm", "perf/step_seconds", "perf/mfu")
    metrics = dict.fromkeys((*names, "perf/tokens_per_second", "perf/data_wait_fraction"), step + 0.123456789)
    return json.dumps({"time": 1e9 + step, "attempt": 0, "step": step, "metrics": metrics}) + "\n"


def write_steps(path: Path, steps: int) -> None:
    """A metrics.jsonl of so many steps."""
    with open(path, "w") as file:
        for step in range(1, steps + 1):
            file.write(step_line(step))


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tracking", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="blocks of each kind (default 40)")
    parser.add_argument("--steps", type=int, default=15, help="steps of a block (default 15)")
    parser.add_argument("--together", action="store_true", help="let all processes share all processors")
    parser.add_argument("--slow-seconds", type=float, default=2.0, help="how late a slow server's data is (default 2)")
    parser.add_argument("--backlog", type=int, default=20_000, metavar="STEPS", help="to be sent (default 20,000)")
    parser.add_argument("--long", type=int, default=1_000_000, metavar="STEPS", help="to be read (default 1,000,000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    parser.add_argument("--serve-slowly", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Command line."""
    arguments = parse_arguments()
    if arguments.serve_slowly:
        serve_slowly(arguments.serve_slowly, arguments.slow_seconds)
    cores = sorted(os.sched_getaffinity(0))
    if not arguments.together and len(cores) < 2:
        raise UserError("--together: this machine has one processor; give this option, which says so")
    torch.set_num_threads(1)
    document: dict[str, Any] = {"benchmark": "tracking", "machine": describe_machine(torch.device("cpu"))}
    document |= {"together": arguments.together, "rounds": arguments.rounds, "steps": arguments.steps}
    document |= {"slow_seconds": arguments.slow_seconds}
    beside = cores if arguments.together else cores[1:]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.sched_setaffinity(0, beside)  # inherited by what is started here
        server = MLflowServer(folder)
        server.start()
        command = [sys.executable, "-m", "benchmarks.tracking", "--serve-slowly", str(server.port)]
        command += ["--slow-seconds", str(arguments.slow_seconds)]
        slow = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert slow.stdout
        slow_port = int(slow.stdout.readline())
        try:
            document["backlog"] = measure_backlog(
                folder,
                {"server": server.uri, "SQLite": f"sqlite:///{folder / 'own.db'}"},
                arguments.backlog,
            )
            document["files"] = measure_files(folder, arguments.long)
            watch = threading.Thread(target=place_children, args=(beside,), daemon=True)
            watch.start()
            if not arguments.together:
                os.sched_setaffinity(0, cores[:1])
            document["rows"] = measure_steps(arguments, folder, server.uri, slow_port)
        finally:
            slow.kill()
            server.kill()
    if arguments.json:
        write_results(arguments.json, document)
    print(tracking_report(document))
    return 0


def place_children(cores: Sequence[int]) -> None:
    """Move children of this process to `cores` as they appear."""
    placed: set[int] = set()
    while True:
        for child in psutil.Process().children(recursive=True):
            if child.pid not in placed:
                with suppress(psutil.Error, OSError):
                    child.cpu_affinity(list(cores))
                    placed.add(child.pid)
        time.sleep(0.5)


if __name__ == "__main__":
    run_command(main)
