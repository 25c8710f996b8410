"""The door `python -m launch.by_ray`: a real Ray cluster of two nodes on this machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import launch.by_ray
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
second = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """The environment of commands of a cluster of two nodes with one processor each."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own
    )
    assert cluster.stdout is not None
    try:
        yield own | {"RAY_ADDRESS": cluster.stdout.readline().strip()}
    finally:
        cluster.communicate("\n", timeout=60)


def by_ray(
    environment: dict[str, str],
    *arguments: str,
    command: Sequence[str] = ("-m", "launch.by_ray"),
    cwd: Path = ROOT,
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *command, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_run_over_two_nodes_stops_goes_on_and_has_the_losses_of_the_launcher(
    environment: dict[str, str],
    launch: Callable[..., "subprocess.CompletedProcess[str]"],
    metric: Callable[[Path, str], dict[int, float]],
    run_config: Path,
    tmp_path: Path,
) -> None:
    run, steps = tmp_path / "run", 60
    settings = [str(run_config), f"train.tokens={steps * 512}"]
    first = by_ray(environment, "--processes-per-node=1", *settings, f"run.dir={run}")
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(metric(run, "train/loss")) < 3:
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 75, output
    assert "received SIGTERM" in output
    assert len(metric(run, "train/loss")) < steps
    second = by_ray(environment, "--processes-per-node=1", *settings, f"run.dir={run}", "--resume")
    output, _ = second.communicate(timeout=200)
    assert second.returncode == 0, output
    other = launch("launch/train.py", *settings, f"run.dir={tmp_path / 'other'}")
    assert other.returncode == 0, other.stderr
    assert metric(run, "train/loss") == metric(tmp_path / "other", "train/loss")


IMPATIENT = """
from launch import by_ray
by_ray._GRACE_SECONDS = 1.0
by_ray.run_command(by_ray.main)
"""


def test_a_node_that_fails_before_all_have_met_ends_the_others_with_its_status(
    environment: dict[str, str], run_config: Path, prepared_data: Path, tmp_path: Path
) -> None:
    """The second node has no data where the first one has; the first waits for it. Paths are relative."""
    (tmp_path / "data0").symlink_to(prepared_data)
    run = by_ray(
        environment,
        "--processes-per-node=1",
        str(run_config),
        "run.dir=run",
        "data.path=data${oc.env:RANK,0}",
        command=("-c", IMPATIENT),
        cwd=tmp_path,
    )
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 2, output
    assert f"{tmp_path / 'data1'}: not a dataset" in output
    assert "ending what still runs on node 0" in output


def test_a_process_that_fails_ends_those_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/train.py").write_text(
        "import os, signal, time\n"
        "time.sleep(600) if os.environ['RANK'] == '0' else os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setattr(launch.by_ray, "ROOT", tmp_path)
    monkeypatch.setattr(launch.by_ray, "_GRACE_SECONDS", 0.5)
    node = launch.by_ray.NodeProcesses()
    assert node.run([{"RANK": "0"}, {"RANK": "1"}], [], str(tmp_path)) == [128 + signal.SIGKILL]


def test_what_is_passed_on_to_the_processes(monkeypatch: pytest.MonkeyPatch, run_config: Path) -> None:
    monkeypatch.setattr(launch.by_ray, "connect", lambda: None)
    monkeypatch.setattr(launch.by_ray, "run", lambda *passed: passed)
    monkeypatch.setattr(sys, "argv", ["by_ray", str(run_config), "train.tokens=2048", "--rollback", "--nodes=2"])
    passed: object = launch.by_ray.main()
    assert passed == ([str(run_config), "train.tokens=2048", "--rollback"], 2, None)
    for option in ("--nodes", "--processes-per-node"):
        monkeypatch.setattr(sys, "argv", ["by_ray", str(run_config), f"{option}=0"])
        with pytest.raises(UserError, match=f"{option}: 0: give at least 1"):
            launch.by_ray.main()


def test_a_cluster_that_is_too_small_and_none_at_all(
    environment: dict[str, str], run_config: Path, tmp_path: Path
) -> None:
    settings = [str(run_config), f"run.dir={tmp_path / 'run'}"]
    for options, named, address in (
        (["--nodes=3", "--processes-per-node=1"], "the cluster's nodes have 1, 1", environment["RAY_ADDRESS"]),
        ([], "--processes-per-node: the cluster has no GPUs", environment["RAY_ADDRESS"]),
        (["--processes-per-node=1"], "RAY_ADDRESS: 127.0.0.1:9: cannot be reached", "127.0.0.1:9"),
    ):
        done = by_ray(environment | {"RAY_ADDRESS": address}, *options, *settings)
        output, _ = done.communicate(timeout=120)
        assert done.returncode == 2, output
        assert named in output
    assert not (tmp_path / "run").exists()
