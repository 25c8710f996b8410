"""Training on a Ray cluster: `python -m launch.by_ray [--nodes N] [--processes-per-node P] CONFIG [key=value …]`.

Meant for `ray job submit`. Every node gets its processes of launch/train.py; nodes need the same checkout, environment
and file system, where relative paths start from this command's working directory. SIGTERM, SIGINT and SIGUSR1 are
passed on to all processes, which save and end. Exit status: the run's.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from launch.config import load_run_config
from pipeline.cluster import check_reachable
from pipeline.errors import USER_ERROR_EXIT, UserError, run_command

ROOT = Path(__file__).resolve().parent.parent
_PLACEMENT_SECONDS = 60
_CHECK_SECONDS = 0.5
# What the others get once one process has failed; they would wait for it without end.
_GRACE_SECONDS = 30
_STATUSES = (USER_ERROR_EXIT, 70, 75)  # which of several the run's is; before them whatever else is not 0


class NodeProcesses:
    """An actor: the processes of one node."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._signals: list[int] = []
        self._ended: set[int] | None = None
        self._lock = threading.Lock()

    def address(self) -> tuple[str, int]:
        """This node's address and a port of it that is free."""
        import ray

        from launch.engine import free_port

        return ray.util.get_node_ip_address(), free_port()

    def run(self, environments: Sequence[dict[str, str]], arguments: Sequence[str], folder: str) -> list[int]:
        """Run one process for each environment, in `folder`, to its end; their exit statuses, 128 + the signal that
        ended one.

        What `end` killed has none.
        """
        command = [sys.executable, str(ROOT / "launch/train.py"), *arguments]
        with self._lock:
            for environment in environments if self._ended is None else ():
                self._processes.append(subprocess.Popen(command, cwd=folder, env=os.environ | environment))
            for number in self._signals:
                self._send(number)
        failed_at = None
        while any(process.poll() is None for process in self._processes):
            if failed_at is None and any(process.poll() for process in self._processes):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() > failed_at + _GRACE_SECONDS:
                self.end()
            time.sleep(_CHECK_SECONDS)
        ended = self._ended or ()
        statuses = [process.wait() for process in self._processes if process.pid not in ended]
        return [status if status >= 0 else 128 - status for status in statuses]

    def signal(self, number: int) -> None:
        """Send a signal to every process, also to those that are yet to start."""
        with self._lock:
            self._signals.append(number)
            self._send(number)

    def end(self) -> None:
        """Kill what still runs, because another process has failed."""
        with self._lock:
            running = {process.pid for process in self._processes if process.poll() is None}
            self._ended = running | (self._ended or set())
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)


class _Signals:
    """The signals that this process gets from now on."""

    def __init__(self) -> None:
        self.received: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)


def connect() -> None:
    """Be connected to the cluster that RAY_ADDRESS names, as `ray job submit` sets it, or to this machine's."""
    import ray

    address = os.environ.get("RAY_ADDRESS", "auto")
    check_reachable(address, "RAY_ADDRESS")
    try:
        ray.init(address=address, logging_level="error", namespace="flash")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"RAY_ADDRESS: {address}: cannot be reached: {error}. Start a cluster (`ray start --head`) and submit this "
            "as a job, or use the deepspeed launcher."
        ) from None


def cluster_shape(nodes: int | None, processes: int | None) -> tuple[int, int, str]:
    """How many nodes, processes on each, and the resource, GPU or CPU, of which a process takes one.

    Raises:
        UserError: the cluster is smaller, or has no GPUs and `processes` is not given.
    """
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    resource = "GPU" if any(node.get("GPU") for node in alive) else "CPU"
    if processes is None:
        if resource == "CPU":
            raise UserError("--processes-per-node: the cluster has no GPUs: say how many processes a node is to have")
        processes = int(min(node["GPU"] for node in alive if node.get("GPU")))
    able = sum(node.get(resource, 0) >= processes for node in alive)
    if able == 0 or able < (nodes or 1):
        found = ", ".join(str(int(node.get(resource, 0))) for node in alive)
        raise UserError(
            f"--nodes, --processes-per-node: {nodes or 1} nodes with {processes} {resource}s each are asked for; the "
            f"cluster's nodes have {found}"
        )
    return nodes or able, processes, resource


def run(arguments: Sequence[str], nodes: int | None, processes: int | None) -> int:
    """Run launch/train.py with these arguments all over the cluster and return the run's exit status."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    count, processes, resource = cluster_shape(nodes, processes)
    group = placement_group([{resource: processes}] * count, strategy="STRICT_SPREAD")
    signals = _Signals()
    try:
        if not group.wait(_PLACEMENT_SECONDS):
            raise UserError(
                f"--nodes: {count} nodes with {processes} free {resource}s each did not come free within "
                f"{_PLACEMENT_SECONDS} s; wait for other jobs, or ask for less"
            )
        actor = ray.remote(NodeProcesses)
        members = [
            actor.options(
                num_cpus=processes if resource == "CPU" else 0,
                num_gpus=processes if resource == "GPU" else 0,
                max_concurrency=3,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle),
            ).remote()
            for bundle in range(count)
        ]
        host, port = ray.get(members[0].address.remote())
        common = {"MASTER_ADDR": host, "MASTER_PORT": str(port), "WORLD_SIZE": str(count * processes)}
        running = {}
        for number, member in enumerate(members):
            own = [
                {**common, "RANK": str(number * processes + local), "LOCAL_RANK": str(local)}
                for local in range(processes)
            ]
            running[member.run.remote(own, list(arguments), os.getcwd())] = number
        return _wait(running, members, signals)
    finally:
        remove_placement_group(group)


def _wait(running: dict[Any, int], members: Sequence[Any], signals: _Signals) -> int:
    """Wait for all nodes, pass signals on, and end the rest when a node is lost or has failed."""
    import ray

    statuses: list[int] = []
    waiting, passed_on = list(running), 0
    failed_at = None
    while waiting:
        done, waiting = ray.wait(waiting, timeout=_CHECK_SECONDS)
        for number in signals.received[passed_on:]:
            passed_on += 1
            for member in members:
                member.signal.remote(number)
        for result in done:
            try:
                statuses += ray.get(result)
            except ray.exceptions.RayError as error:
                print(f"error: node {running[result]} of the run {_reason(error)}", file=sys.stderr, flush=True)
                statuses.append(1)
                for member in members:
                    member.signal.remote(signal.SIGTERM)
        if failed_at is None and any(statuses):
            failed_at = time.monotonic()
        if failed_at is not None and waiting and time.monotonic() > failed_at + _GRACE_SECONDS:
            nodes = ", ".join(str(running[result]) for result in waiting)
            print(f"error: ending what still runs on node {nodes}: another one has failed", file=sys.stderr, flush=True)
            for member in members:
                member.end.remote()
            failed_at = float("inf")
    odd = [status for status in statuses if status not in (0, *_STATUSES)]
    return next((status for status in (*odd, *_STATUSES) if status in statuses), 0)


def _reason(error: Any) -> str:
    """Why a node has no statuses: its actor is gone, or could not start the processes."""
    if cause := getattr(error, "cause", None):
        return f"failed: {type(cause).__name__}: {cause}"
    return f"is lost: {str(error).strip().partition(chr(10))[0]}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.by_ray", description=__doc__)
    parser.add_argument("--nodes", type=int, help="default: all that have the processes' GPUs")
    parser.add_argument("--processes-per-node", type=int, help="default: a node's GPUs")
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parser.add_argument("--resume", action="store_true", help="continue the run; the same as run.resume=must")
    parser.add_argument("--rollback", action="store_true", help="continue it from before its bad steps")
    arguments = parser.parse_intermixed_args()
    for option, given in (("--nodes", arguments.nodes), ("--processes-per-node", arguments.processes_per_node)):
        if given is not None and given < 1:
            raise UserError(f"{option}: {given}: give at least 1, or leave it out")
    load_run_config(arguments.config, arguments.overrides, resume=arguments.resume)
    connect()
    options = [f"--{name}" for name in ("resume", "rollback") if getattr(arguments, name)]
    passed = [str(Path(arguments.config).resolve()), *arguments.overrides, *options]
    return run(passed, arguments.nodes, arguments.processes_per_node)


if __name__ == "__main__":
    run_command(main)
