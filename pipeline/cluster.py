"""Ray: a cluster of one's own or an existing one, and tasks of which only so many run at a time."""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config import Execution
from pipeline.errors import UserError

R = TypeVar("R")

# A worker that dies is never the task's own doing, but for lack of memory, which more tries do not mend.
_TASK_RETRIES = 20
_STOP_CHECK_SECONDS = 0.5
_CONNECT_SECONDS = 10


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
        yield execution.workers or int(ray.cluster_resources().get("CPU", 1))
        return
    address = execution.ray_address or os.environ.get("RAY_ADDRESS")
    if address not in (None, "local"):
        _check_reachable(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"execution.ray_address (or RAY_ADDRESS): {address}: cannot be reached: {error}") from None
        try:
            yield execution.workers or int(ray.cluster_resources().get("CPU", 1))
        finally:
            ray.shutdown()
        return
    workers = execution.workers or os.cpu_count() or 1
    folder = own_folder(execution.output)
    # A killed run's remains.
    shutil.rmtree(folder, ignore_errors=True)
    try:
        ray.init(
            address="local",
            num_cpus=workers,
            object_store_memory=execution.object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=str(folder),
        )
        yield workers
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _check_reachable(address: str) -> None:
    """Ray would end the whole process after a long wait."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not (colon and port.isdecimal()):
        return  # "auto", which Ray itself answers for
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"execution.ray_address (or RAY_ADDRESS): {address}: cannot be reached: {error}. "
            "Start the cluster, or leave the key null to use this machine alone."
        ) from None


def own_folder(output: Path) -> Path:
    """Where a Ray of one's own keeps its files: a short path (its sockets lie there), the same for the same output."""
    name = blake2b(str(output.expanduser().absolute()).encode(), digest_size=6).hexdigest()
    return Path(tempfile.gettempdir()) / f"ray-{os.getuid()}-{name}"


def run_tasks(function: Callable[..., R], jobs: Iterable[tuple[Any, ...]], workers: int) -> Iterator[R]:
    """Run `function(*job)` for every job, `workers` at a time, and yield the results as they come.

    Jobs are drawn from the iterable when a worker is free. A task whose worker dies is run again.

    Raises:
        UserError: as a task raised it. The others are cancelled.
    """
    import ray
    from ray.exceptions import RayTaskError

    task = ray.remote(num_cpus=1, max_retries=_TASK_RETRIES)(function)
    waiting = iter(jobs)
    running = {task.remote(*job) for job in islice(waiting, workers)}
    try:
        while running:
            # With a time limit, so that an interrupt is seen.
            finished, _ = ray.wait(list(running), num_returns=1, timeout=_STOP_CHECK_SECONDS)
            for reference in finished:
                running.remove(reference)
                result = ray.get(reference)
                running |= {task.remote(*job) for job in islice(waiting, 1)}
                yield result
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
