"""What a run keeps of the datasets that it reads: their facts, and for each a card and a picture in its directory."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.atomic import write_aside
from pipeline.card import render_card
from pipeline.credentials import redact
from pipeline.errors import UserError
from pipeline.inspect import save_figure
from pipeline.profile import profile_dataset, split_counts, sum_dropped, sum_sources
from pipeline.shards import TokenDataset, read_manifest

FIGURE_TOKENS = 5_000_000
"""How many tokens are looked at for the picture: less than a second's work, and enough for it."""

logger = logging.getLogger(__name__)


def dataset_facts(context: str, dataset: TokenDataset) -> dict[str, Any]:
    """Plain data about a split that a run reads as `context`, from its manifest; numbers not recorded are None."""
    entry = read_manifest(dataset.path)["splits"][dataset.split]
    counts, sources = split_counts(entry), sum_sources([entry])
    ratio = counts.bytes_per_token
    return {
        "context": context,
        "name": f"{dataset.path.name}/{dataset.split}",
        "digest": dataset.digest,
        "path": str(dataset.path),
        "vocab_size": dataset.vocab_size,
        **asdict(counts),
        "bytes_per_token": None if ratio is None else round(ratio, 3),
        "sources": sources and {redact(name): asdict(part) for name, part in sources.items()},
        "dropped": sum_dropped([entry]),
    }


def folder_names(datasets: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A short name for each digest: the directory's, with a part of the digest where two would have the same."""
    names = {facts["digest"]: re.sub(r"[^\w.-]", "_", Path(facts["path"]).name) or "data" for facts in datasets}
    taken = list(names.values())
    return {digest: name if taken.count(name) == 1 else f"{name}-{digest[:8]}" for digest, name in names.items()}


def keep_cards(folder: Path, datasets: Sequence[dict[str, Any]]) -> None:
    """Write card.md and figure.png of each dataset below `folder`, unless they are there; what fails is only logged.

    A run must have them even if its data has gone when a server can take them.
    """
    paths = {facts["digest"]: facts["path"] for facts in datasets}
    for digest, name in folder_names(datasets).items():
        card, figure = folder / name / "card.md", folder / name / "figure.png"
        try:
            manifest = read_manifest(paths[digest])
            if manifest["digest"] != digest:
                raise UserError(f"{paths[digest]}: holds another dataset than the run has read")
            text = redact(render_card(manifest, front_matter=False)).encode()
            if card.exists() and card.read_bytes() == text and figure.exists():
                continue
            card.parent.mkdir(parents=True, exist_ok=True)
            figure.unlink(missing_ok=True)
            with write_aside(card) as file:
                file.write(text)
            save_figure(profile_dataset(paths[digest], samples=0, sample_tokens=FIGURE_TOKENS), figure)
        except Exception as error:
            logger.warning("no full card of the dataset %s: %s: %s", paths[digest], type(error).__name__, error)


def dataset_entity(facts: dict[str, Any]) -> Any:
    """MLflow's description of a dataset, made from its facts: it is never loaded."""
    from mlflow.entities import Dataset

    told = ("documents", "tokens", "utf8_bytes", "bytes_per_token", "vocab_size", "sources", "dropped")
    profile = {key: "unknown" if facts[key] is None else facts[key] for key in told}
    row = {"name": "tokens", "type": "array", "items": {"type": "integer"}, "required": True}
    return Dataset(
        name=facts["name"],
        digest=facts["digest"][:32],
        source_type="local",
        source=json.dumps({"uri": facts["path"]}),
        schema=json.dumps({"mlflow_colspec": [row]}),
        profile=json.dumps(profile, ensure_ascii=False),
    )
