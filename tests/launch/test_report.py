"""The report's two baselines, against their definitions."""

import json
import lzma
import math
from pathlib import Path

import pytest

from launch.report import last_metrics, unigram_bits_per_byte, xz_bits_per_byte
from pipeline.shards import TokenDataset


@pytest.fixture
def splits(prepared_data: Path) -> tuple[TokenDataset, TokenDataset]:
    return TokenDataset.open(prepared_data, "train"), TokenDataset.open(prepared_data, "valid")


def test_unigram(splits: tuple[TokenDataset, TokenDataset]) -> None:
    training, held_out = splits
    seen = training.read(0, training.n_tokens).tolist()
    bits = 0.0
    for token in held_out.read(0, held_out.n_tokens).tolist():
        bits -= math.log2((seen.count(token) + 1) / (len(seen) + training.vocab_size))
    assert unigram_bits_per_byte(training, held_out) == pytest.approx(bits / held_out.n_utf8_bytes, rel=1e-9)


def test_xz_compresses_the_text_itself(splits: tuple[TokenDataset, TokenDataset], prepared_data: Path) -> None:
    _, held_out = splits
    files = sorted((prepared_data.parent / "text").glob("*.txt"))
    texts = [file.read_text() for file in files]
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(held_out.tokenizer_path))
    tokens = held_out.read(0, held_out.n_tokens).tolist()
    held_out_texts: list[str] = []
    document: list[int] = []
    for token in tokens:
        if token == held_out.eos_id:
            held_out_texts.append(tokenizer.decode(document))
            document = []
        else:
            document.append(token)
    assert set(held_out_texts) <= set(texts)
    concatenated = "".join(held_out_texts).encode()
    assert len(concatenated) == held_out.n_utf8_bytes
    expected = 8 * len(lzma.compress(concatenated, preset=9)) / len(concatenated)
    assert xz_bits_per_byte(held_out) == pytest.approx(expected)


def test_the_last_value_of_a_metric_counts(tmp_path: Path) -> None:
    records = [{"step": 1, "metrics": {"valid/loss": 2.0, "train/loss": 3.0}}, {"status": "RUNNING"}]
    records.append({"step": 2, "metrics": {"valid/loss": 1.5}})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert last_metrics(tmp_path / "metrics.jsonl", "valid/") == {"loss": 1.5}
