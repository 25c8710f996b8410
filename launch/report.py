"""The quick start's report: what was trained, how good it is beside two baselines, what it writes, what next."""

import json
import lzma
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flash_model.config import count_parameters
from launch.config import RunConfig
from launch.console import duration
from launch.records import whole_records
from launch.run_directory import RunDirectory
from pipeline.atomic import write_aside
from pipeline.shards import TokenDataset

PROMPT = "The people of the United States"
SAMPLE_TOKENS = 120


def write_report(config: RunConfig, path: Path, stage_seconds: dict[str, float]) -> None:
    """Write the markdown report of a finished run to `path`."""
    (source,) = config.data.components
    training = TokenDataset.open(source.path, source.split)
    name, ref = next(iter(config.data.validation.items()))
    held_out = TokenDataset.open(ref.path, ref.split)
    directory = RunDirectory(config.run.dir)
    scores = last_metrics(directory.metrics, f"{name}/")
    unigram, xz = unigram_bits_per_byte(training, held_out), xz_bits_per_byte(held_out)
    ours = scores["bits_per_byte"]
    timings = json.loads((source.path / "manifest.json").read_text())["seconds"]
    run_dir = os.path.relpath(config.run.dir)
    model = config.model
    shape = f"{model.n_layers} layers, d_model {model.d_model}, chunk {model.chunk_size}"
    how = f"{config.steps:,} steps, two processes, ZeRO-{config.train.zero_stage}, {config.train.precision}"
    parts = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in timings.items())
    further = f"configs/quickstart.yaml --resume train.tokens={2 * config.train.tokens}"
    rows = [
        ("FLASH, this run", f"{ours:.3f}", ""),
        ("unigram distribution of the training tokens", f"{unigram:.3f}", f"{1 - ours / unigram:.1%} below"),
        ("`xz -9` of the held-out text", f"{xz:.3f}", f"{1 - ours / xz:.1%} below"),
    ]
    text = f"""# Quick start: a FLASH language model on the State of the Union addresses

| | |
|---|---|
| model | {shape}, {count_parameters(model):,} parameters |
| training text | {training.n_documents:,} documents, {training.n_tokens:,} tokens, {training.n_utf8_bytes:,} bytes |
| held-out text | {held_out.n_documents:,} documents, {held_out.n_tokens:,} tokens, {held_out.n_utf8_bytes:,} bytes |
| data digest | `{training.digest}` |
| trained on | {directory.done_tokens:,} tokens in {how} |
| held-out loss | {scores["loss"]:.4f} nats per token |
| held-out perplexity | {scores["perplexity"]:.2f} |

## Bits per byte of the same held-out text

| | bits per byte | FLASH is |
|---|---|---|
{_table(rows)}

The unigram baseline is the cross-entropy of the held-out tokens under the token frequencies of the training text (one
added to every count), which knows which words are common and nothing of context.

## Time

| stage | |
|---|---|
{_table([(stage, duration(seconds)) for stage, seconds in stage_seconds.items()])}

Of data: {parts}. Of training: {_training_parts(directory.metrics)}.

## What it writes

> {_sample(config.run.dir).replace(chr(10), chr(10) + "> ")}

## Next

```bash
# see the run: then open http://127.0.0.1:5000/#/experiments/1/runs
.venv/bin/mlflow ui --host 127.0.0.1 --backend-store-uri {config.mlflow_store}
# let it write
.venv/bin/python -m flash_model.generate {run_dir} --prompt "{PROMPT}"
# train it further
.venv/bin/deepspeed --num_accelerators 2 launch/train.py {further}
# go bigger: what would the 110 M model of the paper need?
.venv/bin/python -m launch.plan configs/wiki40b/flash-8k.yaml --devices 8 --memory 80
```
"""
    with write_aside(path) as file:
        file.write(text.encode())


def last_metrics(metrics: Path, prefix: str) -> dict[str, float]:
    """The last recorded value of each metric whose name starts with `prefix`, without it."""
    values: dict[str, float] = {}
    for record in whole_records(metrics):
        recorded = record.get("metrics", {})
        values |= {key.removeprefix(prefix): value for key, value in recorded.items() if key.startswith(prefix)}
    return values


def unigram_bits_per_byte(training: TokenDataset, held_out: TokenDataset) -> float:
    """Cross-entropy of the held-out tokens under the training token frequencies, with one added to every count."""
    counts = _token_counts(training) + 1.0
    nats = -np.dot(_token_counts(held_out), np.log(counts / counts.sum()))
    return float(nats) / math.log(2) / held_out.n_utf8_bytes


def xz_bits_per_byte(dataset: TokenDataset) -> float:
    """Size of the concatenated text under `xz -9`, in bits per byte of text."""
    from pipeline.tokenizer import Tokenizer

    tokenizer = Tokenizer(dataset.tokenizer_path)
    tokens = dataset.read(0, dataset.n_tokens)
    ends = np.flatnonzero(tokens == dataset.eos_id)
    starts = np.concatenate([[0], ends[:-1] + 1])
    text = "".join(
        tokenizer.decode(tokens[start:end].tolist()) for start, end in zip(starts, ends, strict=True)
    ).encode()
    assert len(text) == dataset.n_utf8_bytes, "decoding the tokens did not give the text back"
    return len(lzma.compress(text, preset=9)) * 8 / len(text)


def _token_counts(dataset: TokenDataset) -> np.ndarray:
    counts = np.zeros(dataset.vocab_size, np.float64)
    step = 1 << 22
    for start in range(0, dataset.n_tokens, step):
        block = dataset.read(start, min(start + step, dataset.n_tokens))
        counts += np.bincount(block, minlength=dataset.vocab_size)
    return counts


def _sample(run_dir: Path) -> str:
    from flash_model.export import load_model, resolve_model_directory
    from flash_model.generate import generate_text, load_tokenizer

    model, tokenizer = load_model(run_dir), load_tokenizer(resolve_model_directory(run_dir))
    return PROMPT + generate_text(model, tokenizer, PROMPT, max_tokens=SAMPLE_TOKENS, temperature=0.8, top_p=0.95)


def _training_parts(metrics: Path) -> str:
    records = whole_records(metrics)
    # By step: a step that a restart repeated counts once.
    steps = {record["step"]: record["metrics"]["perf/step_seconds"] for record in records if _is_step(record)}
    return f"{duration(sum(steps.values()))} in steps, the rest start-up, evaluation and saving"


def _is_step(record: dict[str, Any]) -> bool:
    return "perf/step_seconds" in record.get("metrics", {})


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
