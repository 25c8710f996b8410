"""The verifier finds each kind of damage and names the file."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import atomic
from pipeline.config import PrepareConfig
from pipeline.errors import UserError
from pipeline.prepare import prepare
from pipeline.shards import MANIFEST, ShardWriter, dataset_digest
from pipeline.verify import verify


@pytest.fixture(scope="module")
def sound(ray_address: str, content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sound") / "data"
    tokenizer = {"train": {"vocab_size": 330, "num_threads": 1}}
    prepare(
        PrepareConfig.model_validate({"content": content | {"tokenizer": tokenizer}, "execution": {"output": output}})
    )
    return output


@pytest.fixture
def dataset(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "data"))


def run(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.verify", str(path)], capture_output=True, text=True, check=False
    )


def edit(dataset: Path, change: Callable[[Any], None], *, new_digest: bool = False) -> None:
    manifest = json.loads((dataset / MANIFEST).read_text())
    change(manifest)
    if new_digest:
        manifest["digest"] = dataset_digest(manifest)
    (dataset / MANIFEST).write_text(json.dumps(manifest))


def test_a_sound_dataset(dataset: Path) -> None:
    done = run(dataset)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("ok: ")
    assert json.loads((dataset / MANIFEST).read_text())["digest"] in done.stdout


@pytest.mark.parametrize("name", ["train/shard-00001.bin", "train/shard-00000.idx", "valid/shard-00000.bin"])
def test_a_flipped_bit(dataset: Path, name: str) -> None:
    data = bytearray((dataset / name).read_bytes())
    data[len(data) // 2] ^= 4
    (dataset / name).write_bytes(data)
    done = run(dataset)
    assert done.returncode == 1
    assert done.stdout.count("damaged: ") == 1
    assert done.stdout.startswith(f"damaged: {name[:-4]}: {Path(name).name}: SHA-256 is ")


def test_missing_and_truncated_files(dataset: Path) -> None:
    (dataset / "train" / "shard-00000.bin").unlink()
    index = dataset / "valid" / "shard-00000.idx"
    index.write_bytes(index.read_bytes()[:-8])
    problems = list(verify(dataset))
    assert problems[0] == "train/shard-00000: shard-00000.bin: missing"
    assert problems[1].startswith("valid/shard-00000: shard-00000.idx: SHA-256 is ")
    assert len(problems) == 2


def test_a_file_that_cannot_be_read(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk's error is damage like any other: the rest is still looked at."""

    def hash_file(path: Path) -> str:
        if path.name == "shard-00001.bin":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return atomic.hash_file(path)

    monkeypatch.setattr("pipeline.verify.hash_file", hash_file)
    (problem,) = verify(dataset)
    assert problem.startswith("train/shard-00001: cannot be read: ")
    assert "Input/output error" in problem


def test_another_tokenizer(dataset: Path) -> None:
    (dataset / "tokenizer.model").write_bytes(b"another")
    assert next(iter(verify(dataset))).startswith("tokenizer.model: SHA-256 is ")
    (dataset / "tokenizer.model").unlink()
    assert list(verify(dataset)) == ["tokenizer.model: missing"]


@pytest.mark.parametrize("change", [{"content": {"seed": 9}}, {"sources": []}])
def test_a_changed_manifest_no_longer_fits_its_digest(dataset: Path, change: dict[str, Any]) -> None:
    edit(dataset, lambda manifest: manifest["content"].update(change))
    assert "manifest.json: its digest is" in next(iter(verify(dataset)))


def test_counts_of_sources_and_of_what_was_dropped(dataset: Path) -> None:
    def change(manifest: Any) -> None:
        manifest["splits"]["valid"]["by_source"]["text"]["tokens"] += 1
        manifest["splits"]["train"]["dropped"] = {"empty": 2}

    edit(dataset, change)
    problems = list(verify(dataset))
    assert [problem.split(":")[1].strip() for problem in problems[:2]] == ["train", "valid"]
    assert problems[0].endswith("counts {'empty': 2} dropped, its sources {}")
    assert problems[2:] == ["manifest.json: counts {} dropped, its splits {'empty': 2}"]


@pytest.mark.parametrize("key", ["digest", "content", "splits", "tokenizer", "bytes"])
def test_a_manifest_that_lost_a_key(dataset: Path, key: str) -> None:
    def change(manifest: Any) -> None:
        del (manifest["splits"]["valid"]["shards"][0] if key == "bytes" else manifest)[key]

    edit(dataset, change)
    with pytest.raises(UserError, match=rf"manifest\.json: damaged: .*{key}"):
        list(verify(dataset))


@pytest.mark.parametrize("name", ["documents", "tokens", "utf8_bytes"])
def test_wrong_counts(dataset: Path, name: str) -> None:
    def change(manifest: Any) -> None:
        manifest["splits"]["valid"][name] += 1

    edit(dataset, change)
    of_sources, of_shards = verify(dataset)
    assert of_sources.startswith("manifest.json: valid: counts ")
    assert of_shards.startswith("valid: the manifest counts ")
    assert name in of_sources
    assert name in of_shards


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ([[5, 6, 7]], "not every document ends with its only </s>"),
        ([[5, 1, 6, 1]], "not every document ends with its only </s>"),
        ([[5, 1], [6, 6]], "not every document ends with its only </s>"),
        ([[5, 330, 1]], "an id outside the vocabulary of 330"),
    ],
)
def test_wrong_tokens_under_right_hashes(dataset: Path, documents: list[list[int]], expected: str) -> None:
    with ShardWriter(dataset / "valid" / "shard-00000", 330) as writer:
        for document in documents:
            writer.append(np.array(document), np.array([len(document)]))

    def change(manifest: Any) -> None:
        manifest["splits"]["valid"]["shards"] = [asdict(writer.record)]

    edit(dataset, change, new_digest=True)
    assert list(verify(dataset)) == [f"valid/shard-00000: shard-00000.bin: {expected}"]


def test_what_is_no_dataset(tmp_path: Path, dataset: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}: not a dataset")
    edit(dataset, lambda manifest: manifest.update(version=99))
    with pytest.raises(UserError, match="version 99"):
        list(verify(dataset))
