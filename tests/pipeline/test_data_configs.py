"""The shipped data configurations, on local files of the same layout and fields."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from pipeline.config import Content, PrepareConfig
from pipeline.locations import Document
from pipeline.sources import cut_units, list_files, read_piece, survey
from pipeline.strict_yaml import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "data"

FIELDS: dict[str, dict[str, Any]] = {
    "wiki40b-en": {"wikidata_id": "Q1", "text": "_START_ARTICLE_\nA", "version_id": "1"},
    "pg19": {"short_book_title": "T", "publication_date": 1900, "url": "http://a/1", "text": "A book"},
    "c4": {"text": "A page", "timestamp": "2019-04-25T12:57:54Z", "url": "http://a/2"},
}


def write_parquet(file: Path, row: dict[str, Any]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([row]), file)


def write_jsonl(file: Path, row: dict[str, Any]) -> None:
    file.write_bytes(gzip.compress(json.dumps(row).encode() + b"\n"))


LAYOUTS: dict[str, tuple[str, str, Callable[[Path, dict[str, Any]], None]]] = {
    "wiki40b-en": ("en", "en/train-00000-of-00019.parquet", write_parquet),
    "pg19": ("default", "data/train-00000-of-00023.parquet", write_parquet),
    "c4": ("en", "en/c4-train.00000-of-01024.json.gz", write_jsonl),
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_valid(path: Path) -> None:
    load_config(PrepareConfig, path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_hub_configurations_read_files_of_their_schema(tmp_path: Path, name: str) -> None:
    config_name, file, write = LAYOUTS[name]
    (tmp_path / file).parent.mkdir(parents=True)
    write(tmp_path / file, FIELDS[name])
    (tmp_path / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config_name}\n  data_files:\n  - split: train\n    path: {file}\n---\n"
    )
    overrides = [f"content.sources.0.path={tmp_path}", "content.sources.0.revision=null"]
    content: Content = load_config(PrepareConfig, CONFIGS / f"{name}.yaml", overrides).content
    files = list_files(content)
    assert [found.name for found in files] == [file]
    pieces = [piece for unit in cut_units([survey(content, found) for found in files], content) for piece in unit]
    documents = [item for piece in pieces for item in read_piece(content, piece)]
    source = content.sources[0]
    assert source.type == "hub"
    identifier = FIELDS[name][source.id_field or ""]
    assert documents == [Document(f"{source.name}:{identifier}", FIELDS[name]["text"].encode())]
