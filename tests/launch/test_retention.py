"""Which checkpoints stay, and that deleting the others can be cut short anywhere."""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.config import load_run_config
from launch.operation_config import CheckpointSection
from launch.retention import Saved, kept, list_checkpoints, remove, remove_leftovers
from launch.run_directory import RunDirectory
from pipeline.errors import UserError


def steps_kept(steps: dict[int, float | None], **rules: Any) -> list[int]:
    saved = [
        Saved(Path(str(step)), step, {} if loss is None else {"valid/loss": loss, "other/loss": -loss})
        for step, loss in steps.items()
    ]
    return sorted(int(path.name) for path in kept(saved, CheckpointSection(**rules)))


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"keep": 1}, [90]),
        ({"keep": 3}, [70, 80, 90]),
        ({"keep": 99}, [5, 10, 20, 30, 40, 50, 60, 70, 80, 90]),
        ({"keep": 1, "keep_every_steps": 30}, [30, 60, 90]),
        ({"keep": 1, "keep_every_steps": 25}, [30, 50, 80, 90]),  # the first at or after 25, 50 and 75
        ({"keep": 1, "keep_every_steps": 100}, [90]),
        ({"keep": 1, "keep_best": "valid"}, [40, 90]),
        ({"keep": 2, "keep_best": "other", "keep_every_steps": 40}, [10, 40, 80, 90]),
    ],
)
def test_rules(rules: dict[str, Any], expected: list[int]) -> None:
    losses = {5: math.nan, 10: 5.0, 20: 3.0, 30: None, 40: 1.0, 50: 1.0, 60: 2.0, 70: None, 80: 1.5, 90: 4.0}
    assert steps_kept(losses, **rules) == expected


def test_what_was_kept_stays_kept_as_the_run_goes_on() -> None:
    """Deleting by the rules after each of many checkpoints leaves what deleting once at the end would."""
    losses = {step: float((step * 7919) % 101) for step in range(7, 1000, 7)}
    rules = {"keep": 2, "keep_every_steps": 100, "keep_best": "valid"}
    here: dict[int, float | None] = {}
    for step, loss in losses.items():
        here = {s: losses[s] for s in steps_kept({**here, step: loss}, **rules)}
    assert list(here) == steps_kept(dict(losses), **rules)
    assert {105, 203, 301, 406, 504, 602, 700, 805, 903} <= here.keys()


def fill(checkpoint: Path) -> None:
    (checkpoint / "deepspeed").mkdir(parents=True)
    for name in ("manifest.json", "deepspeed/one.pt", "deepspeed/two.pt"):
        (checkpoint / name).write_text(name)


@pytest.mark.parametrize("survived", range(5))
def test_a_crash_while_deleting_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    """The process dies before the first, second, … of the calls that change the disk."""
    fill(tmp_path / "step-00000001")
    fill(tmp_path / "step-00000002")
    calls = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > survived:
                raise KeyboardInterrupt
            return real(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rmdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            remove(tmp_path / "step-00000001")
    for checkpoint in list_checkpoints(tmp_path):
        assert len([path for path in checkpoint.rglob("*") if path.is_file()]) == 3
    assert tmp_path / "step-00000002" in list_checkpoints(tmp_path)
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == (2 if survived == 0 else 1)
    if survived == 0:
        shutil.copytree(tmp_path / "step-00000001", tmp_path / ".deleting-step-00000001")
        remove(tmp_path / "step-00000001")
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_half_a_checkpoint_that_filled_the_disk_makes_room_for_the_next_start(
    write_config: Callable[..., Path], write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    config = load_run_config(write_config(run={"dir": str(tmp_path / "run")}))
    directory = RunDirectory(config.run.dir)
    whole = write_checkpoint(directory.checkpoints, 1)
    shutil.copytree(whole, directory.checkpoints / ".writing-step-00000002")
    directory.open(config, {})
    assert list(directory.checkpoints.iterdir()) == [whole]
    with pytest.raises(UserError, match="in use by another trainer"):
        RunDirectory(config.run.dir).open(config, {})
    directory.close()


@pytest.mark.parametrize(
    ("checkpoint", "evaluate", "expected"),
    [
        ({"keep_best": "valid"}, {}, None),
        ({"keep_best": "valid", "every_tokens": 2048}, {"every_tokens": 1024}, None),
        ({"keep_best": "test"}, {}, "checkpoint.keep_best: 'test' is no set of data.validation (valid)"),
        ({"keep_best": "valid", "every_tokens": 2048}, {}, "a multiple of evaluate.every_tokens (not set)"),
        ({"keep_best": "valid", "every_tokens": 512}, {"every_tokens": 1024}, "make checkpoint.every_tokens (512) a"),
        ({"keep_every_steps": 0}, {}, "checkpoint.keep_every_steps"),
    ],
)
def test_config(
    write_config: Callable[..., Path], checkpoint: dict[str, Any], evaluate: dict[str, Any], expected: str | None
) -> None:
    path = write_config(checkpoint=checkpoint, evaluate=evaluate, data={"validation": {"valid": {"path": "nowhere"}}})
    if expected is None:
        load_run_config(path)
        return
    with pytest.raises(UserError) as caught:
        load_run_config(path)
    assert expected in str(caught.value)
