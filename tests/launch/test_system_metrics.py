"""The load of every node is sampled as long as its trainer lives, whatever cannot be read."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.config import load_run_config
from launch.engine import Processes
from launch.run_directory import RunDirectory
from launch.system_metrics import Load
from launch.tracking import NodeSampler, run_facts
from tests.launch.mlflow_server import wait_for

ROOT = Path(__file__).resolve().parents[2]


class NVMLError(Exception):
    pass


def power(gpu: int) -> int:
    if gpu == 3:
        raise NVMLError("not supported")
    return 350_000


NVML = SimpleNamespace(
    NVMLError=NVMLError,
    nvmlInit=lambda: None,
    nvmlDeviceGetCount=lambda: 4,
    nvmlDeviceGetHandleByIndex=lambda index: index,
    nvmlDeviceGetUUID=lambda gpu: f"GPU-{gpu}abc",
    nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=20e9, total=80e9),
    nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=90 + gpu),
    nvmlDeviceGetPowerUsage=power,
    nvmlDeviceGetEnforcedPowerLimit=lambda gpu: 700_000,
)


def test_names_are_mlflows_and_what_cannot_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", NVML)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-3")
    found = Load(tmp_path, os.getpid()).read()
    assert found["gpu_1_utilization_percentage"] == 91
    assert found["gpu_1_memory_usage_megabytes"] == 20_000
    assert found["gpu_1_memory_usage_percentage"] == 25
    assert found["gpu_1_power_usage_watts"] == 350
    assert found["gpu_1_power_usage_percentage"] == 50
    assert found["gpu_3_utilization_percentage"] == 93
    assert not [name for name in found if name.startswith(("gpu_0", "gpu_2", "gpu_3_power"))]
    from mlflow.system_metrics.metrics import cpu_monitor, disk_monitor, gpu_monitor, network_monitor

    sources = "".join(
        Path(str(module.__file__)).read_text() for module in (cpu_monitor, disk_monitor, gpu_monitor, network_monitor)
    )
    for name in found:
        assert name == "process_memory_megabytes" or name.replace("gpu_1", "gpu_{i}").replace("gpu_3", "gpu_{i}") in (
            sources
        ), name

    found = Load(tmp_path / "gone", 2**30).read()
    assert "cpu_utilization_percentage" in found
    assert "network_receive_megabytes" in found
    assert "disk_usage_percentage" not in found
    assert "process_memory_megabytes" not in found


def start(file: Path, attempt: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "launch.system_metrics", str(file), "--prefix", "system/", "--seconds", "0.05"]
    command += ["--attempt", str(attempt), "--follow", str(os.getpid())]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_restart_counts_on_and_only_the_trainers_end_is_the_end(tmp_path: Path) -> None:
    file = tmp_path / "system/node-0.jsonl"
    first = start(file, 0)
    wait_for(lambda: len(lines(file)) > 3, 60)
    first.send_signal(signal.SIGTERM)  # SLURM's, or a launcher's, to all processes: the trainer saves first
    seen = len(lines(file))
    wait_for(lambda: len(lines(file)) > seen + 3, 60)
    first.kill()
    first.wait()
    with open(file, "a") as torn:
        torn.write('{"time": 1')
    assert first.stdin
    first.stdin.close()

    second = start(file, 1)
    wait_for(lambda: not file.read_text().endswith("1") and lines(file)[-1]["attempt"] == 1, 60)
    assert second.stdin
    second.stdin.close()
    assert second.wait(30) == 0
    samples = lines(file)
    assert [sample["step"] for sample in samples] == list(range(len(samples)))
    assert "system/cpu_utilization_percentage" in samples[-1]["metrics"]


def test_each_node_has_one_sampler(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Four(Processes):
        def gather(self, value: Any) -> list[Any]:
            return [0, 1, 0, 1]

    config = load_run_config(write_config(run={"dir": str(tmp_path / "run")}, tracking={"system_metrics_seconds": 60}))
    directory = RunDirectory(config.run.dir)
    directory.open(config, run_facts(config, [], 4))
    monkeypatch.setenv("LOCAL_RANK", "0")
    samplers = [NodeSampler(directory, config, 0, Four(rank, 4, "cpu", None)) for rank in range(4)]  # type: ignore[arg-type]
    time.sleep(0.5)
    for sampler in samplers:
        sampler.close()
    files = sorted(directory.system.iterdir())
    assert [file.name for file in files] == ["node-0.jsonl", "node-1.jsonl"]
    for node, file in enumerate(files):
        (sample,) = lines(file)  # the last one, at the end
        assert f"system/node_{node}/disk_usage_percentage" in sample["metrics"]
