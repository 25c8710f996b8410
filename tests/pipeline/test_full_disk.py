"""A disk that is really full: a small file system of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.config import PrepareConfig
from pipeline.prepare import prepare
from pipeline.shards import MANIFEST
from pipeline.verify import verify

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted tmpfs of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(
    small_disk: Path, make_config: Callable[..., PrepareConfig], ray_address: str, tmp_path: Path
) -> None:
    """The command says so, leaves nothing that counts, and goes on once there is room."""
    whole = prepare(make_config("whole"))
    config = tmp_path / "config.json"
    config.write_text(make_config(small_disk / "data").model_dump_json())
    command = [sys.executable, "-m", "pipeline.prepare", str(config), f"execution.ray_address={ray_address}"]
    job = subprocess.run(command, capture_output=True, text=True)
    assert job.returncode == 2, job.stderr
    assert "cannot be written: No space left on device. Make room" in job.stderr
    assert not (small_disk / "data" / MANIFEST).exists()
    assert not [file for file in (small_disk / "data").rglob(".*") if file.is_file()]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert prepare(make_config(small_disk / "data"))["digest"] == whole["digest"]
    assert list(verify(small_disk / "data")) == []
