"""The manifest of a new dataset, complete with its digest."""

import socket
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from pipeline.atomic import hash_file
from pipeline.shards import FORMAT, TOKENIZER, VERSION, dataset_digest
from pipeline.tokenizer import Tokenizer


def new_manifest(
    *,
    content: dict[str, Any],
    sources: list[dict[str, Any]],
    tokenizer: Tokenizer,
    eos_id: int,
    splits: dict[str, Any],
    execution: dict[str, Any],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """What `manifest.json` holds; see docs/design.md for what its digest covers.

    Args:
        eos_id: the piece that closes each document, which whoever adopts shards may choose.
        splits: by name: documents, tokens, utf8_bytes, dropped (counts by reason), shards.
        execution, seconds: outside the digest, like the clock and the host.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "digest": "",
        "content": content,
        "sources": sources,
        "tokenizer": {
            "file": TOKENIZER,
            "sha256": hash_file(tokenizer.path),
            "vocab_size": tokenizer.vocab_size,
            "unk_id": tokenizer.unk_id,
            "eos_id": eos_id,
            "pad_id": tokenizer.pad_id,
            "mask_id": tokenizer.mask_id,
        },
        "splits": splits,
        "dropped": dict(sum((Counter(entry["dropped"]) for entry in splits.values()), Counter[str]())),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "execution": execution,
        "seconds": seconds,
    }
    manifest["digest"] = dataset_digest(manifest)
    return manifest
