"""Small corpora, datasets made without Ray, and one Ray for all tests of this folder."""

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import PrepareConfig, TrainTokenizer
from pipeline.shards import FORMAT, MANIFEST, TOKENIZER, VERSION, ShardWriter, dataset_digest
from pipeline.tokenizer import train_tokenizer

MakeDataset = Callable[..., Path]


def _make_text(seed: int, n_words: int) -> str:
    """Words of one to three syllables, sentences, lines, some letters that are not ASCII."""
    chance = random.Random(seed)
    syllables = [onset + vowel for onset in ("b", "d", "fl", "k", "m", "st", "th", "w") for vowel in "aeiouyé"]
    words = ("".join(chance.choices(syllables, k=chance.randint(1, 3))) for _ in range(n_words))
    return " ".join(word + chance.choice(["", "", "", "s", ".\n", ", ½"]) for word in words)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """60 texts, 0.2 to 6 kB each."""
    return [_make_text(number, 40 + 17 * number) for number in range(60)]


@pytest.fixture(scope="session")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts as files."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(texts):
        (folder / f"{number:02d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def bpe(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer at hand; as BPE, it is slow enough for a job to be disturbed."""
    path = tmp_path_factory.mktemp("bpe") / "bpe.model"
    path.write_bytes(train_tokenizer(texts, TrainTokenizer(vocab_size=400, model_type="bpe", num_threads=1)))
    return str(path)


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A running Ray with three CPUs to which this process is connected."""
    import ray

    # Short, for Ray's sockets.
    folder = tempfile.mkdtemp(prefix="ray-")
    context = ray.init(
        address="local",
        num_cpus=3,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _temp_dir=folder,
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def content(corpus: Path, bpe: str) -> dict[str, Any]:
    """A preparation of `corpus` in 22 units and several shards."""
    return {
        "sources": [{"type": "text", "path": str(corpus)}],
        "tokenizer": {"path": bpe},
        "splits": {"valid": 0.2},
        "unit_bytes": 10_000,
        "shard_tokens": 30_000,
    }


@pytest.fixture
def make_config(content: dict[str, Any], tmp_path: Path) -> Callable[..., PrepareConfig]:
    """A preparation of `content`; keywords replace keys of it, `output` and `workers`."""

    def make(output: str | Path = "data", workers: int | None = 2, **changes: Any) -> PrepareConfig:
        execution = {"output": tmp_path / output, "workers": workers}
        return PrepareConfig.model_validate({"content": content | changes, "execution": execution})

    return make


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """Write a dataset of given documents (token ids without </s>), cut into shards of so many documents."""

    def make(documents: Sequence[Sequence[int]], per_shard: int = 3, vocab_size: int = 100, name: str = "data") -> Path:
        folder = tmp_path / name
        (folder / "train").mkdir(parents=True)
        (folder / TOKENIZER).write_bytes(b"")
        shards = []
        for number, start in enumerate(range(0, len(documents), per_shard)):
            with ShardWriter(folder / "train" / f"shard-{number:05d}", vocab_size) as writer:
                for document in documents[start : start + per_shard]:
                    writer.append(np.array([*document, 1]), np.array([len(document) + 1]))
            shards.append(asdict(writer.record))
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "content": {},
            "sources": [],
            "tokenizer": {
                "file": TOKENIZER,
                "sha256": hashlib.sha256(b"").hexdigest(),
                "vocab_size": vocab_size,
                "unk_id": 0,
                "eos_id": 1,
                "pad_id": 2,
                "mask_id": 3,
            },
            "splits": {
                "train": {
                    "documents": len(documents),
                    "tokens": sum(len(document) + 1 for document in documents),
                    "utf8_bytes": sum(len(document) for document in documents),
                    "dropped": {},
                    "shards": shards,
                }
            },
        }
        manifest["digest"] = dataset_digest(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))
        return folder

    return make
