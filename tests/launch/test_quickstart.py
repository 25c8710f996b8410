"""The quick start's stages."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.quickstart import Stages
from pipeline.errors import UserError, run_command


def test_a_stage_that_is_interrupted_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches both; what runs is not killed while it puts things in order."""
    stages, wait, waiting = Stages(tmp_path / "stages.json"), subprocess.Popen.wait, tmp_path / "waiting"

    def say_and_wait(process: subprocess.Popen[bytes], *arguments: Any) -> int:
        waiting.touch()
        return wait(process, *arguments)

    monkeypatch.setattr(subprocess.Popen, "wait", say_and_wait)
    script = f"until [ -e {waiting} ]; do sleep 0.02; done; kill -INT $PPID; sleep 0.6; touch {tmp_path}/in-order"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            stages.run("data", "", ["sh", "-c", script])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "in-order").exists()
    assert json.loads((tmp_path / "stages.json").read_text()).keys() == {"data"}
    with pytest.raises(UserError, match="data ended with status 3"):
        stages.run("data", "", ["sh", "-c", "exit 3"])


def test_an_interrupted_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
