"""Cards and pictures of a run's datasets: kept in its directory at once, and sent to MLflow when there is a server."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.config import RunConfig, load_run_config
from launch.datasets_used import dataset_facts, folder_names, keep_cards
from launch.replay import replay
from launch.run_directory import RunDirectory
from launch.tracking import Tracker, run_facts
from pipeline.shards import MANIFEST, TokenDataset


def open_run(config: RunConfig, used: dict[str, TokenDataset]) -> RunDirectory:
    directory = RunDirectory(config.run.dir)
    directory.open(config, run_facts(config, [dataset_facts(*use) for use in used.items()], world_size=1))
    return directory


def test_a_mixture_reaches_mlflow_dataset_by_dataset(
    prepared_data: Path, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """Two datasets of the same name; the server comes when one of them is gone."""
    from mlflow import MlflowClient

    other = tmp_path / "moved" / prepared_data.name
    shutil.copytree(prepared_data, other)
    manifest = json.loads((other / MANIFEST).read_text())
    manifest["splits"]["train"]["by_source"] = {"words": {"documents": 7, "tokens": 100, "utf8_bytes": 350}}
    manifest["splits"]["train"]["dropped"] = {"too_short": 3}
    manifest["digest"] = "f" * 64
    (other / MANIFEST).write_text(json.dumps(manifest))

    config = load_run_config(write_config(run={"dir": str(tmp_path / "run")}, tracking={"enabled": False}))
    used = {
        "training/a": TokenDataset.open(prepared_data, "train"),
        "training/b": TokenDataset.open(other, "train"),
        "valid": TokenDataset.open(prepared_data, "valid"),
    }
    directory = open_run(config, used)
    first, second = f"data-{used['valid'].digest[:8]}", "data-ffffffff"
    keep_cards(directory.data, json.loads(directory.facts.read_text())["datasets"])
    assert sorted(folder.name for folder in directory.data.iterdir()) == sorted([first, second])
    shutil.rmtree(other)

    Tracker(directory, config, attempt=0).close("FINISHED")
    assert replay(directory, follow=None) == 0
    state = json.loads(directory.tracking.read_text())
    client = MlflowClient(tracking_uri=state["uri"])
    inputs = client.get_run(state["run_id"]).inputs.dataset_inputs
    by_context = {found.tags[0].value: found.dataset for found in inputs}
    assert by_context.keys() == used.keys()
    assert by_context["training/b"].digest == "f" * 32
    profile = json.loads(by_context["training/b"].profile)
    assert profile["sources"] == {"words": {"documents": 7, "tokens": 100, "utf8_bytes": 350}}
    assert profile["dropped"] == {"too_short": 3}
    assert profile["tokens"] == used["training/b"].n_tokens
    assert json.loads(by_context["valid"].profile)["documents"] == used["valid"].n_documents
    for name in (first, second):
        sent = {artifact.path for artifact in client.list_artifacts(state["run_id"], f"data/{name}")}
        assert sent == {f"data/{name}/card.md", f"data/{name}/figure.png"}


def test_a_schema_that_mlflow_reads(prepared_data: Path) -> None:
    from mlflow.types import Schema

    from launch.datasets_used import dataset_entity

    entity = dataset_entity(dataset_facts("training", TokenDataset.open(prepared_data, "train")))
    columns = json.dumps(json.loads(entity.schema)["mlflow_colspec"])
    assert Schema.from_json(columns).input_names() == ["tokens"]


def test_cards_are_made_once_and_again_for_other_data(prepared_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared_data, data)
    facts = [dataset_facts("training", TokenDataset.open(data, "train"))]
    keep_cards(tmp_path / "run", facts)
    card, figure = tmp_path / "run/data/card.md", tmp_path / "run/data/figure.png"
    assert facts[0]["digest"] in card.read_text()
    before = card.stat().st_mtime_ns, figure.stat().st_mtime_ns
    keep_cards(tmp_path / "run", facts)
    assert (card.stat().st_mtime_ns, figure.stat().st_mtime_ns) == before

    manifest = json.loads((data / MANIFEST).read_text())
    (data / MANIFEST).write_text(json.dumps(manifest | {"digest": "e" * 64}))
    keep_cards(tmp_path / "run", facts)  # other data lies there now: what was recorded stays
    assert (card.stat().st_mtime_ns, figure.stat().st_mtime_ns) == before
    keep_cards(tmp_path / "run", [facts[0] | {"digest": "e" * 64}])
    assert "e" * 64 in card.read_text()
    assert figure.stat().st_mtime_ns != before[1]


def test_data_that_cannot_be_read_is_only_logged(
    prepared_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared_data, data)
    facts = [dataset_facts("training", TokenDataset.open(data, "train"))]
    next((data / "train").glob("*.bin")).write_bytes(b"")
    keep_cards(tmp_path / "run", facts)
    assert "no full card of the dataset" in caplog.text
    assert [file.name for file in (tmp_path / "run/data").iterdir()] == ["card.md"]


def test_folders_are_named_after_the_directories() -> None:
    facts = [
        {"digest": letter * 64, "path": path} for letter, path in (("a", "/x/c4"), ("b", "/y/c4"), ("c", "/z/pg 19#"))
    ]
    names = {"a" * 64: "c4-aaaaaaaa", "b" * 64: "c4-bbbbbbbb", "c" * 64: "pg_19_"}
    assert folder_names(facts) == names
    assert folder_names(facts[1:])["b" * 64] == "c4"
