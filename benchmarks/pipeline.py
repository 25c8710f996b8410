"""Speed of preparing data, with its peers: `python -m benchmarks.pipeline --corpus DIR [--json FILE] …`.

The corpus (parquet files with a column of text) is repeated under other ids until it holds `--megabytes` of text. All
rows encode the same documents with the same SentencePiece model in the same number of processes:

- SentencePiece alone: `SentencePieceProcessor.encode`, documents already in memory, ids as Python lists or as arrays.
- this project: from the first task to the manifest: parquet read and hashed, tokens written, fsynced, hashed.
- Megatron-LM: the loop that its `tools/preprocess_data.py` documents (a pool tokenizes JSON lines, one process adds to
  an indexed dataset), written here from that description, since no package brings the script.
- datatrove: its ParquetReader and DocumentTokenizer, one local task a process, where the package is installed. It knows
  Hugging Face's tokenizers only: the model's pieces and scores are given to one of those.

MB are 10^6 bytes of UTF-8 text. The cluster's start and the tokenizer's training are timed apart.
"""

import argparse
import io
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pipeline_corpus import documents_of, repeat_corpus
from benchmarks.pipeline_peers import measure_bare, measure_datatrove, measure_megatron
from benchmarks.report import markdown_table, number, write_results
from pipeline.config import Content, PrepareConfig, TrainTokenizer
from pipeline.errors import run_command

_SAMPLE_SECONDS = 0.1
# An idle worker still holds what its last task left: short tasks are seen too. Ray's agents have other names.
_WORKERS = ("ray::survey_files", "ray::encode_unit", "ray::assemble_shard", "ray::IDLE")
_STAGE_BYTES = 30_000_000  # how much text the shares of one worker's time are taken from
_ROWS = (
    ("SentencePiece alone", "bare"),
    ("SentencePiece alone, arrays", "bare_arrays"),
    ("this project", "prepare"),
    ("Megatron-LM's loop", "megatron"),
    ("datatrove", "datatrove"),
)


def train_tokenizer_file(files: Sequence[Path], vocab_size: int, sample_bytes: int, target: Path) -> float:
    """Train a unigram model on the first of the text; returns the seconds it took."""
    from pipeline.tokenizer import train_tokenizer

    def sample() -> Iterator[str]:
        left = sample_bytes
        for text in documents_of(files):
            if left <= 0:
                return
            left -= len(text)
            yield text

    began = time.perf_counter()
    target.write_bytes(
        train_tokenizer(sample(), TrainTokenizer(vocab_size=vocab_size, num_threads=os.cpu_count() or 1))
    )
    return time.perf_counter() - began


class PeakMemory:
    """Samples the unshared memory of Ray's workers below this process, the last time on leaving.

    `samples`: seconds since the start, and the bytes of the largest worker then.
    """

    def __init__(self) -> None:
        self.samples: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        import psutil

        own, began, last = psutil.Process(), time.perf_counter(), False
        while not last:
            last = self._stop.wait(_SAMPLE_SECONDS)
            largest = 0
            for child in own.children(recursive=True):
                try:
                    if child.cmdline()[:1] and child.cmdline()[0].startswith(_WORKERS):
                        largest = max(largest, child.memory_full_info().uss)
                except psutil.Error:
                    continue
            if largest:
                self.samples.append((time.perf_counter() - began, largest))

    def by_quarter(self) -> list[int]:
        """The largest in each quarter of the time from the first sample to the last, bytes."""
        quarters = [0] * 4
        if not self.samples:
            return quarters
        start, end = self.samples[0][0], self.samples[-1][0]
        for moment, size in self.samples:
            number = min(3, int(4 * (moment - start) / max(end - start, 1e-9)))
            quarters[number] = max(quarters[number], size)
        return quarters


def _content(model: Path, files: Sequence[Path]) -> dict[str, Any]:
    return {
        "sources": [{"type": "parquet", "path": [str(file) for file in files], "id_field": "id"}],
        "tokenizer": {"path": str(model)},
        "splits": {},
    }


def measure_prepare(model: Path, files: Sequence[Path], workers: int, output: Path) -> dict[str, Any]:
    """Prepare the files with a Ray of its own that is up before the clock starts."""
    import ray

    from pipeline.prepare import prepare

    config = PrepareConfig.model_validate(
        {
            "content": _content(model, files),
            "execution": {"output": output, "workers": workers},
        }
    )
    memory = PeakMemory()
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        began = time.perf_counter()
        ray.init(
            address="local",
            num_cpus=workers,
            object_store_memory=256 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=folder,
        )
        cluster_seconds = time.perf_counter() - began
        try:
            began = time.perf_counter()
            with memory:
                with redirect_stdout(io.StringIO()):
                    manifest = prepare(config)
                seconds = time.perf_counter() - began
        finally:
            ray.shutdown()
    return {
        "seconds": seconds,
        "tokens": sum(split["tokens"] for split in manifest["splits"].values()),
        "stages": manifest["seconds"],
        "cluster_seconds": cluster_seconds,
        "peak_worker_bytes": memory.by_quarter(),
        "digest": manifest["digest"],
    }


def measure_shares(model: Path, files: Sequence[Path]) -> dict[str, float]:
    """Seconds that one process spends on each part of `encode` for a piece of the corpus."""
    from pipeline.locations import Document
    from pipeline.order import derive_key, keyed_hash
    from pipeline.shards import ShardWriter
    from pipeline.sources import list_files, read_piece, survey
    from pipeline.tokenizer import Tokenizer

    content = Content.model_validate(_content(model, files))
    seconds = dict.fromkeys(("hash", "read", "order", "tokenize", "write"), 0.0)

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[name] += time.perf_counter() - began

    tokenizer, key, done = Tokenizer(model), derive_key("document order", 0), 0
    with tempfile.TemporaryDirectory() as folder:
        for file in list_files(content):
            with timed("hash"):
                found = survey(content, file)
            for place, piece in enumerate(found.pieces):
                with timed("read"):
                    documents = [item for item in read_piece(content, piece) if isinstance(item, Document)]
                with timed("order"):
                    documents.sort(key=lambda item: keyed_hash(key, item.id))
                with timed("tokenize"):
                    encoded = [tokenizer.encode_array(item.data.decode()) for item in documents]
                with timed("write"), ShardWriter(Path(folder) / f"shard-{place:05d}", tokenizer.vocab_size) as writer:
                    writer.append(np.concatenate(encoded), np.array([len(ids) for ids in encoded]))
                done += piece.n_bytes
                if done >= _STAGE_BYTES:
                    return seconds
    return seconds


def report(results: dict[str, Any]) -> str:
    """The tables of a run."""
    megabytes, workers, bare = results["megabytes"], results["workers"], results["bare"]
    rows = []
    for name, key in _ROWS:
        if (found := results.get(key)) is not None:
            rows.append(
                [
                    name,
                    number(found["seconds"]),
                    number(megabytes / found["seconds"]),
                    number(found["tokens"] / found["seconds"] / workers / 1e6, ",.2f"),
                    number(100 * bare["seconds"] / found["seconds"], ",.0f"),
                ]
            )
    lines = [
        f"{results['machine']}; {results['date']}; {results['versions']}",
        f"{megabytes:,.0f} MB of text in {results['documents']:,} documents, {workers} processes, unigram",
        "",
        markdown_table(["", "seconds", "MB/s", "M tokens/s per core", "% of SentencePiece alone"], rows),
        "",
    ]
    if "datatrove" in results and results["datatrove"] is None:
        lines += ["datatrove: not installed", ""]
    prepared = results["prepare"]
    stages = " · ".join(f"{name} {seconds:.1f} s" for name, seconds in prepared["stages"].items())
    shares = results["shares"]
    total = sum(shares.values())
    lines += [
        f"stages: {stages}; apart from these: cluster start {prepared['cluster_seconds']:.1f} s, "
        f"tokenizer training {number(results['tokenizer_seconds'])} s",
        "share of one worker's time: "
        + " · ".join(f"{name} {100 * part / total:.1f} %" for name, part in shares.items()),
    ]
    for size, found in results["memory"].items():
        quarters = " · ".join(f"{bytes_ / 2**20:,.0f}" for bytes_ in found)
        lines.append(
            f"peak memory of a worker (unshared), {size} MB: {max(found) / 2**20:,.0f} MiB; by quarter {quarters}"
        )
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__)
    parser.add_argument("--corpus", metavar="DIR", type=Path, required=True, help="a directory of parquet files")
    parser.add_argument("--text-field", default="text", help="the column that holds the document")
    parser.add_argument("--megabytes", type=float, default=1000.0, help="how much text")
    parser.add_argument("--small-megabytes", type=float, default=100.0, help="the second size for peak memory; 0: none")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokenizer", metavar="MODEL", type=Path, help="default: a unigram model is trained")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--sample-bytes", type=int, default=50_000_000, help="text the tokenizer is trained on")
    parser.add_argument("--no-peers", action="store_true", help="leave Megatron-LM's loop and datatrove out")
    parser.add_argument("--folder", metavar="DIR", type=Path, help="where to work; default: a temporary directory")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        files, n_bytes = repeat_corpus(arguments.corpus, arguments.text_field, arguments.megabytes, folder / "corpus")
        model, tokenizer_seconds = arguments.tokenizer, None
        if model is None:
            model = folder / "unigram.model"
            tokenizer_seconds = train_tokenizer_file(files, arguments.vocab_size, arguments.sample_bytes, model)
        workers = arguments.workers
        results: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": ", ".join(f"{name} {metadata.version(name)}" for name in ("ray", "sentencepiece", "pyarrow")),
            "command": "python -m benchmarks.pipeline " + " ".join(sys.argv[1:]),
            "megabytes": n_bytes / 1e6,
            "documents": sum(1 for _ in documents_of(files)),
            "workers": workers,
            "tokenizer_seconds": tokenizer_seconds,
            "bare": measure_bare(model, files, "list", workers),
            "bare_arrays": measure_bare(model, files, "numpy", workers),
            "prepare": measure_prepare(model, files, workers, folder / "data"),
            "shares": measure_shares(model, files),
        }
        if not arguments.no_peers:
            results["megatron"] = measure_megatron(model, files, workers, folder)
            results["datatrove"] = measure_datatrove(model, files, workers, folder)
        results["memory"] = {f"{n_bytes / 1e6:,.0f}": results["prepare"]["peak_worker_bytes"]}
        if arguments.small_megabytes:
            few, small = repeat_corpus(
                arguments.corpus, arguments.text_field, arguments.small_megabytes, folder / "small"
            )
            found = measure_prepare(model, few, workers, folder / "small-data")
            results["memory"][f"{small / 1e6:,.0f}"] = found["peak_worker_bytes"]
        print(report(results))
        if arguments.json:
            write_results(arguments.json, results)
    return 0


if __name__ == "__main__":
    run_command(main)
