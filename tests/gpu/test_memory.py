"""The plan's memory beside what torch allocates on the GPU, and a step that needs too much."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]

TOO_MUCH = """
from benchmarks import memory
from launch import engine as engines
from launch.first_step import memory_errors_explained, take_mock_step
from pipeline.errors import UserError

memory.SIZES["110m"]["micro_batch"] = 64
config = memory.cell_config("110m", "zero1", compiled=False)
processes = engines.start_processes()
engines.build_model = memory.build_quickly
try:
    with memory_errors_explained(config, processes):
        take_mock_step(config, engines.build_engine(config, processes), processes)
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("size", ["110m", "350m", "1.3b"])
def test_the_plan_is_within_fifteen_percent(size: str, tmp_path: Path) -> None:
    settings = ["zero1", "zero1-recompute-all", "zero3"]
    command = [sys.executable, "-m", "benchmarks.memory", "--sizes", size, "--settings", *settings, "--steps", "1"]
    done = subprocess.run([*command, "--json", str(tmp_path / "memory.json")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok"] * len(settings)
    for row in rows:
        assert row["planned_gib"] == pytest.approx(row["peak_gib"], rel=0.15), row["setting"]


def test_a_mock_step_that_needs_too_much_says_what_would_fit() -> None:
    done = subprocess.run([sys.executable, "-c", TOO_MUCH], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for expected in ("out of memory in a first step", "it asked for", "to fit, one of: ", "train.micro_batch="):
        assert expected in done.stdout
