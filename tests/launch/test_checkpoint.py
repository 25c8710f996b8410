"""Damage to a checkpoint's files is found, whichever file and byte it is."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.checkpoint import damage, newest_usable
from launch.engine import Processes

WriteCheckpoint = Callable[[Path, int], Path]


@pytest.mark.parametrize("name", ["deepspeed/one.pt", "latest", "manifest.json"])
def test_every_damage_is_found(write_checkpoint: WriteCheckpoint, alone: Processes, tmp_path: Path, name: str) -> None:
    checkpoint = write_checkpoint(tmp_path, 4)
    assert damage(checkpoint, alone) is None
    path = checkpoint / name
    whole = path.read_bytes()
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 1
        path.write_bytes(content)
        assert str(checkpoint) in (damage(checkpoint, alone) or ""), position
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert name in (damage(checkpoint, alone) or "")
    path.unlink()
    assert name in (damage(checkpoint, alone) or "")
    path.mkdir()
    assert name in (damage(checkpoint, alone) or "")


def test_the_newest_whole_one_is_used(write_checkpoint: WriteCheckpoint, alone: Processes, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    (tmp_path / "step-00000004/deepspeed/two.pt").unlink()
    (tmp_path / "step-00000003/manifest.json").write_text("{}")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".writing-step-00000005")
    checkpoint, reasons = newest_usable(tmp_path, alone)
    assert checkpoint == tmp_path / "step-00000002"
    assert len(reasons) == 2
    assert reasons[0].startswith("step-00000004 passed over: ")
    assert reasons[0].endswith("two.pt is missing")
    assert reasons[1].startswith("step-00000003 passed over: ")
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"step-{step:08d}/deepspeed")
    assert newest_usable(tmp_path, alone)[0] is None
