"""The dataset card: README.md beside the manifest, in the form that the Hugging Face hub shows.

Made from the manifest alone and without its clocks and hosts: the same dataset has the same card.
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.atomic import write_aside
from pipeline.config import Clean
from pipeline.profile import UNKNOWN, Counts, add_counts, split_counts, sum_dropped, sum_sources

CARD = "README.md"
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
"""The hub's size categories, in documents: each ten times the one before."""


def write_card(directory: Path, manifest: dict[str, Any]) -> None:
    """Write the card of the dataset that `manifest` (its digest included) describes; replaces an older one.

    Call it before the manifest is written: a card alone makes no dataset, and no dataset is without its card.
    """
    with write_aside(directory / CARD) as file:
        file.write(render_card(manifest).encode())


def render_card(manifest: dict[str, Any], *, front_matter: bool = True) -> str:
    """The card's markdown; `front_matter`: with the YAML on top that the hub reads, and other viewers garble."""
    splits = manifest["splits"]
    total = add_counts(split_counts(entry) for entry in splits.values())
    title = _cell(f"Token shards: {', '.join(_source_names(manifest)) or manifest['digest'][:16]}")
    parts = [
        *([_front_matter(title, total)] if front_matter else []),
        f"# {title}",
        "Tokenized text for pretraining language models: the tokens of each document, closed by one `</s>`, in "
        "Megatron's indexed-dataset format. The directory is a dataset once `manifest.json` is there, which is written "
        "last.",
        _table(["", ""], [["digest", f"`{manifest['digest']}`"], *_size_rows(total), *_tokenizer_rows(manifest)]),
        "## Splits",
        _table(
            ["split", "documents", "tokens", "bytes of text", "bytes per token", "shards"],
            [[name, *split_counts(entry).cells(), f"{len(entry['shards']):,}"] for name, entry in splits.items()],
        ),
        "## Sources",
        *_sources(manifest),
        "## Cleaning",
        *_cleaning(manifest),
        "## Tokenizer",
        *_tokenizer(manifest),
        *_making(manifest),
        _USE.format(split=next(iter(splits), "train")),
    ]
    return "\n\n".join(parts) + "\n"


_USE = """## Use

`DIR` is this directory.

```bash
python -m pipeline.verify DIR     # prove every byte, count and hash
python -m pipeline.inspect DIR    # lengths, vocabulary, documents to read; --figure FILE.png draws them
deepspeed launch/train.py CONFIG data.path=DIR data.split={split}
```

```python
from pipeline.shards import TokenDataset

dataset = TokenDataset.open("DIR", "{split}")
dataset.read(0, 1024)  # token ids of the documents in a row
```

Megatron-LM, GPT-NeoX and NeMo read a shard by its path without the ending, for example `DIR/{split}/shard-00000`."""


def _front_matter(title: str, total: Counts) -> str:
    import yaml

    categories = [f"n<{_SIZES[0]}", *(f"{low}<n<{high}" for low, high in pairwise(_SIZES)), f"n>{_SIZES[-1]}"]
    place = min(max(len(str(total.documents)) - 3, 0), len(categories) - 1)
    facts = {
        "pretty_name": title,
        "task_categories": ["text-generation"],
        "size_categories": [categories[place]],
        "tags": ["pretraining", "sentencepiece", "megatron-indexed-dataset"],
        "viewer": False,
    }
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---"


def _source_names(manifest: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(file["source"] for file in manifest["sources"]))
    return names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]


def _size_rows(total: Counts) -> list[list[str]]:
    labels = "documents", "tokens", "bytes of text (UTF-8)", "bytes per token"
    return [[label, size] for label, size in zip(labels, total.cells(), strict=True)]


def _tokenizer_rows(manifest: dict[str, Any]) -> list[list[str]]:
    rows = [["vocabulary", f"{manifest['tokenizer']['vocab_size']:,} pieces"]]
    if (seed := manifest["content"].get("seed")) is not None:
        rows.append(["seed", str(seed)])
    return rows


def _sources(manifest: dict[str, Any]) -> list[str]:
    files = manifest["sources"]
    sizes = sum_sources(manifest["splits"].values())
    by_name: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        by_name.setdefault(file["source"], []).append(file)
    rows = []
    for name in sorted({*by_name, *(sizes or {})}):
        read = by_name.get(name, [])
        counts = sizes[name].cells() if sizes and name in sizes else [UNKNOWN] * 4
        n_bytes = sum(file.get("size") or 0 for file in read)
        rows.append([name, f"{len(read):,}", f"{n_bytes:,}", *counts])
    if not rows:
        return ["The manifest does not record where the documents came from."]
    columns = ["source", "files", "bytes of files", "documents", "tokens", "bytes of text", "bytes per token"]
    parts = [_table(columns, rows)]
    hashed = sum(1 for file in files if file.get("sha256"))
    note = f"`manifest.json` lists every file with its size and SHA-256 ({hashed:,} hashes), which the digest covers."
    if hashed < len(files):
        note += f" {len(files) - hashed:,} could not be read and have none."
    return [*parts, note]


def _cleaning(manifest: dict[str, Any]) -> list[str]:
    config = manifest["content"].get("clean")
    parts = []
    if config is None:
        parts.append("The manifest does not record how the text was cleaned.")
    else:
        off = Clean().model_dump(mode="json")
        steps = [
            f"- `{key}: {_inline(value)}`{_explain(key)}" for key, value in config.items() if value != off.get(key)
        ]
        parts.append("\n".join(steps) or "No step was on: the text is as it came.")
    dropped = sum_dropped(manifest["splits"].values())
    if not dropped:
        return [*parts, "No document was dropped."]
    splits = manifest["splits"]
    rows = [
        [reason, *(f"{(entry.get('dropped') or {}).get(reason, 0):,}" for entry in splits.values()), f"{count:,}"]
        for reason, count in dropped.items()
    ]
    kept = sum(entry["documents"] for entry in splits.values())
    share = sum(dropped.values()) / (sum(dropped.values()) + kept)
    return [
        *parts,
        f"Dropped: {sum(dropped.values()):,} documents, {share:.2%} of those read.",
        _table(["reason", *splits, "all"], rows),
    ]


def _explain(key: str) -> str:
    field = Clean.model_fields.get(key)
    if not field or not field.description:
        return ""
    return ": " + re.sub(r"^(true|skip|Given): (\w)", lambda found: found[2].upper(), field.description)


def _tokenizer(manifest: dict[str, Any]) -> list[str]:
    entry, choice = manifest["tokenizer"], manifest["content"].get("tokenizer", {})
    trained = choice.get("train")
    how = (
        f"A SentencePiece {trained['model_type']} model, trained on a sample of the train split."
        if trained
        else "An existing SentencePiece model that was given."
    )
    ids = {"unknown": "unk_id", "`</s>`": "eos_id", "padding": "pad_id", "mask": "mask_id"}
    rows = [["file", f"`{entry['file']}`"], ["SHA-256", f"`{entry['sha256']}`"], ["pieces", f"{entry['vocab_size']:,}"]]
    rows += [[f"id of {name}", str(entry[key]) if entry[key] >= 0 else "none"] for name, key in ids.items()]
    return [how, _table(["", ""], rows)]


def _making(manifest: dict[str, Any]) -> list[str]:
    """How to make it again, where the manifest says that."""
    if "adopted" in manifest["content"]:
        how = ", ".join(f"`{key}: {_inline(value)}`" for key, value in manifest["content"]["adopted"].items())
        return ["## Where it comes from", f"Shards of Megatron-LM, adopted by `python -m pipeline.adopt` with {how}."]
    if "sources" not in manifest["content"]:
        return []
    return [
        "## Make it again",
        "The same files under this configuration give the same bytes and the same digest, on any number of workers. "
        "Where the files lie is no part of a dataset: put it in for `PATH`, and save this as `data.yaml`.",
        f"```yaml\n{config_yaml(manifest)}```",
        "```bash\npython -m pipeline.prepare data.yaml\n```",
    ]


def config_yaml(manifest: dict[str, Any]) -> str:
    """The configuration that a dataset was made from, with `PATH` where only the user knows what to write."""
    import yaml

    content = dict(manifest["content"])
    if "clean" in content:  # where a function's hash is beside its name
        content["clean"] = {key: value for key, value in content["clean"].items() if key in Clean.model_fields}
    content["sources"] = [{**source, "path": "PATH"} for source in content["sources"]]
    if "train" not in content.get("tokenizer", {}):
        content["tokenizer"] = {"path": manifest["tokenizer"]["file"]}
    config = {"content": content, "execution": {"output": "NEW_DIRECTORY"}}
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _inline(value: Any) -> str:
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _table(columns: list[str], rows: list[list[str]]) -> str:
    """A markdown table, its first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in (columns, rule, *rows))


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
