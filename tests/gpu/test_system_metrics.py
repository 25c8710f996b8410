"""The load of a real GPU."""

import os
from pathlib import Path

import pytest

from launch.system_metrics import Load

pytestmark = pytest.mark.gpu


def test_a_gpu_is_read(tmp_path: Path) -> None:
    pytest.importorskip("pynvml")
    found = Load(tmp_path, os.getpid()).read()
    for ending in ("utilization_percentage", "memory_usage_megabytes", "power_usage_watts"):
        assert any(name.startswith("gpu_") and name.endswith(ending) for name in found), ending
