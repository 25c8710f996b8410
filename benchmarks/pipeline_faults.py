"""The same bytes whatever happens: `python -m benchmarks.pipeline_faults CONFIG [key=value …] [--kills N] [--seed N]`.

Prepares one dataset again and again: with 1, 2 and 4 workers; with workers killed (SIGKILL) at random moments until N
have died; with the whole job killed three times and started again; on clusters of other shapes, one of which loses a
node on the way. Every run's files are compared byte for byte with the first run's. Exit status 1 if any differs.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import markdown_table
from pipeline.errors import run_command
from pipeline.shards import MANIFEST

_SECONDS_BETWEEN_KILLS = (0.1, 0.8)
_KILLS_A_RUN = 12  # more could outlast the retries of one long task
_SECONDS_BEFORE_RESTART = (3.0, 7.0)
_RESTARTS = 3

Fault = Callable[["subprocess.Popen[bytes]"], int]


def fingerprint(output: Path) -> str:
    """SHA-256 over the names and bytes of all files that a dataset's digest stands for, and the digest."""
    found = hashlib.sha256(json.loads((output / MANIFEST).read_bytes())["digest"].encode())
    for file in sorted(output.rglob("*")):
        if file.suffix in (".bin", ".idx", ".model"):
            found.update(str(file.relative_to(output)).encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


class Faults:
    """Random faults of a run, from one seed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def none(self, job: "subprocess.Popen[bytes]") -> int:
        """Wait for the end; 0 faults."""
        job.wait()
        return 0

    def kill_workers(self, job: "subprocess.Popen[bytes]") -> int:
        """SIGKILL a working process of the job's Ray at random moments until it ends; returns how many died."""
        import psutil

        kills = 0
        while job.poll() is None and kills < _KILLS_A_RUN:
            time.sleep(self.chance.uniform(*_SECONDS_BETWEEN_KILLS))
            try:
                below = psutil.Process(job.pid).children(recursive=True)
                busy = [child for child in below if _is_busy_worker(child)]
                if busy:
                    self.chance.choice(busy).kill()
                    kills += 1
            except psutil.Error:
                continue
        job.wait()
        return kills

    def kill_job(self, job: "subprocess.Popen[bytes]") -> int:
        """SIGKILL the job and all below it at a random moment; 1, or 0 if it had ended before."""
        import psutil

        try:
            job.wait(self.chance.uniform(*_SECONDS_BEFORE_RESTART))
        except subprocess.TimeoutExpired:
            below = psutil.Process(job.pid).children(recursive=True)
            job.kill()
            for child in below:
                child.kill() if child.is_running() else None
            job.wait()
            return 1
        return 0


def _is_busy_worker(process: Any) -> bool:
    command = process.cmdline()
    # Without its agents a node ends: that is another fault.
    return bool(command) and command[0].startswith("ray::") and "IDLE" not in command[0] and "Agent" not in command[0]


def _start(config: str, overrides: list[str], output: Path, workers: int | None, address: str | None = None) -> Any:
    command = [sys.executable, "-m", "pipeline.prepare", config, *overrides, f"execution.output={output}"]
    command += [f"execution.workers={workers}"] if workers else []
    command += [f"execution.ray_address={address}"] if address else []
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)


@contextmanager
def cluster(cpus: list[int]) -> Iterator[Any]:
    """A Ray of several nodes on this machine, the first of which is the head."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], "object_store_memory": 100 << 20})
    try:
        nodes.others = [nodes.add_node(num_cpus=count, object_store_memory=100 << 20) for count in cpus[1:]]
        yield nodes
    finally:
        nodes.shutdown()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline_faults", description=__doc__)
    parser.add_argument("config", metavar="CONFIG", help="a configuration of pipeline.prepare")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--kills", type=int, default=20, help="workers to kill, over as many runs as that takes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    faults = Faults(arguments.seed)
    rows: list[list[str]] = []
    prints: list[str] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def record(name: str, output: Path, n_faults: int, began: float) -> None:
        prints.append(fingerprint(output))
        same = "first" if len(prints) == 1 else "same" if prints[-1] == prints[0] else "DIFFERENT"
        rows.append([name, str(n_faults), f"{time.monotonic() - began:.0f}", prints[-1][:16], same])
        print(" · ".join(rows[-1]), flush=True)

    def run(name: str, workers: int, fault: Fault) -> int:
        began, output = time.monotonic(), folder / f"data-{len(prints)}"
        job = _start(arguments.config, arguments.overrides, output, workers)
        count = fault(job)
        if job.returncode:
            raise SystemExit(f"{name}: the preparation ended with status {job.returncode}")
        record(name, output, count, began)
        return count

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for workers in (1, 2, 4):
            run(f"{workers} worker{'s' * (workers > 1)}", workers, faults.none)
        killed = 0
        while killed < arguments.kills:
            killed += run("2 workers, SIGKILL of workers", 2, faults.kill_workers)
        began, output, restarts = time.monotonic(), folder / f"data-{len(prints)}", 0
        for _ in range(_RESTARTS):
            restarts += faults.kill_job(_start(arguments.config, arguments.overrides, output, 2))
        job = _start(arguments.config, arguments.overrides, output, 2)
        if job.wait():
            raise SystemExit(f"restarted: the preparation ended with status {job.returncode}")
        record("SIGKILL of the whole job", output, restarts, began)
        for cpus, removed in (([1, 3], 0), ([2, 2], 1)):
            began, output = time.monotonic(), folder / f"data-{len(prints)}"
            with cluster(cpus) as nodes:
                job = _start(arguments.config, arguments.overrides, output, None, nodes.address)
                if removed:
                    time.sleep(faults.chance.uniform(*_SECONDS_BEFORE_RESTART))
                    nodes.remove_node(nodes.others[0], allow_graceful=False)
                if job.wait():
                    raise SystemExit(f"cluster: the preparation ended with status {job.returncode}")
            shape = "+".join(map(str, cpus))
            record(f"cluster of {shape} CPUs{', a node removed' * removed}", output, removed, began)
    print("\n" + markdown_table(["run", "faults", "seconds", "SHA-256", "bytes"], rows))
    return int(len(set(prints)) > 1)


if __name__ == "__main__":
    run_command(main)
