"""SentencePiece: reserved pieces, exact round trips, the sample it is trained on, determinism, messages."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pyarrow import parquet

from pipeline import encode, sources, tables
from pipeline.config import Content, TrainTokenizer
from pipeline.encode import make_tokenizer
from pipeline.errors import UserError
from pipeline.locations import open_file
from pipeline.sources import cut_units, list_files, survey
from pipeline.tokenizer import Tokenizer, train_tokenizer

CONFIGS = {
    "unigram": TrainTokenizer(vocab_size=330, num_threads=1),
    "bpe": TrainTokenizer(vocab_size=330, num_threads=1, model_type="bpe"),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def tokenizer(request: pytest.FixtureRequest, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(texts, CONFIGS[request.param]))
    return Tokenizer(path)


def test_reserved_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.unk_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 330


@given(text=st.text())
@example("</s><unk><pad><mask><s><0x41>")
@example("▁ a▁▁ \u2585\u2047 ⁇")
@example("\x00\n\r\n\t\ufeff  leading, trailing and  double spaces  ")
def test_any_text_comes_back_and_never_makes_a_special_piece(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert min(ids, default=4) > 3
    assert int(tokenizer.utf8_lengths()[ids].sum()) == len(text.encode())


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_training_is_deterministic(texts: list[str], kind: str) -> None:
    assert train_tokenizer(texts, CONFIGS[kind]) == train_tokenizer(iter(texts), CONFIGS[kind])


def test_a_text_without_line_breaks_trains_as_well(texts: list[str], tmp_path: Path) -> None:
    """SentencePiece silently leaves out sentences above its limit."""
    by_line = "\n".join(texts)
    lengths = []
    for number, text in enumerate((by_line, by_line.replace("\n", " "))):
        path = tmp_path / f"{number}.model"
        path.write_bytes(train_tokenizer([text], TrainTokenizer(vocab_size=400, model_type="bpe")))
        lengths.append(len(Tokenizer(path).encode(text)))
    assert lengths[1] < 1.05 * lengths[0] < 0.6 * len(by_line)


def test_vocabulary_too_large_names_the_largest_possible(texts: list[str]) -> None:
    with pytest.raises(UserError, match="largest possible is") as caught:
        train_tokenizer(texts, TrainTokenizer(vocab_size=30000))
    assert "content.tokenizer.train.vocab_size: 30000" in str(caught.value)
    largest = int(str(caught.value).split()[-1])
    train_tokenizer(texts, TrainTokenizer(vocab_size=largest))


def test_vocabulary_too_small_names_the_smallest_possible(texts: list[str]) -> None:
    with pytest.raises(UserError, match="smallest possible is") as caught:
        train_tokenizer(texts, TrainTokenizer(vocab_size=261))
    train_tokenizer(texts, TrainTokenizer(vocab_size=int(str(caught.value).split()[-1])))


def test_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "m")


class Counted:
    """A file that adds what is read of it to `n_bytes`."""

    n_bytes = 0

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.close = stream.close

    def read(self, size: int = -1) -> bytes:
        return self._count(self._stream.read(size))

    def readline(self) -> bytes:
        return self._count(self._stream.readline())

    @classmethod
    def _count(cls, data: bytes) -> bytes:
        cls.n_bytes += len(data)
        return data


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_large_file_is_sampled_in_one_pass(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed file, or a table of one row group, of which every second unit gives its share; small files beside it."""
    rows = [{"text": f"{number} " * 50} for number in range(2000)]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    n_bytes = sum(map(len, lines))
    large = tmp_path / ("large.jsonl.gz" if kind == "jsonl" else "large.parquet")
    if kind == "jsonl":
        large.write_bytes(gzip.compress(b"".join(lines)))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), large, use_dictionary=False)
    for number in range(20):
        (tmp_path / f"small{number}.jsonl").write_bytes(lines[number])
    content = Content.model_validate(
        {
            "sources": [
                {"type": kind, "path": str(large)},
                {"type": "jsonl", "name": "small", "path": str(tmp_path / "small*")},
            ],
            "tokenizer": {"train": {"vocab_size": 300, "sample_bytes": 25_000}},
            "splits": {},
            "unit_bytes": n_bytes // 128,
        }
    )
    units = cut_units([survey(content, file) for file in list_files(content)], content)
    opened: list[str] = []
    samples: list[list[str]] = []

    def counted(url: str, **how: Any) -> Any:
        if url.endswith(large.name):
            opened.append(url)
        return Counted(open_file(url, **how)) if url.endswith(".gz") else open_file(url, **how)

    def train(texts: Iterable[str], config: TrainTokenizer) -> bytes:
        samples.append(list(texts))
        return b""

    monkeypatch.setattr(sources if kind == "jsonl" else tables, "open_file", counted)
    monkeypatch.setattr(encode, "train_tokenizer", train)
    for _ in range(2):
        Counted.n_bytes = 0
        opened.clear()
        make_tokenizer(content, units, None)
        assert len(opened) == 1
        assert Counted.n_bytes <= n_bytes
        assert (Counted.n_bytes > 0) == (kind == "jsonl")
    assert samples[0] == samples[1]
    assert sum(len(text) for text in samples[0]) == 25_000
    taken = {text.split()[0] for text in samples[0] if text}
    chosen = {piece.start for unit in units[:64] for piece in unit if piece.run is not None}
    assert len(taken) >= len(chosen) > 55
