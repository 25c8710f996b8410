"""Nodes that would train different things, or cannot write into one directory, are found before the run begins."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from launch import agreement
from launch.agreement import check_same, check_shared
from launch.config import RunConfig, load_run_config
from launch.engine import Processes
from launch.run_directory import RunDirectory
from launch.trainer import _choose_start, open_datasets
from pipeline.errors import UserError

T = TypeVar("T")


class OneOfTwo(Processes):
    """One of two processes: the first one's words are kept for the second one, what the second one says is heard."""

    def __init__(self, rank: int, words: list[Any]) -> None:
        super().__init__(rank, 2, torch.device("cpu"), None)
        self.words: list[Any]
        object.__setattr__(self, "words", words)

    def once(self, action: Callable[[], T]) -> T:
        if self.rank == 0:
            self.words.append(action())
            return self.words[-1]
        return self.words.pop(0)

    def gather(self, value: T) -> list[T]:
        return [value]


@pytest.fixture
def config(write_config: Callable[..., Path], prepared_data: Path, tmp_path: Path) -> RunConfig:
    data = {"path": str(prepared_data), "validation": {"valid": {"path": str(prepared_data)}}}
    return load_run_config(write_config(run={"dir": str(tmp_path / "new/run")}, data=data))


def agree(first: RunConfig, second: RunConfig, change: Callable[[Any], None] = lambda data: None) -> None:
    words: list[Any] = []
    check_same(first, *open_datasets(first), OneOfTwo(0, words))
    training, validation = open_datasets(second)
    change(training)
    check_same(second, training, validation, OneOfTwo(1, words))


def test_settings_and_data_are_compared_and_places_of_data_are_not(config: RunConfig, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.symlink_to(config.data.components[0].path)
    validation = {name: ref.model_copy(update={"path": copy}) for name, ref in config.data.validation.items()}
    elsewhere = config.model_copy(
        update={"data": config.data.model_copy(update={"path": copy, "validation": validation})}
    )
    agree(config, elsewhere)
    faster = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": 0.5})})
    with pytest.raises(
        UserError, match=r"agree; .*\n  optimizer\.lr: 0\.5 on .+ \(rank 1\), 0\.0007 on .+ \(rank 0\)$"
    ):
        agree(config, faster)
    with pytest.raises(UserError, match=r"the digest of what is trained on: other on .+ \(rank 1\), "):
        agree(config, config, lambda training: setattr(training, "digest", "other"))


def test_a_run_directory_that_a_node_does_not_share_is_refused_and_not_left_behind(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = config.run.dir
    words: list[Any] = []
    check_shared(run_dir, OneOfTwo(0, words))
    assert list(run_dir.iterdir()) == []
    monkeypatch.setattr(agreement, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(
        UserError, match=r"run\.dir: .*run is not the same directory on all nodes: .+ \(rank 1\) cannot"
    ):
        check_shared(run_dir, OneOfTwo(1, words))
    monkeypatch.setattr(agreement, "_appears", lambda mark: False)
    with pytest.raises(UserError):
        check_shared(run_dir, OneOfTwo(0, []))
    assert not run_dir.exists()


def test_a_node_that_lacks_the_run_to_be_continued_is_named_and_not_the_checkpoints(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot read its share of their files: all would be passed over, and the advice is to delete the directory."""
    directory = RunDirectory(config.run.dir)
    directory.open(config, {})
    directory.close()
    monkeypatch.setattr(agreement, "_appears", lambda mark: False)
    again = config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})
    with pytest.raises(UserError, match="is not the same directory on all nodes"):
        _choose_start(again, RunDirectory(config.run.dir), open_datasets(config)[0], OneOfTwo(0, []))
    assert directory.exists
    assert not list(config.run.dir.glob(".mark-*"))


def test_what_a_node_may_not_look_into_it_does_not_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stat(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(agreement, "PATIENCE_SECONDS", 0.0)
    second = OneOfTwo(1, [tmp_path / "mark", None])
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        with pytest.raises(UserError, match="is not the same directory on all nodes"):
            check_shared(tmp_path, second)
