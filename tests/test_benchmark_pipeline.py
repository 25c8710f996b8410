"""The benchmark of preparing data: all its rows encode the same documents to the same number of tokens."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """A parquet file of 40 texts."""
    import pyarrow
    from pyarrow import parquet

    chance = random.Random(0)
    words = ["".join(chance.choices("abdeiklmnorstu", k=chance.randint(2, 9))) for _ in range(500)]
    texts = [" ".join(chance.choices(words, k=1000)) for _ in range(40)]
    (tmp_path / "books").mkdir()
    parquet.write_table(pyarrow.table({"id": range(40), "body": texts}), tmp_path / "books" / "all.parquet")
    return tmp_path / "books"


def test_rows_encode_the_same_documents(books: Path, tmp_path: Path) -> None:
    options = ["--text-field", "body", "--megabytes", "0.6", "--small-megabytes", "0.2", "--vocab-size", "400"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.pipeline",
        "--corpus",
        str(books),
        *options,
        "--json",
        str(tmp_path / "r.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["megabytes"] == pytest.approx(0.6, rel=0.02)
    assert results["documents"] > 40  # the corpus went round
    tokens = {name: results[name]["tokens"] for name in ("bare", "bare_arrays", "prepare", "megatron")}
    assert len(set(tokens.values())) == 1, tokens
    assert set(results["prepare"]["stages"]) >= {"scan", "encode", "write"}
    assert all(len(found) == 4 and max(found) > 0 for found in results["memory"].values())
    for row in ("SentencePiece alone", "this project", "Megatron-LM's loop", "peak memory of a worker"):
        assert row in done.stdout


def test_a_corpus_without_parquet_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.pipeline", "--corpus", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--corpus" in done.stderr + done.stdout
    assert "no .parquet file" in done.stderr + done.stdout
