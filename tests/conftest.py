"""What the machine offers to the tests: which marked tests can run here."""

import functools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import yaml

# Set by .ci/run, which installs what tests need: there a skip is a failure, except for want of a GPU.
FORBID_SKIPS = os.environ.get("FORBID_SKIPS") == "1"


def _missing_for_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA GPU"


def _missing_for_netns() -> str | None:
    if os.geteuid() != 0:
        return "not root"
    commands = [name for name in ("ip", "nsenter", "pdsh", "ssh-keygen", "sshd", "unshare") if not find_command(name)]
    if commands:
        return f"not installed: {', '.join(commands)}"
    probe = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return None if probe.returncode == 0 else f"no network namespaces: {probe.stderr.strip()}"


def _missing_for_slurm() -> str | None:
    if os.geteuid() != 0:
        return "not root"
    commands = [name for name in ("munged", "sbatch", "scontrol", "slurmctld", "slurmd") if not find_command(name)]
    return f"not installed: {', '.join(commands)}" if commands else None


def _missing_for_chromium() -> str | None:
    return None if any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))) else "no Chromium browser"


MISSING: dict[str, Callable[[], str | None]] = {
    "gpu": functools.cache(_missing_for_gpu),
    "netns": functools.cache(_missing_for_netns),
    "chromium": functools.cache(_missing_for_chromium),
    "slurm": functools.cache(_missing_for_slurm),
}


def find_command(name: str) -> str | None:
    """Path of a command, looked for where only root usually looks too."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip marked tests, with the reason, where the machine lacks what they need; the longest file comes first.

    It stays with one process, and the other one would wait for it at the end.
    """
    items.sort(key=lambda item: item.path.name != "test_readme.py")
    for item in items:
        for marker, missing in MISSING.items():
            if item.get_closest_marker(marker) and (reason := missing()):
                item.add_marker(pytest.mark.skip(reason=f"{marker}: {reason}"))


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: no skip is allowed here. {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if FORBID_SKIPS and not item.get_closest_marker("gpu"):
        _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if FORBID_SKIPS and "gpu" not in collector.path.relative_to(collector.config.rootpath).parts:
        _forbid_skip(report)
    return report


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def prepared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset with the splits train and valid and 384 pieces, made by pipeline.prepare from made-up words."""
    folder = tmp_path_factory.mktemp("prepared")
    generator = random.Random(5)
    words = ["".join(generator.choices("aeioubdfgklmnprst", k=generator.randint(2, 7))) for _ in range(150)]
    (folder / "text").mkdir()
    for number in range(24):
        drawn = generator.choices(words, weights=[1 / (rank + 1) for rank in range(150)], k=generator.randint(60, 220))
        (folder / "text" / f"{number:02d}.txt").write_text(" ".join(drawn) + ".\n")
    config = {
        "content": {
            "sources": [{"type": "text", "path": str(folder / "text")}],
            "tokenizer": {"train": {"vocab_size": 384, "num_threads": 1}},
            "splits": {"valid": 0.2},
        },
        "execution": {"output": str(folder / "data"), "workers": 1},
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "pipeline.prepare", str(folder / "data.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "data"


@pytest.fixture(scope="session")
def all_windows(prepared_data: Path) -> int:
    """The windows of 64 tokens in an epoch of `prepared_data`, rounded up to a multiple of 4."""
    tokens = json.loads((prepared_data / "manifest.json").read_text())["splits"]["train"]["tokens"]
    assert tokens % 64, "the last window is full: masks would be equal"
    windows = -(-tokens // 64)
    return -(-windows // 4) * 4


def recorded(run_dir: Path, name: str) -> dict[int, float]:
    """The values of a metric by step, the last attempt's where several recorded it."""
    values = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if name in record.get("metrics", {}):
            values[record["step"]] = record["metrics"][name]
    return values


@pytest.fixture(scope="session")
def metric() -> Callable[[Path, str], dict[int, float]]:
    """Read a metric of a run: its values by step."""
    return recorded
