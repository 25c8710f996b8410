"""A repository of the hub, as a local directory: where its files are read from makes no difference."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from pipeline.config import Content, PrepareConfig
from pipeline.errors import UserError
from pipeline.prepare import prepare
from pipeline.sources import list_files

MakeConfig = Callable[..., PrepareConfig]


@pytest.fixture
def repository(tmp_path: Path, texts: list[str]) -> Path:
    folder = tmp_path / "repository"
    (folder / "en").mkdir(parents=True)
    (folder / "de").mkdir()
    for number in range(2):
        rows = [{"text": text} for text in texts[number::2]]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "en" / f"train-{number}.parquet")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "de" / "train.json.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/train-*.parquet\n"
        "- config_name: de\n  data_files:\n  - split: train\n    path: de/*.json.gz\n---\n"
    )
    return folder


@pytest.mark.usefixtures("ray_address")
@pytest.mark.parametrize("name", ["en", "de"])
def test_the_digest_is_the_same_downloaded_or_not_and_wherever_it_lies(
    make_config: MakeConfig, repository: Path, tmp_path: Path, name: str
) -> None:
    elsewhere = shutil.copytree(repository, tmp_path / "elsewhere" / "copy")
    digests = set()
    for number, (path, download) in enumerate([(repository, False), (repository, True), (elsewhere, False)]):
        source = {"type": "hub", "path": str(path), "config": name, "download": download}
        digests.add(prepare(make_config(f"data{number}", sources=[source]))["digest"])
    assert len(digests) == 1


def test_a_repository_that_is_a_script_is_refused_with_advice(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text("x = 1\n")
    content = Content.model_validate({"sources": [{"type": "hub", "path": str(script)}], "tokenizer": {"path": "x"}})
    with pytest.raises(UserError, match=r"content\.sources\.0\.path: .*script.*refs/convert/parquet"):
        list_files(content)
