"""Damage to a checkpoint's files is found, whichever file and byte it is."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.checkpoint import _digest, damage, newest_usable
from launch.engine import Processes
from pipeline.atomic import hash_file


class Alone(Processes):
    """One process without a process group."""

    def __init__(self) -> None:
        super().__init__(0, 1, torch.device("cpu"), None)

    def once(self, action: Callable[[], Any]) -> Any:
        return action()

    def gather(self, value: Any) -> list[Any]:
        return [value]


def write_checkpoint(directory: Path, step: int) -> Path:
    checkpoint = directory / f"step-{step:08d}"
    (checkpoint / "deepspeed").mkdir(parents=True)
    names = ["deepspeed/one.pt", "deepspeed/two.pt", "latest"]
    files = {}
    for number, name in enumerate(names):
        (checkpoint / name).write_bytes(random.Random(step + number).randbytes(300 + number))
        files[name] = {"size": 300 + number, "sha256": hash_file(checkpoint / name)}
    manifest = {"format_version": 2, "step": step, "tokens": 512 * step, "files": files}
    (checkpoint / "manifest.json").write_text(
        json.dumps(manifest | {"sha256": _digest(manifest)}, separators=(",", ":"))
    )
    return checkpoint


@pytest.mark.parametrize("name", ["deepspeed/one.pt", "latest", "manifest.json"])
def test_every_damage_is_found(tmp_path: Path, name: str) -> None:
    checkpoint = write_checkpoint(tmp_path, 4)
    assert damage(checkpoint, Alone()) is None
    path = checkpoint / name
    whole = path.read_bytes()
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 1
        path.write_bytes(content)
        assert str(checkpoint) in (damage(checkpoint, Alone()) or ""), position
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert name in (damage(checkpoint, Alone()) or "")
    path.unlink()
    assert name in (damage(checkpoint, Alone()) or "")
    path.mkdir()
    assert name in (damage(checkpoint, Alone()) or "")


def test_the_newest_whole_one_is_used(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    (tmp_path / "step-00000004/deepspeed/two.pt").unlink()
    (tmp_path / "step-00000003/manifest.json").write_text("{}")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".writing-step-00000005")
    checkpoint, reasons = newest_usable(tmp_path, Alone())
    assert checkpoint == tmp_path / "step-00000002"
    assert len(reasons) == 2
    assert reasons[0].startswith("step-00000004 passed over: ")
    assert reasons[0].endswith("two.pt is missing")
    assert reasons[1].startswith("step-00000003 passed over: ")
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"step-{step:08d}/deepspeed")
    assert newest_usable(tmp_path, Alone())[0] is None
