"""Adopting shards: what is refused, naming file and document, and that nothing is left behind.

Files are written here byte by byte, as the format is described: the writer that makes right ones is Megatron's own, in
test_megatron.py.
"""

import errno
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.adopt import adopt
from pipeline.errors import UserError
from pipeline.shards import TokenDataset
from pipeline.verify import verify

CODES = {"u1": 1, "<i4": 4, "<f4": 7, "<u2": 8}


def write(
    prefix: Path,
    sequences: Sequence[Sequence[int]],
    boundaries: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    dtype: str = "<u2",
) -> Path:
    """A pair of files; by default every sequence is a document, in order."""
    lengths = [len(sequence) for sequence in sequences]
    size = np.dtype(dtype).itemsize
    offsets = [size * sum(lengths[:i]) for i in range(len(lengths))] if offsets is None else offsets
    boundaries = range(len(lengths) + 1) if boundaries is None else boundaries
    flat = [token for sequence in sequences for token in sequence]
    Path(f"{prefix}.bin").write_bytes(np.array(flat, dtype).tobytes())
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(boundaries))
    index += np.array(lengths, "<i4").tobytes() + np.array(offsets, "<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(index + np.array(boundaries, "<i8").tobytes())
    return prefix


def test_sequences_that_lie_in_another_order(tmp_path: Path, bpe: str) -> None:
    """Documents are what the index says: here the second lies before the first, and a gap belongs to none."""
    prefix = write(tmp_path / "a", [[20, 1], [9, 9], [10, 11], [12, 1]])
    # Three sequences now: [10, 11] and [12, 1], one document; then [20, 1].
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 3)
    index = header + np.array([2, 2, 2], "<i4").tobytes() + np.array([8, 12, 0], "<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(index + np.array([0, 2, 3], "<i8").tobytes())
    adopt([prefix], tmp_path / "data", Path(bpe))
    dataset = TokenDataset.open(tmp_path / "data", "train")
    assert dataset.read(0, 6).tolist() == [10, 11, 12, 1, 20, 1]
    assert dataset.document_numbers(0, 6).tolist() == [0, 0, 0, 0, 1, 1]
    assert list(verify(tmp_path / "data")) == []


@pytest.mark.parametrize(
    ("sequences", "options", "expected"),
    [
        ([[5, 1], [6, 400, 1]], {}, r"a\.bin: document 1: token 1 is 400, outside the tokenizer's vocabulary of 400"),
        ([[5, 1], [6, -3, 1]], {"dtype": "<i4"}, r"a\.bin: document 1: token 1 is -3, outside"),
        ([[5, 1], [6, 1, 7, 1]], {}, r"a\.bin: document 1: token 1 is the end token 1, before the document's end"),
        ([[5, 1], [1, 1]], {}, r"a\.bin: document 1: token 0 is the end token 1, before the document's end"),
        ([[5, 1], [], [7, 8]], {}, r"a\.bin: document 2: token 1, its last, is 8, not the end token 1: .*--append-eos"),
        ([[5, 1]], {"dtype": "<f4"}, r"a\.idx: float32 values: not tokens"),
        ([[5, 1], [6, 1]], {"boundaries": [0, 1]}, r"a\.idx: 1 sequences belong to no document: .*end_document"),
        ([[5, 1], [6, 1]], {"boundaries": [0, 2, 1, 2]}, r"a\.idx: damaged: its documents do not start"),
        ([[5, 1], [6, 1]], {"offsets": [0, 6]}, r"a\.bin: truncated: 8 bytes, its index needs 10"),
        ([[5, 1], [6, 1]], {"offsets": [0, 3]}, r"a\.idx: damaged: its sequences are not whole uint16 tokens"),
        ([[], []], {}, r"a: no document with tokens"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_left(
    tmp_path: Path, bpe: str, sequences: list[list[int]], options: dict[str, Any], expected: str
) -> None:
    prefix = write(tmp_path / "a", sequences, **options)
    with pytest.raises(UserError, match=expected):
        adopt([prefix], tmp_path / "data", Path(bpe))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_small_types_are_converted(tmp_path: Path, bpe: str) -> None:
    adopt([write(tmp_path / "a", [[200, 1]], dtype="u1")], tmp_path / "data", Path(bpe))
    assert TokenDataset.open(tmp_path / "data", "train").read(0, 2).tolist() == [200, 1]
    assert list(verify(tmp_path / "data")) == []


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "pipeline.adopt", *arguments], capture_output=True, text=True)


def test_the_command_line_says_what_is_wrong(tmp_path: Path, bpe: str) -> None:
    prefix = write(tmp_path / "a", [[5, 1]])
    done = run(str(tmp_path / "b"), "--output", str(tmp_path / "data"), "--tokenizer", bpe)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/b.idx: no such file; a PREFIX is the path")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").touch()
    for options, expected in (
        (["--tokenizer", bpe], "data is there already"),
        (["--tokenizer", str(tmp_path / "a.bin")], "a.bin: not a SentencePiece model"),
        (["--tokenizer", bpe, "--eos-id", "400"], "--eos-id: 400 is no piece of"),
        (["--tokenizer", bpe, "--split", "../x"], "--split: '../x' cannot name a split"),
        (["--tokenizer", bpe, "--output", "."], " is there already"),
    ):
        done = run(str(prefix), "--output", str(tmp_path / "data"), *options)
        assert done.returncode == 2, done.stdout
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


def test_a_pair_of_files_given_twice(tmp_path: Path, bpe: str) -> None:
    prefix = write(tmp_path / "a", [[5, 1]])
    with pytest.raises(UserError, match="a: given twice"):
        adopt([prefix, prefix], tmp_path / "data", Path(bpe))


def test_where_no_link_is_possible_the_file_is_copied(
    tmp_path: Path, bpe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    prefix = write(tmp_path / "a", [[5, 1]])
    adopt([prefix], tmp_path / "data", Path(bpe))
    assert "copied (no hard link was possible)" in capsys.readouterr().out
    assert not (tmp_path / "data/train/shard-00000.bin").samefile(f"{prefix}.bin")
    assert list(verify(tmp_path / "data")) == []


def test_what_a_killed_adoption_left_does_not_count(tmp_path: Path, bpe: str) -> None:
    left = tmp_path / ".data.adopting" / "train"
    left.mkdir(parents=True)
    (left / "shard-00007.bin").write_bytes(b"half")
    adopt([write(tmp_path / "a", [[5, 1]])], tmp_path / "data", Path(bpe))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "data"]
    assert sorted(path.name for path in (tmp_path / "data/train").iterdir()) == ["shard-00000.bin", "shard-00000.idx"]
