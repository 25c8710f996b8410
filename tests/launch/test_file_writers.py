"""What a checkpoint's threads write is what the state was when it was handed over, with the hashes of the files."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launch.file_writers import COPY_BLOCK, FileWriters, HostCopy
from pipeline.atomic import hash_file


@pytest.fixture
def copy() -> HostCopy:
    return HostCopy(torch.device("cpu"))


def test_a_copy_is_whole_and_on_its_own(copy: HostCopy) -> None:
    large = torch.arange(3 * COPY_BLOCK // 4 + 5, dtype=torch.float32)
    turned, half = torch.arange(6.0).view(2, 3).T, torch.randn(5).bfloat16()
    state = {
        "large": large,
        "view": large[7:9],
        "turned": turned,
        "half": [half, (torch.tensor(3), torch.empty(0, 4))],
        "rest": {"step": 3, "name": "x", "none": None},
    }
    expected = {"large": large.clone(), "turned": turned.clone(), "half": half.clone()}
    found = copy(state)
    large.zero_()
    assert torch.equal(found["large"], expected["large"])
    assert torch.equal(found["view"], expected["large"][7:9])
    assert found["view"].untyped_storage().nbytes() == 8
    assert torch.equal(found["turned"], expected["turned"])
    assert torch.equal(found["half"][0], expected["half"])
    assert found["half"][1][0].item() == 3
    assert found["half"][1][1].shape == (0, 4)
    assert found["rest"] == state["rest"]


@pytest.mark.parametrize("background", [True, False])
def test_files_hold_what_was_and_are_hashed(copy: HostCopy, tmp_path: Path, background: bool) -> None:
    held = threading.Event()

    def slow() -> Iterator[bytes]:
        if background:
            held.wait()
        yield b"one"
        yield b"two" * 50_000_000

    weights = torch.arange(1000.0)
    writers = FileWriters(tmp_path, copy if background else None)
    writers.write(tmp_path / "slow", slow())
    writers.save({"weights": weights}, tmp_path / "state.pt")
    weights.zero_()
    assert writers.done is not background
    held.set()
    files, problem = writers.wait()
    assert problem is None
    assert writers.done
    assert files.keys() == {"slow", "state.pt"}
    for name, entry in files.items():
        assert entry == {"size": (tmp_path / name).stat().st_size, "sha256": hash_file(tmp_path / name)}
    assert files["slow"]["size"] == 150_000_003
    loaded = torch.load(tmp_path / "state.pt", mmap=True)
    assert torch.equal(loaded["weights"], torch.arange(1000.0))
    assert writers.seconds["written"] > 0


def test_what_cannot_be_written_is_told(copy: HostCopy, tmp_path: Path) -> None:
    writers = FileWriters(tmp_path, copy)
    writers.save({"a": torch.ones(3)}, tmp_path / "there.pt")
    writers.save({"a": torch.ones(3)}, tmp_path / "missing" / "state.pt")
    files, problem = writers.wait()
    assert "FileNotFoundError" in (problem or "")
    assert files.keys() == {"there.pt"}


def test_what_is_given_up_ends_soon(copy: HostCopy, tmp_path: Path) -> None:
    started = threading.Event()

    def endless() -> Iterator[bytes]:
        while True:
            yield b"x"
            started.set()

    writers = FileWriters(tmp_path, copy)
    writers.write(tmp_path / "endless", endless())
    started.wait()
    writers.give_up()
    assert writers.done
