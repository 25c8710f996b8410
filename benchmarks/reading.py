"""Speed of reading: `python -m benchmarks.reading [--corpus DATASET]`; without a dataset one is made up.

Finished batches as the trainer gets them, from one thread of one process and the page cache, in the order of a run:
windows at random. All four arrays of every batch are summed, so that nothing is left lazy; the sums are in the times.
The order of a sample is timed on datasets that exist as numbers only, 10^12 tokens together.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import markdown_table, number, write_results
from pipeline.batches import TrainingStream
from pipeline.errors import run_command
from pipeline.masking import MaskedLM
from pipeline.mixture import Component, Mixture
from pipeline.prefetch import StepLoader
from pipeline.shards import (
    FORMAT,
    MANIFEST,
    TOKENIZER,
    VERSION,
    ShardWriter,
    TokenDataset,
    dataset_digest,
    read_manifest,
)

VOCAB_SIZE = 32_000
SIMULATED_TOKENS = 10**12
_TOKENIZER = b"none: these tokens are made up"


def make_dataset(folder: Path, tokens: int, *, seed: int, simulated: bool = False) -> TokenDataset:
    """A dataset of about so many random tokens in documents of 200 to 6,000; a simulated one has no shards."""
    generator = np.random.default_rng(seed)
    shards = []
    (folder / "train").mkdir(parents=True)
    (folder / TOKENIZER).write_bytes(_TOKENIZER)
    n_shards = 0 if simulated else max(1, round(tokens / 25e6))
    for shard in range(n_shards):
        lengths = generator.integers(200, 6000, max(1, tokens // n_shards // 3100))
        drawn = generator.integers(4, VOCAB_SIZE, int(lengths.sum()), np.uint16)
        drawn[np.cumsum(lengths) - 1] = 1
        with ShardWriter(folder / "train" / f"shard-{shard:05d}", VOCAB_SIZE) as writer:
            writer.append(drawn, lengths)
        shards.append(dataclasses.asdict(writer.record))
    ids = {"vocab_size": VOCAB_SIZE, "unk_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
    counts = {name: sum(shard[name] for shard in shards) for name in ("documents", "tokens")}
    if simulated:
        counts = {"documents": tokens // 3100, "tokens": tokens}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "content": {"seed": seed},
        "sources": [],
        "tokenizer": {"file": TOKENIZER, "sha256": hashlib.sha256(_TOKENIZER).hexdigest(), **ids},
        "splits": {"train": {**counts, "utf8_bytes": 0, "dropped": {}, "shards": shards}},
    }
    manifest["digest"] = dataset_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return TokenDataset.open(folder, "train")


def measure_batches(stream: TrainingStream, *, ahead: int, windows: int, rounds: int) -> dict[str, Any]:
    """Time `rounds` times so many windows, in steps of 8 batches of 8."""
    loader = StepLoader(stream, samples_per_step=64, micro_batch=8, ahead=ahead)
    checksum, seconds, cpu_seconds = 0, [], []
    steps, tokens = max(1, windows // 64), 0
    try:
        for turn in range(rounds + 1):
            began, cpu_began = time.perf_counter(), time.process_time()
            for _ in range(steps):
                for batch in loader.next().batches:
                    arrays = [tensor.numpy() for tensor in vars(batch).values()]
                    checksum += sum(int(array.sum()) for array in arrays)
                    tokens += arrays[0].size
            if turn:  # the first maps the shards
                seconds.append(time.perf_counter() - began)
                cpu_seconds.append(time.process_time() - cpu_began)
    finally:
        loader.close()
    size = tokens / (rounds + 1)
    return {
        "tokens_per_second": size / statistics.median(seconds),
        "slowest": size / max(seconds),
        "fastest": size / min(seconds),
        "tokens_per_cpu_second": size / statistics.median(cpu_seconds),
        "checksum": checksum,
    }


def batch_rows(datasets: Sequence[TokenDataset], seq_len: int, *, windows: int, rounds: int) -> dict[str, Any]:
    """What is read in each way; a mixture takes 70 % from the first dataset and 30 % from the second."""

    def measure(data: TokenDataset | Mixture, *, ahead: int = 0, masked_lm: MaskedLM | None = None) -> dict[str, Any]:
        stream = TrainingStream(data, seq_len=seq_len, seed=0, masked_lm=masked_lm)
        return measure_batches(stream, ahead=ahead, windows=windows, rounds=rounds)

    first = datasets[0]
    rows = {"next token": measure(first), "next token, prepared 2 steps ahead": measure(first, ahead=2)}
    if len(datasets) > 1:
        parts = zip(datasets, (0.7, 0.3), strict=False)
        rows["mixture of two"] = measure(Mixture([Component(data.split, data, weight) for data, weight in parts]))
    rows["masked LM, 15 %"] = measure(first, masked_lm=MaskedLM())
    return rows


def order_rows(folder: Path, seq_len: int) -> dict[str, dict[str, float]]:
    """Microseconds a sample: of one dataset, and of a mixture of five."""

    def simulate(n: int) -> Mixture:
        tokens = SIMULATED_TOKENS // n
        names = [f"simulated-{n}-{i}" for i in range(n)]
        parts = [make_dataset(folder / name, tokens, seed=i, simulated=True) for i, name in enumerate(names)]
        return Mixture(
            [Component(name, part, 1 + i / 10) for i, (name, part) in enumerate(zip(names, parts, strict=True))]
        )

    chance = random.Random(0)
    samples = SIMULATED_TOKENS // seq_len
    rows = {}
    for name, n in (("one dataset", 1), ("mixture of five", 5)):
        stream = TrainingStream(simulate(n), seq_len=seq_len, seed=0)
        rows[name] = {
            "in_turn": measure_order(stream, range(samples, samples + 50_000)),
            "at_random": measure_order(stream, [chance.randrange(4 * samples) for _ in range(50_000)]),
        }
    return rows


def measure_order(stream: TrainingStream, samples: Sequence[int]) -> float:
    """Microseconds from a sample's number to its dataset and window: the median of five parts."""
    size = len(samples) // 5
    parts = [samples[start : start + size] for start in range(0, 5 * size, size)]
    times = []
    for part in parts:
        began = time.perf_counter()
        for sample in part:
            stream.position(sample)
        times.append(1e6 * (time.perf_counter() - began) / len(part))
    return statistics.median(times)


def report(results: dict[str, Any]) -> str:
    """The tables of a run."""
    rows = [
        [
            name,
            *(number(row[key] / 1e6) for key in ("tokens_per_second", "slowest", "fastest", "tokens_per_cpu_second")),
        ]
        for name, row in results["batches"].items()
    ]
    order = [[name, number(times["in_turn"]), number(times["at_random"])] for name, times in results["order"].items()]
    return "\n".join(
        [
            f"{results['machine']}; {results['date']}; {results['versions']}; one thread",
            f"windows of {results['seq_len']:,} at random; datasets: {'; '.join(results['data'])}",
            "",
            markdown_table(
                ["finished batches, summed", "M tokens/s", "slowest round", "fastest", "per CPU second"], rows
            ),
            "",
            markdown_table(["order at 10^12 tokens", "µs a sample, in turn", "µs, any sample of 4 epochs"], order),
        ]
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reading", description=__doc__)
    parser.add_argument("--corpus", metavar="DATASET", type=Path, help="a directory made by pipeline.prepare")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="size of the made-up dataset")
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens of a window")
    parser.add_argument("--round-tokens", type=int, default=50_000_000, help="how much is read at a time")
    parser.add_argument("--rounds", type=int, default=5, help="how often it is timed")
    parser.add_argument("--folder", metavar="DIR", type=Path, help="where to work; default: a temporary directory")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        if arguments.corpus:
            datasets = [
                TokenDataset.open(arguments.corpus, split) for split in read_manifest(arguments.corpus)["splits"]
            ]
            datasets.sort(key=lambda dataset: dataset.n_tokens, reverse=True)
        else:
            sizes = (arguments.tokens, arguments.tokens // 4)
            datasets = [make_dataset(folder / str(seed), size, seed=seed) for seed, size in enumerate(sizes)]
        for dataset in datasets:
            for file in (dataset.path / dataset.split).iterdir():
                file.read_bytes()  # into the page cache
        results = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": f"torch {torch.__version__}, numpy {np.__version__}",
            "command": "python -m benchmarks.reading " + " ".join(sys.argv[1:]),
            "seq_len": arguments.seq_len,
            "data": [f"{data.n_tokens:,} tokens in {data.n_documents:,} documents" for data in datasets],
            "batches": batch_rows(
                datasets,
                arguments.seq_len,
                windows=arguments.round_tokens // arguments.seq_len,
                rounds=arguments.rounds,
            ),
            "order": order_rows(folder, arguments.seq_len),
        }
    print(report(results))
    if arguments.json:
        write_results(arguments.json, results)
    return 0


if __name__ == "__main__":
    run_command(main)
