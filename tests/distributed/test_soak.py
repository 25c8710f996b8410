"""Short forms of the two soaks: a run that is hurt equals, or follows, an undisturbed one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")


@pytest.mark.parametrize(("kind", "fault"), [("same", "full disk"), ("changing", "checkpoint byte flipped")])
def test_a_short_soak(prepared_data: Path, tmp_path: Path, kind: str, fault: str) -> None:
    # The seed changes from 1 process without ZeRO to 2 with stage 3 and 1 with stage 1.
    command = [sys.executable, "-m", "benchmarks.soak", "--kind", kind, "--seed", "362", "--pause", "1", "--no-server"]
    command += ["--data", str(prepared_data), "--json", str(tmp_path / "soak.json"), "--folder", str(tmp_path / "soak")]
    done = subprocess.run([*command, "--faults", fault], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "soak.json").read_text())
    assert [event["fault"] for event in found["events"]] == [fault, "SIGTERM rank"]
    assert found["events"][-1]["statuses"] == [75]
    assert all(event["seconds"] is not None for event in found["events"])
    assert all(verdict["passed"] for verdict in found["verdicts"])
    assert {verdict["name"] for verdict in found["verdicts"]} >= {"losses", "weights", "samples", "MLflow store"}
