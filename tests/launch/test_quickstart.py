"""The quick start's stages."""

import json
import signal
from pathlib import Path

import pytest

from launch.quickstart import Stages
from pipeline.errors import UserError, run_command


def test_a_stage_that_is_interrupted_ends_by_itself(tmp_path: Path) -> None:
    """Ctrl-C reaches both; what runs is not killed while it puts things in order."""
    stages = Stages(tmp_path / "stages.json")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            stages.run("data", "", ["sh", "-c", f"sleep 1; kill -INT $PPID; sleep 0.6; touch {tmp_path}/in-order"])
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
