"""Ray as a preparation uses it: what no node can run, workers that never survive, a head node that dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import cluster
from pipeline.cluster import run_tasks
from pipeline.config import PrepareConfig, TaskResources
from pipeline.errors import UserError
from pipeline.locations import Piece
from pipeline.prepare import prepare
from pipeline.shards import MANIFEST

MakeConfig = Callable[..., PrepareConfig]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"num_cpus": 99.0}, r"execution\.task: no node .* needs CPU 99; the nodes have: CPU 3"),
        ({"memory_bytes": 1 << 60}, r"execution\.task: no node .* memory 1\.15292e\+18"),
        ({"resources": {"tpu": 1.0}}, r"execution\.task: no node .* needs CPU 1, tpu 1;"),
    ],
)
def test_tasks_that_no_node_can_run(ray_address: str, wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        next(run_tasks(abs, [(1,)], 1, TaskResources.model_validate(wanted)))


def _meet(folder: Path, number: int, of: int) -> int:
    (folder / str(number)).touch()
    deadline = time.monotonic() + 30
    while len(list(folder.iterdir())) < of and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(list(folder.iterdir()))


def test_nodes_that_join_later_are_used(ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the tasks waits for the other; at first there is one CPU."""
    cpus = iter([1, 2])
    monkeypatch.setattr(cluster, "_cluster_cpus", lambda: next(cpus, 2))
    monkeypatch.setattr(cluster, "_CPU_COUNT_SECONDS", 0.1)
    jobs = [(tmp_path, number, 2) for number in range(2)]
    assert list(run_tasks(_meet, jobs, None, TaskResources())) == [2, 2]


def _die(unit: tuple[Piece, ...]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_task_whose_worker_never_survives(ray_address: str) -> None:
    piece = Piece(0, "a.jsonl", "/texts/a.jsonl", 5, 10, 5)
    with pytest.raises(UserError, match=r"/texts/a\.jsonl \[5, 10\): the worker died 2 times .*content\.unit_bytes"):
        next(run_tasks(_die, [((piece,),)], 1, TaskResources(retries=1)))
    with pytest.raises(UserError, match=r"^_die: the worker died 1 times"):  # a task that reads no file
        next(run_tasks(_die, [((),)], 1, TaskResources(retries=0)))


def test_memory_that_runs_out_every_time(make_config: MakeConfig, tmp_path: Path) -> None:
    """Ray's memory monitor ends every worker here; it would let the task start again for ever."""
    config = tmp_path / "config.json"
    (tmp_path / "slow_hook.py").write_text("import time\ndef wait(document_id, text):\n    time.sleep(60)\n")
    config.write_text(make_config(clean={"function": "slow_hook:wait"}).model_dump_json())
    job = subprocess.run(
        [sys.executable, "-m", "pipeline.prepare", str(config), "execution.task.retries=1"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        | {"PYTHONPATH": str(Path(__file__).parents[2])}
        | {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"},
    )
    assert job.returncode == 2, job.stderr
    assert "the worker died 2 times (OutOfMemoryError)" in job.stderr
    assert "content.unit_bytes" in job.stderr
    assert str(tmp_path) in job.stderr or "corpus" in job.stderr  # the file it was at


def test_ray_s_own_limit_of_retries_without_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "RAY_task_oom_retries"
    for given, during in ((None, "3"), ("0", "0")):
        if given is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, given)
        with cluster._retries_without_memory(TaskResources(retries=3)):
            assert os.environ[name] == during
        assert os.environ.get(name) == given


def test_a_head_node_that_dies(make_config: MakeConfig, ray_address: str, tmp_path: Path) -> None:
    """The command ends by itself, says why, and goes on elsewhere to the same bytes."""
    config = tmp_path / "config.json"
    config.write_text(make_config(unit_bytes=400).model_dump_json())
    undisturbed = prepare(make_config("whole-small", unit_bytes=400))["digest"]
    starter = "import sys, time\nfrom ray.cluster_utils import Cluster\n"
    starter += "c = Cluster(initialize_head=True, head_node_args={'num_cpus': 1, 'object_store_memory': 100 << 20})\n"
    starter += "print(c.address, flush=True)\nsys.stdin.readline()\nc.head_node.kill_gcs_server(check_alive=False)\n"
    starter += "print('killed', flush=True)\nsys.stdin.readline()\nc.shutdown()\n"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    head = subprocess.Popen(
        [sys.executable, "-c", starter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert head.stdin is not None
    assert head.stdout is not None
    try:
        address = head.stdout.readline().strip()
        command = [sys.executable, "-m", "pipeline.prepare", str(config), f"execution.ray_address={address}"]
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        units = tmp_path / "data" / ".work" / "units"
        deadline = time.monotonic() + 90
        while not list(units.glob("*.json")):
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        head.stdin.write("\n")
        head.stdin.flush()
        assert head.stdout.readline() == "killed\n"
        printed = job.communicate(timeout=90)[0]
        assert job.returncode == 1, printed
        assert "the Ray cluster is gone" in printed
        assert "start it and run the same command again" in printed
        assert not (tmp_path / "data" / MANIFEST).exists()
    finally:
        head.communicate("\n", timeout=60)
    assert prepare(make_config(unit_bytes=400))["digest"] == undisturbed
