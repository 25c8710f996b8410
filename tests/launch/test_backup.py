"""Copies of checkpoints in the background: memory:// and places that fail or are slow."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from launch import backup as backup_module
from launch.backup import Backup, check_place
from launch.checkpoint import read_manifest
from pipeline.errors import UserError

WriteCheckpoint = Callable[..., Path]


class Place(MemoryFileSystem):
    """A file system in memory that can be made to fail, or to wait for a gate."""

    protocol = "place"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failing = False
    failures = 0
    gate = threading.Event()
    written: ClassVar[list[str]] = []

    def put_file(self, lpath: str, rpath: str, *arguments: Any, **keywords: Any) -> None:
        assert Place.gate.wait(30)
        if Place.failing:
            Place.failures += 1
            raise OSError("no route to host")
        super().put_file(lpath, rpath, *arguments, **keywords)
        Place.written.append(rpath)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("place://", "memory://")))


@pytest.fixture(autouse=True)
def place() -> Iterator[None]:
    fsspec.register_implementation("place", Place, clobber=True)
    Place.store.clear()
    Place.pseudo_dirs[:] = [""]
    Place.written.clear()
    Place.failing, Place.failures = False, 0
    Place.gate.set()
    yield
    Place.gate.set()


def close(copies: Backup, *, hurry: bool = False) -> str | None:
    return copies.close(hurry=hurry, give_up=lambda: False)


def copied(root: str, filesystem: str = "place") -> dict[str, bytes]:
    found = fsspec.filesystem(filesystem)
    return {path.removeprefix(root): found.cat_file(path) for path in found.find(root)}


def here(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.glob("step-*/**/*") if path.is_file()]
    return {f"/{path.relative_to(directory)}": path.read_bytes() for path in files}


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_all_is_copied(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, root = tmp_path / "checkpoints", f"{tmp_path}/there"
    write_checkpoint(directory, 2)
    (directory / ".writing-step-00000009").mkdir()
    copies = Backup(directory, f"{scheme}://{root}", "this")
    write_checkpoint(directory, 4)
    copies.notice()
    assert close(copies) is None
    assert copied(root, scheme) == here(directory)
    assert len(here(directory)) == 8
    assert capsys.readouterr().out == ""


def test_the_manifest_comes_last_and_what_was_begun_is_finished(
    write_checkpoint: WriteCheckpoint, tmp_path: Path
) -> None:
    for step in (2, 4):
        write_checkpoint(tmp_path, step)
    fsspec.filesystem("place").pipe_file("/there/step-00000004/deepspeed/one.pt", b"half")
    assert close(Backup(tmp_path, "place://there", "this")) is None
    assert copied("/there") == here(tmp_path)
    assert [path.split("/")[2] for path in Place.written] == ["step-00000004"] * 4 + ["step-00000002"] * 4
    assert [path.endswith("manifest.json") for path in Place.written] == [False] * 3 + [True] + [False] * 3 + [True]
    Place.written.clear()
    assert close(Backup(tmp_path, "place://there", "this")) is None
    assert Place.written == [], "what is there is not sent again"
    shutil.rmtree(tmp_path / "step-00000004")
    write_checkpoint(tmp_path, 4, attempt=1)
    assert close(Backup(tmp_path, "place://there", "this")) is None
    assert copied("/there") == here(tmp_path), "the run has written this step again"


def test_a_failing_place_is_a_warning_and_tried_again(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Place.failing = True
    write_checkpoint(tmp_path, 2)
    copies = Backup(tmp_path, "place://there", "this")
    wait_for(lambda: Place.failures == 1 and copies.busy_with is None)
    said = capsys.readouterr().out
    assert said.count("warning: step-00000002 was not copied to place://there") == 1
    assert said.count("no route to host") == said.count("\n") == 1
    Place.failing = False
    write_checkpoint(tmp_path, 4)
    copies.notice()
    assert close(copies) is None
    assert copied("/there") == here(tmp_path)
    assert capsys.readouterr().out == ""


def test_what_is_missing_at_the_end_is_said(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Place.failing = True
    for step in (2, 4):
        write_checkpoint(tmp_path, step)
    message = close(Backup(tmp_path, "place://there", "this"))
    assert message is not None
    assert message.startswith("warning: not copied to place://there: step-00000002, step-00000004; they are in ")
    Place.failing = False
    Place.gate.clear()
    monkeypatch.setattr(backup_module, "HURRY_SECONDS", 0.3)
    monkeypatch.setattr(backup_module, "PATIENCE_SECONDS", 0.3)
    for hurry in (True, False):
        copies, began = Backup(tmp_path, "place://there", "this"), time.monotonic()
        message = close(copies, hurry=hurry)
        assert time.monotonic() - began < 5, "a place that hangs is not waited for"
        assert message is not None
        assert "step-00000002, step-00000004" in message
        Place.gate.set()
        copies._thread.join(10)
        fsspec.filesystem("place").rm("/there", recursive=True)
        Place.gate.clear()


def test_training_does_not_wait(write_checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    Place.gate.clear()
    write_checkpoint(tmp_path, 2)
    began = time.monotonic()
    copies = Backup(tmp_path, "place://there", "this")
    for _ in range(100):
        copies.notice()
    assert time.monotonic() - began < 0.5
    wait_for(lambda: copies.busy_with == tmp_path / "step-00000002")
    Place.gate.set()
    assert close(copies) is None


def test_what_another_run_has_there_stays(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "one", 2)
    write_checkpoint(tmp_path / "other", 2, "other")
    assert close(Backup(tmp_path / "one", "place://there", "this")) is None
    copies = Backup(tmp_path / "other", "place://there", "other")
    copies.notice()
    assert "step-00000002" in (close(copies) or "")
    assert capsys.readouterr().out.count("is of another run; set checkpoint.copy_to to a place of") == 1
    assert copied("/there") == here(tmp_path / "one")


def test_a_checkpoint_that_goes_meanwhile_is_no_failure(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Place.gate.clear()
    checkpoint = write_checkpoint(tmp_path, 2)
    copies = Backup(tmp_path, "place://there", "this")
    wait_for(lambda: copies.busy_with is not None)
    shutil.rmtree(checkpoint)
    Place.gate.set()
    assert close(copies) is None
    assert capsys.readouterr().out == ""
    assert "/step-00000002/manifest.json" not in copied("/there")


def test_one_that_goes_before_it_is_read_is_no_failure(
    write_checkpoint: WriteCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def delete_and_read(checkpoint: Path) -> dict[str, Any]:
        shutil.rmtree(checkpoint)
        return read_manifest(checkpoint)

    write_checkpoint(tmp_path, 2)
    monkeypatch.setattr(backup_module, "read_manifest", delete_and_read)
    assert close(Backup(tmp_path, "place://there", "this")) is None
    assert capsys.readouterr().out == ""


def test_places_that_are_none(tmp_path: Path) -> None:
    check_place(None, tmp_path)
    check_place("place://there", tmp_path)
    with pytest.raises(UserError, match=r"checkpoint\.copy_to: nosuch://there: Protocol not known: nosuch"):
        check_place("nosuch://there", tmp_path)
    with pytest.raises(UserError, match=r"is where the run keeps its checkpoints; name another place"):
        check_place(f"file://{tmp_path}/", tmp_path)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
