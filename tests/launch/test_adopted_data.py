"""Training on shards that Megatron-LM's own writer (megatron-core) made and `pipeline.adopt` took over."""

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.datasets_used import dataset_entity, keep_cards
from pipeline.adopt import adopt
from pipeline.shards import TOKENIZER, TokenDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it could use on GPUs
    indexed_dataset: Any = pytest.importorskip("megatron.core.datasets.indexed_dataset")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron")

ROOT = Path(__file__).resolve().parents[2]


def write_megatron(prefix: Path, dataset: TokenDataset, dtype: type, sequence: int) -> Path:
    """The documents of a split, cut into sequences of so many tokens."""
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    tokens = dataset.read(0, dataset.n_tokens)
    numbers = dataset.document_numbers(0, dataset.n_tokens)
    for number in range(dataset.n_documents):
        document = torch.tensor(tokens[numbers == number].tolist())
        builder.add_document(document, [len(part) for part in document.split(sequence)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_adopted_datasets_train_and_are_named_in_the_record(
    prepared_data: Path, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """A linked file of Megatron's as training data, a converted one of several sequences a document to validate on."""
    made = {}
    for split, dtype, sequence in (("train", np.uint16, 10**6), ("valid", np.int32, 50)):
        prefix = write_megatron(tmp_path / split, TokenDataset.open(prepared_data, split), dtype, sequence)
        made[split] = adopt([prefix], tmp_path / f"adopted-{split}", prepared_data / TOKENIZER, split=split)
    assert (tmp_path / "adopted-train/train/shard-00000.bin").samefile(tmp_path / "train.bin")
    config = write_config(
        run={"dir": str(tmp_path / "run")},
        data={
            "path": str(tmp_path / "adopted-train"),
            "validation": {"valid": {"path": str(tmp_path / "adopted-valid"), "split": "valid"}},
        },
        train={"log_every": 1},
        optimizer={"lr": 0.01},
        schedule={"warmup_tokens": 1024},
        tracking={"enabled": False},
    )
    done = subprocess.run(
        [sys.executable, "launch/train.py", str(config)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    metrics = [
        json.loads(line).get("metrics", {}) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    losses = [values["train/loss"] for values in metrics if "train/loss" in values]
    assert len(losses) == 8
    assert losses[0] == pytest.approx(math.log(384), rel=0.05)
    assert losses[-1] < losses[0] - 0.1
    (scored,) = [values for values in metrics if "valid/bits_per_byte" in values]
    valid = made["valid"]["splits"]["valid"]
    nats = scored["valid/bits_per_byte"] * math.log(2) * valid["utf8_bytes"]
    assert nats / valid["tokens"] == pytest.approx(scored["valid/loss"])

    facts = json.loads((tmp_path / "run/run.json").read_text())["datasets"]
    assert [(entry["context"], entry["name"]) for entry in facts] == [
        ("training", "adopted-train/train"),
        ("valid", "adopted-valid/valid"),
    ]
    for entry, manifest in zip(facts, made.values(), strict=True):
        (counts,) = manifest["splits"].values()
        assert entry["digest"] == manifest["digest"]
        assert (entry["documents"], entry["tokens"]) == (counts["documents"], counts["tokens"])
        assert dataset_entity(entry).digest == manifest["digest"][:32]
    keep_cards(tmp_path / "run/data", facts)
    assert "adopted by `python -m pipeline.adopt`" in (tmp_path / "run/data/adopted-train/card.md").read_text()
    assert (tmp_path / "run/data/adopted-valid/figure.png").is_file()
