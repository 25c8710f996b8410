"""The main job, small: real text, shards, two training processes, MLflow, a model that writes. `make quickstart`.

Everything lies in runs/quickstart/. Each stage skips what is done, so a second call continues or says that it is done.
Arguments are settings of the run (`key=value`).
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from launch.config import load_run_config
from launch.console import duration
from launch.engine import free_port
from launch.report import write_report
from launch.run_directory import RunDirectory
from pipeline.atomic import write_json
from pipeline.errors import UserError, run_command

DATA_CONFIG = "configs/data/sotu.yaml"
RUN_CONFIG = "configs/quickstart.yaml"
PROCESSES = 2


def main() -> int:
    """Prepare the data, train, write the report."""
    root = Path(__file__).resolve().parent.parent
    os.chdir(root)
    overrides = sys.argv[1:]
    config = load_run_config(RUN_CONFIG, ["run.resume=auto", *overrides])
    directory = RunDirectory(config.run.dir)
    directory.path.mkdir(parents=True, exist_ok=True)
    report = directory.path / "report.md"
    if report.exists() and (directory.done_tokens or 0) >= config.train.tokens:
        print(f"The quick start is done: {report}\nDelete {directory.path} to run it anew.")
        return 0
    stages = Stages(directory.path / "stages.json")
    stages.run("data", "text to token shards, with Ray", [sys.executable, "-m", "pipeline.prepare", DATA_CONFIG])
    launcher = ["deepspeed", "--quiet", "--num_accelerators", str(PROCESSES), "--master_addr", "127.0.0.1"]
    launcher += ["--master_port", str(free_port())]
    launcher += ["launch/train.py", RUN_CONFIG, "run.resume=auto", *overrides]
    stages.run(
        "training", f"{config.train.tokens:,} tokens, {PROCESSES} processes, ZeRO-{config.train.zero_stage}", launcher
    )
    if directory.done_tokens is None:
        raise UserError("training stopped before its last step; run the same command again to continue")
    print("\n== report", flush=True)
    write_report(config, report, stages.seconds)
    print(report.read_text())
    return 0


class Stages:
    """Runs commands one after another and remembers how long each took, over all calls."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}

    def run(self, name: str, what: str, command: list[str]) -> None:
        """Run `command` with its output shown. Raises `UserError` if it fails."""
        print(f"\n== {name}: {what}", flush=True)
        began = time.monotonic()
        process = subprocess.Popen(command, env=child_environment())
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()  # Ctrl-C went to it too, and it has something to put in order
            raise
        finally:
            seconds = time.monotonic() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            write_json(self._file, self.seconds)
        if status != 0:
            raise UserError(f"{name} ended with status {status} (see above); run the same command again to continue")
        print(f"== {name}: {duration(seconds)}", flush=True)


def child_environment() -> dict[str, str]:
    """The environment of this process, with this interpreter's commands first and one thread a training process."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1"}
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed finds that too, with a warning
    return environment


if __name__ == "__main__":
    run_command(main)
