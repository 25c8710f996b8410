"""Prove a dataset: every hash, index, count, token and the digest, read again from disk.

    python -m pipeline.verify DIR

Exit status: 0 sound, 1 damaged, 2 not a dataset, or a manifest that cannot be read.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.atomic import hash_file
from pipeline.errors import UserError, run_command
from pipeline.shards import Shard, ShardRecord, bin_path, dataset_digest, idx_path, read_manifest, token_dtype
from pipeline.tokenizer import Tokenizer

_BLOCK_TOKENS = 1 << 22
_COUNTS = "documents", "tokens", "utf8_bytes"


def verify(path: str | Path) -> Iterator[str]:
    """Everything that is wrong with a dataset, one line each, naming the file.

    Raises:
        UserError: `path` is not a dataset that this release can read.
    """
    path = Path(path)
    manifest = read_manifest(path)
    digest = dataset_digest(manifest)
    if digest != manifest["digest"]:
        yield f"manifest.json: its digest is {manifest['digest']}, its content has {digest}"
    yield from _sum_problems(manifest)
    utf8_lengths = yield from _verify_tokenizer(path, manifest)
    for split, entry in manifest["splits"].items():
        totals = dict.fromkeys(_COUNTS, 0)
        sound = True
        for record in (ShardRecord(**shard) for shard in entry["shards"]):
            stem = path / split / record.name
            try:
                problem = _shard_problem(stem, record, manifest["tokenizer"])
            except OSError as error:
                problem = f"cannot be read: {error}"
            if problem:
                sound = False
                yield f"{split}/{record.name}: {problem}"
                continue
            totals["documents"] += record.documents
            totals["tokens"] += record.tokens
            if utf8_lengths is not None:
                totals["utf8_bytes"] += sum(int(utf8_lengths[block].sum()) for block in _blocks(Shard(stem).tokens))
        if utf8_lengths is None:
            del totals["utf8_bytes"]
        for name, total in totals.items():
            if sound and total != entry[name]:
                yield f"{split}: the manifest counts {entry[name]} {name}, the shards hold {total}"


def _sum_problems(manifest: dict[str, Any]) -> Iterator[str]:
    """Counts that the manifest alone shows to be wrong: of sources, and of what was dropped."""
    dropped: Counter[str] = Counter()
    for split, entry in manifest["splits"].items():
        dropped.update(entry.get("dropped", {}))
        if not (sources := entry.get("by_source")):
            continue  # adopted shards have none
        totals = {name: sum(source[name] for source in sources.values()) for name in _COUNTS}
        totals["dropped"] = dict(sum((Counter(source["dropped"]) for source in sources.values()), Counter[str]()))
        for name, total in totals.items():
            if total != entry.get(name):
                yield f"manifest.json: {split}: counts {entry.get(name)} {name}, its sources {total}"
    if dropped != (total := manifest.get("dropped", {})):
        yield f"manifest.json: counts {total} dropped, its splits {dict(dropped)}"


def _verify_tokenizer(path: Path, manifest: dict[str, Any]) -> Any:
    """Yields problems; returns bytes of text by id where the counts were made from them, or must equal them."""
    entry = manifest["tokenizer"]
    file = path / entry["file"]
    if not file.is_file():
        yield f"{entry['file']}: missing"
        return None
    if (found := hash_file(file)) != entry["sha256"]:
        yield f"{entry['file']}: SHA-256 is {found} instead of {entry['sha256']}"
        return None
    tokenizer = Tokenizer(file)
    content = manifest["content"]
    for name in ("vocab_size", "unk_id", "eos_id", "pad_id", "mask_id"):
        # Who adopts shards may say which piece ends their documents.
        expected = content.get("adopted", {}).get(name, getattr(tokenizer, name))
        if expected != entry[name]:
            yield f"{entry['file']}: {name} is {expected}, the manifest says {entry[name]}"
    return tokenizer.utf8_lengths() if "adopted" in content or "train" in content.get("tokenizer", {}) else None


def _shard_problem(stem: Path, record: ShardRecord, tokenizer: dict[str, Any]) -> str | None:
    """The first thing that is wrong with a shard."""
    for file, sha256 in ((bin_path(stem), record.sha256_bin), (idx_path(stem), record.sha256_idx)):
        if not file.is_file():
            return f"{file.name}: missing"
        if (found := hash_file(file)) != sha256:
            return f"{file.name}: SHA-256 is {found} instead of {sha256} ({file.stat().st_size} bytes)"
    try:
        shard = Shard(stem)
    except UserError as error:
        return str(error)
    lengths = shard.lengths.astype(np.int64)
    ends = np.cumsum(lengths)
    if (shard.tokens.dtype, len(lengths), len(shard.tokens), shard.tokens.nbytes) != (
        token_dtype(tokenizer["vocab_size"]),
        record.documents,
        record.tokens,
        record.bytes,
    ):
        return "its type, documents, tokens or bytes are not those of the manifest"
    if not len(ends) or lengths.min() < 1 or ends[-1] != len(shard.tokens):
        return f"{idx_path(stem).name}: the documents' lengths do not add up to its tokens"
    if not np.array_equal(shard.offsets, (ends - lengths) * shard.tokens.itemsize):
        return f"{idx_path(stem).name}: the documents' offsets do not follow from their lengths"
    if not np.array_equal(shard.boundaries, np.arange(len(lengths) + 1)):
        return f"{idx_path(stem).name}: not one sequence a document"
    n_ends = 0
    for block in _blocks(shard.tokens):
        if int(block.max()) >= tokenizer["vocab_size"] or int(block.min()) < 0:
            return f"{bin_path(stem).name}: an id outside the vocabulary of {tokenizer['vocab_size']}"
        n_ends += int((block == tokenizer["eos_id"]).sum())
    if n_ends != len(ends) or not bool((shard.tokens[ends - 1] == tokenizer["eos_id"]).all()):
        return f"{bin_path(stem).name}: not every document ends with its only </s>"
    return None


def _blocks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(tokens), _BLOCK_TOKENS):
        yield tokens[start : start + _BLOCK_TOKENS]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.verify",
        description="Prove a dataset: read every file again and check each hash, count and token.",
        epilog="Exit status: 0 sound, 1 damaged (a line for each problem), 2 not a dataset.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="the dataset: where manifest.json lies")
    directory = parser.parse_args().directory
    problems = 0
    for problem in verify(directory):
        print(f"damaged: {problem}", flush=True)
        problems += 1
    if problems:
        return 1
    manifest = read_manifest(directory)
    shards = sum(len(entry["shards"]) for entry in manifest["splits"].values())
    tokens = sum(entry["tokens"] for entry in manifest["splits"].values())
    print(f"ok: {shards} shards, {tokens:,} tokens, digest {manifest['digest']}")
    return 0


if __name__ == "__main__":
    run_command(main)
