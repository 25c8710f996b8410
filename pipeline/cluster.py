"""Ray: a cluster of one's own or an existing one, and tasks of which only so many run at a time."""

import ctypes
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config import Execution, TaskResources
from pipeline.errors import UserError
from pipeline.locations import Piece, SourceFile

R = TypeVar("R")

_STOP_CHECK_SECONDS = 0.5
_CPU_COUNT_SECONDS = 5.0
_CONNECT_SECONDS = 10
_HEAD_CHECK_SECONDS = 2
_HEAD_SILENT_SECONDS = 15
_MEMORY_RETRIES = "RAY_task_oom_retries"
_LONGEST_FOLDER = 42  # a socket's path has 107 bytes, of which Ray takes 65 below its folder
_JOBS_BETWEEN_TRIMS = 16  # a heap creeps slowly, and pages that are given back cost time to get again

_jobs_done = count(1)


@contextmanager
def ray_cluster(execution: Execution) -> Iterator[int]:
    """Be connected to Ray inside the `with` block; yields how many tasks shall run at a time.

    A process that is connected already stays so. Otherwise `ray_address`, or RAY_ADDRESS (which `ray job submit`
    sets), names a cluster; without them Ray is started on this machine, without a dashboard, and ended again.

    Raises:
        UserError: the cluster cannot be reached.
    """
    import ray

    if ray.is_initialized():
        yield execution.workers or _cluster_cpus()
        return
    address = execution.ray_address or os.environ.get("RAY_ADDRESS")
    if address not in (None, "local"):
        check_reachable(address, "execution.ray_address (or RAY_ADDRESS)")
        try:
            with _retries_without_memory(execution.task):
                ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"execution.ray_address (or RAY_ADDRESS): {address}: cannot be reached: {error}") from None
        try:
            with _watched_head():
                yield execution.workers or _cluster_cpus()
        finally:
            ray.shutdown()
        return
    workers = execution.workers or usable_cpus()
    folder = own_folder(execution.output)
    # A killed run's remains.
    shutil.rmtree(folder, ignore_errors=True)
    try:
        try:
            with _retries_without_memory(execution.task):
                ray.init(
                    address="local",
                    num_cpus=workers,
                    object_store_memory=execution.object_store_bytes,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="error",
                    _temp_dir=str(folder),
                )
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"Ray cannot be started on this machine (its files: {folder}): {error}") from error
        yield workers
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _retries_without_memory(resources: TaskResources) -> Iterator[None]:
    """Where Ray is started, limit how often it runs a task again that ran out of memory: its default is for ever."""
    if _MEMORY_RETRIES in os.environ:
        yield
        return
    os.environ[_MEMORY_RETRIES] = str(resources.retries)
    try:
        yield
    finally:
        del os.environ[_MEMORY_RETRIES]


def check_reachable(address: str, key: str) -> None:
    """Raise `UserError`, naming `key`, if no cluster is at `address`: Ray would end the process after a long wait."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not (colon and port.isdecimal()):
        return  # "auto", which Ray itself answers for
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"{key}: {address}: cannot be reached: {error}. Start the cluster, or name none to use this machine alone."
        ) from None


def usable_cpus() -> int:
    """The CPUs that this process may run on: of a machine that a batch system shares out, its part."""
    return len(os.sched_getaffinity(0))


def own_folder(output: Path) -> Path:
    """Where a Ray of one's own keeps its files: a short path (its sockets lie there), the same for the same output."""
    name = blake2b(str(output.expanduser().absolute()).encode(), digest_size=6).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"ray-{os.getuid()}-{name}"
    return folder if len(os.fsencode(folder)) <= _LONGEST_FOLDER else Path("/tmp") / folder.name


def in_sequence(function: Callable[..., R], jobs: Sequence[tuple[Any, ...]]) -> list[R]:
    """A task of several jobs that are done one after the other."""
    results = []
    for job in jobs:
        results.append(function(*job))
        if next(_jobs_done) % _JOBS_BETWEEN_TRIMS == 0:
            _give_memory_back()
    return results


def _give_memory_back() -> None:
    """Return what is freed to the system: a worker's heap, in pieces after documents of all sizes, creeps up else."""
    import pyarrow

    pyarrow.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim:
        trim(0)


class ClusterLostError(RuntimeError):
    """The cluster that ran the tasks is gone."""


@contextmanager
def _watched_head() -> Iterator[None]:
    """End the process, with a clear message, once the cluster's head no longer answers.

    Ray's own calls block then, and after a minute it ends the process from another thread, with a stack trace.
    """
    import ray

    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    ended = threading.Event()

    def watch() -> None:
        answered = time.monotonic()
        while not ended.wait(_HEAD_CHECK_SECONDS):
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
                answered = time.monotonic()
            except OSError as error:
                if time.monotonic() - answered > _HEAD_SILENT_SECONDS and not ended.is_set():
                    end_for_lost_cluster(ClusterLostError(f"the Ray cluster is gone ({host}:{port}: {error})"))

    thread = threading.Thread(target=watch, name="head watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def end_for_lost_cluster(error: ClusterLostError) -> None:
    """Say what to do and end the process: what is left of Ray in it would wait for the cluster, or abort."""
    print(f"{error}; start it and run the same command again: finished work is kept", file=sys.stderr, flush=True)
    os._exit(1)


def _cluster_cpus() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def run_tasks(
    function: Callable[..., R],
    jobs: Iterable[tuple[Any, ...]],
    workers: int | None,
    resources: TaskResources,
    name: str | None = None,
) -> Iterator[R]:
    """Run `function(*job)` for every job, `workers` at a time, and yield the results as they come.

    workers: None: as many as the cluster has CPUs, also those that join it later.

    Jobs are drawn from the iterable when a worker is free. A task whose worker dies is run again. Ray shows tasks under
    `name`, by default the function's.

    Raises:
        UserError: as a task raised it (the others are waited for); no node can ever run such a task; a task's worker
            died more often than it is run again.
        ClusterLostError: Ray no longer answers.
    """
    import ray
    from ray import exceptions

    _check_satisfiable(resources)
    name = name or function.__name__
    task = ray.remote(
        num_cpus=resources.num_cpus,
        memory=resources.memory_bytes,
        resources=resources.resources,
        max_retries=resources.retries,
        name=name,
    )(function)
    waiting = iter(jobs)
    running: dict[Any, tuple[Any, ...]] = {}
    job: tuple[Any, ...] = ()
    limit, counted = workers or _cluster_cpus(), time.monotonic()

    def fill() -> None:
        for job in islice(waiting, max(0, limit - len(running))):
            running[task.remote(*job)] = job

    try:
        fill()
        while running:
            if workers is None and time.monotonic() - counted > _CPU_COUNT_SECONDS:
                limit, counted = _cluster_cpus(), time.monotonic()
                fill()
            # With a time limit, so that an interrupt is seen.
            finished, _ = ray.wait(list(running), num_returns=1, timeout=_STOP_CHECK_SECONDS)
            for reference in finished:
                job = running.pop(reference)
                result = ray.get(reference)
                fill()
                yield result
    except exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError) as error:
        retries = resources.retries
        if isinstance(error, exceptions.OutOfMemoryError):
            retries = int(os.environ.get(_MEMORY_RETRIES, retries))
        where = ", ".join(filter(None, [name, _describe(job)]))
        raise UserError(
            f"{where}: the worker died {retries + 1} times ({type(error).__name__}). "
            "If memory ran out, lower content.unit_bytes (in a new output directory), or raise execution.task.num_cpus "
            "or execution.task.memory_bytes so that fewer tasks share a node. Finished work is kept."
        ) from error
    except (exceptions.LocalRayletDiedError, exceptions.RaySystemError, ConnectionError) as error:
        running.clear()
        raise ClusterLostError(f"the Ray cluster is gone ({type(error).__name__})") from error
    except KeyboardInterrupt:
        running.clear()  # they end with the connection
        raise
    finally:
        # Cancelling a task that ends at that moment can abort this process (Ray 2.60): they are waited for.
        if running:
            ray.wait(list(running), num_returns=len(running))


def _check_satisfiable(wanted: TaskResources) -> None:
    import ray

    needs = {"CPU": wanted.num_cpus, **wanted.resources}
    if wanted.memory_bytes is not None:
        needs["memory"] = wanted.memory_bytes
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if nodes and not any(all(node.get(name, 0) >= amount for name, amount in needs.items()) for node in nodes):
        has = "; ".join(
            ", ".join(f"{name} {node[name]:g}" for name in sorted(node) if name in {*needs, "CPU", "memory"})
            for node in nodes
        )
        raise UserError(
            f"execution.task: no node of the cluster can run a task that needs "
            f"{', '.join(f'{name} {amount:g}' for name, amount in needs.items())}; the nodes have: {has}"
        )


def _describe(job: Sequence[Any]) -> str | None:
    """The first file, or piece of one, that a job names."""
    for argument in job:
        if isinstance(argument, Piece):
            return f"{argument.url} [{argument.start}, {argument.stop})"
        if isinstance(argument, SourceFile):
            return argument.url
        if isinstance(argument, tuple | list) and (found := _describe(argument)):
            return found
    return None
