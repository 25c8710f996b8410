"""A disk that is really full: a small file system of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import Content, PrepareConfig
from pipeline.duplicates import find_duplicates, fingerprint_unit
from pipeline.errors import UserError
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


def test_a_disk_too_small_for_the_marks_of_duplicates(small_disk: Path) -> None:
    """They are written through a map: a block that cannot be had would end the process by SIGBUS."""
    content = Content.model_validate(
        {
            "sources": [{"type": "text", "path": "texts"}],
            "tokenizer": {"path": "m"},
            "clean": {"exact_duplicates": True},
        }
    )

    def run(function: Callable[..., Any], jobs: Sequence[Any]) -> Iterator[Any]:
        if function is fingerprint_unit:
            yield 0, {"documents": 1 << 20, "kept": 0}
        else:
            yield np.arange(1 << 20)

    with pytest.raises(UserError, match="found: cannot be written: No space left on device"):
        find_duplicates(content, [()], small_disk, run)


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
