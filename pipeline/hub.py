"""Datasets of the Hugging Face hub: which files a split has, at a pinned revision, as `datasets` resolves them."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.config import HubSource
from pipeline.errors import UserError
from pipeline.locations import SourceFile

_HUB_URL = re.compile(r"hf://datasets/(?P<repository>[^/]+/[^/@]+)@(?P<revision>[^/]+)/(?P<name>.+)")


def is_parquet(url: str) -> bool:
    """Whether a data file is parquet; the others are JSON lines."""
    return PurePosixPath(url).suffix == ".parquet"


def find_hub_files(source: int, config: HubSource) -> list[SourceFile]:
    """The data files of the split, named relative to the repository; with `download` they are fetched first.

    Raises:
        UserError: no such repository, configuration or split; a repository that is a script, or whose revision is not
            pinned; no network.
    """
    key = f"content.sources.{source}"
    local = Path(config.path).expanduser()
    if config.revision is None and not local.is_dir():
        raise UserError(
            f"{key}.revision: missing. {config.path} may change: name the commit to read (or refs/convert/parquet)"
        )
    builder = _builder(key, config, str(local) if local.is_dir() else config.path)
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in ("parquet", "json"):
        raise UserError(f"{key}.path: {config.path} holds {kind} files; parquet and JSON lines can be read")
    splits = builder.config.data_files or {}
    if config.split not in splits:
        raise UserError(f"{key}.split: {config.split!r} is no split of {config.path}; it has: {', '.join(splits)}")
    root = f"{local.absolute()}/"
    files = []
    for url in map(str, splits[config.split]):
        found = _HUB_URL.fullmatch(url)
        name = found["name"] if found else url.removeprefix("file://").removeprefix(root)
        files.append(SourceFile(source, name, _download(key, config, name) if found and config.download else url))
    return sorted(files, key=lambda file: file.name)


def _builder(key: str, config: HubSource, path: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset_builder(path, name=config.config, revision=config.revision)
    except ConnectionError as error:
        raise UserError(f"{key}.path: {config.path}: the hub cannot be reached: {error}") from None
    except ValueError as error:
        raise UserError(f"{key}.config: {config.config!r} of {config.path}: {error}") from None
    except RuntimeError as error:
        advice = "name a parquet copy of it, or revision: refs/convert/parquet"
        raise UserError(f"{key}.path: {config.path}: {error}; {advice}") from None
    except (FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{key}.path: {config.path} (revision {config.revision}): {error}") from None


def _download(key: str, config: HubSource, name: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(config.path, name, repo_type="dataset", revision=config.revision)
    except OSError as error:
        raise UserError(f"{key}.path: {config.path}/{name}: cannot be downloaded: {error}") from None
