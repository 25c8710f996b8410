"""A card says what the manifest says, is the same for the same dataset, and its configuration makes it again."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import card
from pipeline.card import CARD, config_yaml, render_card, write_card
from pipeline.config import PrepareConfig
from pipeline.prepare import prepare

MANIFEST: dict[str, Any] = {
    "digest": "0123456789abcdef" * 4,
    "content": {
        "sources": [
            {"type": "parquet", "name": "books", "pattern": "*.parquet", "text_field": "text"},
            {"type": "text", "name": "letters | notes", "pattern": "*.txt"},
        ],
        "clean": {
            "on_unreadable_file": "error",
            "on_bad_row": "skip",
            "unicode": "NFC",
            "min_characters": 200,
            "exact_duplicates": False,
            "near_duplicates": {"threshold": 0.8, "permutations": 128, "ngram": 5},
        },
        "tokenizer": {"train": {"model_type": "bpe", "vocab_size": 4096, "num_threads": 2}},
        "splits": {"valid": 0.1},
        "seed": 17,
    },
    "sources": [
        {"source": "books", "name": "a.parquet", "size": 1000, "sha256": "a" * 64},
        {"source": "books", "name": "b.parquet", "size": None, "sha256": None},
        {"source": "letters | notes", "name": "c.txt", "size": 50, "sha256": "c" * 64},
    ],
    "tokenizer": {
        "file": "tokenizer.model",
        "sha256": "d" * 64,
        "vocab_size": 4096,
        "unk_id": 0,
        "eos_id": 1,
        "pad_id": 2,
        "mask_id": -1,
    },
    "splits": {
        split: {
            "documents": documents,
            "tokens": 100 * documents,
            "utf8_bytes": 450 * documents,
            "dropped": {"too_short": short, "near_duplicate": 2},
            "by_source": {"books": {"documents": documents, "tokens": 100 * documents, "utf8_bytes": 450 * documents}},
            "shards": [{}] * shards,
        }
        for split, documents, short, shards in (("train", 9000, 5, 3), ("valid", 1000, 0, 1))
    },
    "created": "2026-01-01T00:00:00+00:00",
    "host": "somewhere",
    "execution": {"output": "/some/where"},
    "seconds": {"encode": 1.5},
}


def changed(**changes: Any) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(MANIFEST))
    return copy | changes


def rows(text: str) -> list[list[str]]:
    """Cells of all table rows."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_it_says_what_the_manifest_says() -> None:
    text = render_card(MANIFEST)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["size_categories"] == ["10K<n<100K"]
    assert front["pretty_name"] == "Token shards: books, letters \\| notes"
    table = rows(text)
    for row in (
        ["digest", f"`{MANIFEST['digest']}`"],
        ["seed", "17"],
        ["train", "9,000", "900,000", "4,050,000", "4.500", "3"],
        ["valid", "1,000", "100,000", "450,000", "4.500", "1"],
        ["books", "2", "1,000", "10,000", "1,000,000", "4,500,000", "4.500"],
        ["letters \\| notes", "1", "50", "unknown", "unknown", "unknown", "unknown"],
        ["too_short", "5", "0", "5"],
        ["near_duplicate", "2", "2", "4"],
        ["id of mask", "none"],
    ):
        assert row in table, row
    assert "(2 hashes), which the digest covers. 1 could not be read" in text
    assert "Dropped: 9 documents, 0.09% of those read." in text
    steps = [line.split(":")[0] for line in text.splitlines() if line.startswith("- `")]
    assert steps == ["- `on_bad_row", "- `unicode", "- `min_characters", "- `near_duplicates"]
    assert "`near_duplicates: {ngram: 5, permutations: 128, threshold: 0.8}`" in text


@pytest.mark.parametrize(
    ("documents", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**9, "1B<n<10B"), (10**12, "n>1T"), (10**15, "n>1T")],
)
def test_size_categories_of_the_hub(documents: int, category: str) -> None:
    entry = {"documents": documents, "tokens": 1, "utf8_bytes": 1, "shards": []}
    assert f"- {category}\n" in render_card(changed(splits={"train": entry}))


def test_clocks_and_hosts_change_nothing() -> None:
    other = changed(created="2030-01-01", host="elsewhere", execution={"output": "/else"}, seconds={})
    assert render_card(other) == render_card(MANIFEST)
    for word in ("somewhere", "/some/where", "2026"):
        assert word not in render_card(MANIFEST)


def test_a_dataset_that_was_adopted() -> None:
    adopted = changed(
        content={"adopted": {"eos_id": 1, "append_eos": True}, "tokenizer": {}},
        sources=[{"source": "megatron", "name": "a.bin", "size": 4, "sha256": "e" * 64}],
        splits={"train": {"documents": 1, "tokens": 2, "shards": [{}]}},
    )
    text = render_card(adopted)
    assert ["train", "1", "2", "unknown", "unknown", "1"] in rows(text)
    assert "adopted by `python -m pipeline.adopt` with `eos_id: 1`, `append_eos: true`" in text
    assert "does not record how the text was cleaned" in text
    assert "pipeline.prepare" not in text


def test_front_matter_can_be_left_out() -> None:
    assert render_card(MANIFEST, front_matter=False) == render_card(MANIFEST).split("---\n\n", 1)[1]


def test_it_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_card(tmp_path, MANIFEST)
    before = (tmp_path / CARD).read_text()
    assert before == render_card(MANIFEST)
    with monkeypatch.context() as patch:
        patch.setattr(card, "render_card", lambda manifest: "\ud800")  # cannot be encoded
        with pytest.raises(UnicodeEncodeError):
            write_card(tmp_path, MANIFEST)
    assert (tmp_path / CARD).read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == [CARD]


def test_the_hash_of_a_function_is_shown_and_no_part_of_the_configuration() -> None:
    manifest = changed()
    manifest["content"]["clean"] |= {"function": "own.module:tidy", "function_sha256": "f" * 64}
    assert f"- `function_sha256: {'f' * 64}`" in render_card(manifest)
    clean = PrepareConfig.model_validate(yaml.safe_load(config_yaml(manifest))).content.clean
    assert (clean.function, clean.min_characters) == ("own.module:tidy", 200)


def test_its_configuration_makes_the_dataset_again(
    make_config: Callable[..., PrepareConfig], corpus: Path, bpe: str, tmp_path: Path, ray_address: str
) -> None:
    first = prepare(make_config("first", clean={"unicode": "NFC"}))
    block = re.search(r"```yaml\n(.*?)```", render_card(first), re.DOTALL)
    assert block is not None
    assert block[1] == config_yaml(first)
    values = yaml.safe_load(block[1])
    assert values["content"]["tokenizer"] == {"path": "tokenizer.model"}
    for source in values["content"]["sources"]:
        assert source["path"] == "PATH"
        source["path"] = str(corpus)
    values["content"]["tokenizer"]["path"] = str(tmp_path / "first" / "tokenizer.model")
    values["execution"]["output"] = str(tmp_path / "second")
    assert prepare(PrepareConfig.model_validate(values))["digest"] == first["digest"]
