"""The format on disk, read by a reader written from Megatron's description, and the memory-mapped dataset."""

import errno
import itertools
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.shards import MANIFEST, TOKENIZER, Shard, ShardWriter, TokenDataset, dataset_digest, token_dtype

Documents = list[list[int]]


def read_megatron(stem: Path) -> Documents:
    """An indexed dataset's documents, field by field as the format is described; shares no code with the package."""
    index = stem.with_suffix(".idx").read_bytes()
    tokens = stem.with_suffix(".bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, boundaries = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    letter, width = {4: ("i", 4), 8: ("H", 2)}[code]
    at = 9 + 8 + 1 + 8 + 8
    lengths = struct.unpack_from(f"<{sequences}i", index, at)
    pointers = struct.unpack_from(f"<{sequences}q", index, at + 4 * sequences)
    documents = struct.unpack_from(f"<{boundaries}q", index, at + 12 * sequences)
    assert len(index) == at + 12 * sequences + 8 * boundaries
    assert documents[0] == 0
    assert documents[-1] == sequences
    read = [list(struct.unpack_from(f"<{n}{letter}", tokens, at)) for n, at in zip(lengths, pointers, strict=True)]
    assert sum(lengths) * width == len(tokens)
    return [
        [token for sequence in read[first:last] for token in sequence] for first, last in itertools.pairwise(documents)
    ]


def write(stem: Path, documents: Documents, vocab_size: int) -> Any:
    with ShardWriter(stem, vocab_size) as writer:
        for document in documents:
            writer.append(np.array(document), np.array([len(document)]))
    return writer.record


@pytest.mark.parametrize("vocab_size", [100, 65499, 65500, 150000])
def test_an_independent_reader_reads_our_shards(tmp_path: Path, vocab_size: int) -> None:
    documents = [[5, 6, 1], [1], [vocab_size - 1, 0, 7, 1]]
    record = write(tmp_path / "shard-00000", documents, vocab_size)
    assert read_megatron(tmp_path / "shard-00000") == documents
    assert (record.documents, record.tokens) == (3, 8)
    assert record.bytes == 8 * token_dtype(vocab_size).itemsize


def test_appending_many_documents_at_once_gives_the_same_bytes(tmp_path: Path) -> None:
    documents = [[n, n + 1, 1] for n in range(5, 30)]
    one_by_one = write(tmp_path / "a", documents, 100)
    with ShardWriter(tmp_path / "b", 100) as writer:
        writer.append(np.concatenate(documents), np.full(25, 3))
    assert (one_by_one.sha256_bin, one_by_one.sha256_idx) == (writer.record.sha256_bin, writer.record.sha256_idx)


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path / "a", 100) as writer:  # noqa: PT012
        writer.append(np.array([1]), np.array([1]))
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"WRONG" + bytes(60), None])
def test_a_damaged_index_is_refused(tmp_path: Path, damage: bytes | None) -> None:
    write(tmp_path / "a", [[5, 1]], 100)
    index = tmp_path / "a.idx"
    index.write_bytes(index.read_bytes()[:-1] if damage is None else damage or b"short")
    with pytest.raises(ValueError, match=r"a\.idx"):
        Shard(tmp_path / "a")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12), per_shard=st.integers(1, 5), data=st.data())
def test_the_dataset_is_one_stream_over_shards(
    make_dataset: Any, tmp_path_factory: Any, lengths: list[int], per_shard: int, data: st.DataObject
) -> None:
    documents = [[4 + number] * length for number, length in enumerate(lengths)]
    name = str(tmp_path_factory.mktemp("stream") / "data")
    dataset = TokenDataset.open(make_dataset(documents, per_shard, name=name), "train")
    stream = [token for document in documents for token in [*document, 1]]
    numbers = [number for number, document in enumerate(documents) for _ in [*document, 1]]
    assert (dataset.n_tokens, dataset.n_documents) == (len(stream), len(documents))
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    for got, expected in ((dataset.read(start, stop), stream), (dataset.document_numbers(start, stop), numbers)):
        assert got.dtype == np.int64
        assert got.tolist() == expected[start:stop]


def test_positions_outside_are_refused(make_dataset: Any) -> None:
    dataset = TokenDataset.open(make_dataset([[5, 6]]), "train")
    for start, stop in ((-1, 2), (0, 4), (2, 1)):
        with pytest.raises((IndexError, ValueError)):
            dataset.read(start, stop)


def test_open_refuses_what_is_not_there(make_dataset: Any, tmp_path: Path) -> None:
    folder = make_dataset([[5]] * 7)
    with pytest.raises(UserError, match="no split 'valid'; it has: train"):
        TokenDataset.open(folder, "valid")
    with pytest.raises(UserError, match="not a dataset"):
        TokenDataset.open(tmp_path / "nowhere", "train")
    shard = folder / "train" / "shard-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"shard-00001\.bin: 10 bytes instead of 12"):
        TokenDataset.open(folder, "train")
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.bin: missing"):
        TokenDataset.open(folder, "train")


def test_open_says_what_cannot_be_read(make_dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_dataset([[5]])

    def refuse(path: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for target in ("pipeline.shards.hash_file", "pathlib.Path.read_bytes"):
        monkeypatch.setattr(target, refuse)
        with pytest.raises(UserError, match=r"(tokenizer\.model|manifest\.json): cannot be read: Permission denied"):
            TokenDataset.open(folder, "train")


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"version": 2}, "version 2; this release reads version 1"), ({"format": "other"}, "not a manifest of")],
)
def test_manifests_of_others_are_refused(make_dataset: Any, change: dict[str, Any], expected: str) -> None:
    folder = make_dataset([[5]])
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=expected):
        TokenDataset.open(folder, "train")
    (folder / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        TokenDataset.open(folder, "train")


def test_digest_covers_content_and_not_circumstances(make_dataset: Any) -> None:
    manifest = json.loads((make_dataset([[5], [6]]) / MANIFEST).read_text())
    digest = dataset_digest(manifest)
    assert dataset_digest(manifest | {"host": "h", "created": "now", "execution": {"workers": 9}}) == digest
    assert dataset_digest(manifest | {"content": {"seed": 1}}) != digest
    assert dataset_digest(manifest | {"sources": [{"name": "a"}]}) != digest
    manifest["splits"]["train"]["shards"][0]["sha256_bin"] = "0" * 64
    assert dataset_digest(manifest) != digest


def test_more_shards_than_files_may_be_open(make_dataset: Any) -> None:
    """Every mapped file stays open: the limit is raised where the system allows it, or the error says so."""
    folder = make_dataset([[5]] * 60, per_shard=1)
    script = (
        "import resource, sys\n"
        "from pipeline.shards import TokenDataset\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))\n"
        "dataset = TokenDataset.open(sys.argv[1], 'train')\n"
        "print(dataset.read(0, dataset.n_tokens).sum())\n"
    )
    for hard, expected in ((1000, "360\n"), (64, "too many open files: 60 shards need two each, the system allows 64")):
        done = subprocess.run([sys.executable, "-c", script, folder, str(hard)], capture_output=True, text=True)
        assert expected in done.stdout + done.stderr


def test_a_replaced_tokenizer_is_refused(make_dataset: Any) -> None:
    folder = make_dataset([[5]])
    (folder / TOKENIZER).write_bytes(b"another")
    with pytest.raises(UserError, match=r"tokenizer\.model: another tokenizer: its SHA-256 is .* instead of e3b0c442"):
        TokenDataset.open(folder, "train")
    (folder / TOKENIZER).unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model: missing"):
        TokenDataset.open(folder, "train")


def test_a_manifest_that_lost_a_key_is_named(make_dataset: Any) -> None:
    folder = make_dataset([[5]])
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["tokenizer"]["eos_id"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json: damaged: KeyError 'eos_id'"):
        TokenDataset.open(folder, "train")
