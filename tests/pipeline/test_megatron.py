"""Megatron-LM's own indexed dataset (megatron-core) reads our shards, and what it writes can be adopted."""

import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.adopt import adopt
from pipeline.batches import TrainingStream
from pipeline.errors import UserError
from pipeline.shards import MANIFEST, Shard, TokenDataset
from pipeline.tokenizer import Tokenizer
from pipeline.verify import verify

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it could use on GPUs
    indexed_dataset: Any = pytest.importorskip("megatron.core.datasets.indexed_dataset")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron")

Document = Sequence[Sequence[int]]
"""Its sequences."""


def write_megatron(prefix: Path, documents: Sequence[Document], dtype: type = np.uint16) -> Path:
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        flat = [token for sequence in document for token in sequence]
        builder.add_document(torch.tensor(flat, dtype=torch.int64), [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")
    return prefix


def documents_of(dataset: TokenDataset) -> list[list[int]]:
    tokens = dataset.read(0, dataset.n_tokens)
    numbers = dataset.document_numbers(0, dataset.n_tokens)
    return [tokens[numbers == number].tolist() for number in range(dataset.n_documents)]


@pytest.fixture(scope="module")
def encoded(texts: list[str], bpe: str) -> list[list[int]]:
    """The texts' documents, each closed."""
    tokenizer = Tokenizer(bpe)
    return [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]


@pytest.mark.parametrize("vocab_size", [100, 70_000], ids=["uint16", "int32"])
def test_megatron_reads_our_shards(make_dataset: Any, vocab_size: int) -> None:
    generator = np.random.default_rng(1)
    documents = [generator.integers(4, vocab_size, n).tolist() for n in (5, 0, 300, 1, 77, 12, 2)]
    folder = make_dataset(documents, per_shard=3, vocab_size=vocab_size)
    read: list[list[int]] = []
    for stem in sorted(path.with_suffix("") for path in (folder / "train").glob("*.idx")):
        theirs = indexed_dataset.IndexedDataset(str(stem))
        assert theirs.document_indices.tolist() == list(range(len(theirs) + 1))
        assert theirs.index.dtype == (np.uint16 if vocab_size == 100 else np.int32)
        read += [theirs[number].tolist() for number in range(len(theirs))]
        assert theirs.get(0, offset=1).tolist() == read[-len(theirs)][1:]
    assert read == [[*document, 1] for document in documents]


def test_what_megatron_wrote_is_linked_and_trains(
    encoded: list[list[int]], bpe: str, tmp_path: Path, texts: list[str]
) -> None:
    """One sequence a document, right type: nothing is copied; whole through the command line."""
    first = write_megatron(tmp_path / "a", [[document] for document in encoded[:40]])
    second = write_megatron(tmp_path / "b", [[document] for document in encoded[40:]])
    command = [sys.executable, "-m", "pipeline.adopt", str(first), str(second)]
    command += ["--output", str(tmp_path / "data"), "--tokenizer", bpe]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a: 40 documents" in done.stdout
    assert done.stdout.count(", linked") == 2
    shard = tmp_path / "data/train/shard-00001.bin"
    assert shard.samefile(f"{second}.bin")
    assert (tmp_path / "data/train/shard-00000.idx").read_bytes() == Path(f"{first}.idx").read_bytes()
    assert list(verify(tmp_path / "data")) == []
    dataset = TokenDataset.open(tmp_path / "data", "train")
    assert documents_of(dataset) == encoded
    assert dataset.n_utf8_bytes == sum(len(text.encode()) for text in texts)
    stream = TrainingStream(dataset, seq_len=64, seed=0)
    batch = stream.load(stream.take(-(-dataset.n_tokens // 64)))
    assert sorted(batch.targets[batch.loss_mask].tolist()) == sorted(token for d in encoded for token in d)


def test_sequences_are_joined_and_empty_documents_dropped(encoded: list[list[int]], bpe: str, tmp_path: Path) -> None:
    cut: list[Document] = [[document[:7], document[7:90], document[90:]] for document in encoded]
    cut.insert(2, [[]])
    cut.insert(9, [])
    prefix = write_megatron(tmp_path / "a", cut)
    assert len(indexed_dataset.IndexedDataset(str(prefix))) > 2 * len(encoded)
    manifest = adopt([prefix], tmp_path / "data", Path(bpe))
    assert manifest["dropped"] == {"empty": 2}
    assert (tmp_path / "data/train/shard-00000.bin").samefile(f"{prefix}.bin")
    assert documents_of(TokenDataset.open(tmp_path / "data", "train")) == encoded
    assert list(verify(tmp_path / "data")) == []


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.int16])
def test_other_types_are_converted(
    encoded: list[list[int]], bpe: str, tmp_path: Path, dtype: type, capsys: Any
) -> None:
    prefix = write_megatron(tmp_path / "a", [[document] for document in encoded], dtype)
    before = Path(f"{prefix}.bin").read_bytes()
    adopt([prefix], tmp_path / "data", Path(bpe))
    assert "written again as uint16" in capsys.readouterr().out
    assert Path(f"{prefix}.bin").read_bytes() == before
    assert documents_of(TokenDataset.open(tmp_path / "data", "train")) == encoded
    assert list(verify(tmp_path / "data")) == []


def test_end_tokens_are_added_where_they_are_missing(encoded: list[list[int]], bpe: str, tmp_path: Path) -> None:
    documents: list[Document] = [[document if n % 3 else document[:-1]] for n, document in enumerate(encoded)]
    prefix = write_megatron(tmp_path / "a", documents)
    with pytest.raises(UserError, match=rf"a\.bin: document 0: token {len(encoded[0]) - 2}, its last, is \d+, not the"):
        adopt([prefix], tmp_path / "data", Path(bpe))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    manifest = adopt([prefix], tmp_path / "data", Path(bpe), append_eos=True, split="valid")
    assert manifest["splits"].keys() == {"valid"}
    assert documents_of(TokenDataset.open(tmp_path / "data", "valid")) == encoded
    assert list(verify(tmp_path / "data")) == []


def test_another_end_token(bpe: str, tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "a", [[[10, 11, 9]], [[12, 9]]])
    with pytest.raises(UserError, match=r"document 0: token 2, its last, is 9, not the end token 1"):
        adopt([prefix], tmp_path / "data", Path(bpe))
    adopt([prefix], tmp_path / "data", Path(bpe), eos_id=9)
    assert TokenDataset.open(tmp_path / "data", "train").eos_id == 9
    assert list(verify(tmp_path / "data")) == []
    manifest = json.loads((tmp_path / "data" / MANIFEST).read_text())
    manifest["tokenizer"]["eos_id"] = 1
    (tmp_path / "data" / MANIFEST).write_text(json.dumps(manifest))
    assert any("eos_id is 9, the manifest says 1" in problem for problem in verify(tmp_path / "data"))


def test_a_shard_with_several_sequences_a_document_is_not_read_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.idx: not one sequence a document; `python -m pipeline\.adopt` joins them"):
        Shard(write_megatron(tmp_path / "a", [[[5, 6], [7, 1]]]))
