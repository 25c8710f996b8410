"""What makes a step bad, and what counts for the budget."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.bad_steps import History, describe_ranges, find_fault, merge_ranges, robust_z, sample_ranges
from launch.engine import Processes
from launch.operation_config import BadStepsSection
from launch.rollback import carry_out, pass_over, plan_rollback, record_stop, set_aside, unrecorded
from launch.run_directory import RunDirectory
from pipeline.batches import DataState
from pipeline.errors import UserError

SETTINGS = BadStepsSection(budget=2, budget_steps=10, spike_threshold=5.0, spike_window=5)
STEADY = History(losses=(3.0, 3.1, 2.9, 3.05, 2.95))


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_what_is_no_number_is_bad(loss: float, norm: float) -> None:
    assert find_fault(History(), loss, norm, BadStepsSection()) is not None


def test_a_spike_is_far_above_the_median_of_a_full_window() -> None:
    assert robust_z(4.0, STEADY.losses) == pytest.approx(1.0 / (1.4826 * 0.05))
    assert "13.5 robust deviations above the median 3.0" in (find_fault(STEADY, 4.0, 1.0, SETTINGS) or "")
    assert find_fault(STEADY, 3.3, 1.0, SETTINGS) is None
    assert find_fault(STEADY, 0.1, 1.0, SETTINGS) is None, "better is not bad"
    assert find_fault(STEADY, 4.0, 1.0, BadStepsSection()) is None, "not asked for"
    assert find_fault(History(losses=STEADY.losses[1:]), 4.0, 1.0, SETTINGS) is None, "too few to compare with"
    assert find_fault(History(losses=(3.0,) * 5), 3.001, 1.0, SETTINGS) is None, "equal losses have no deviation"


def test_one_outlier_in_the_window_hides_no_other() -> None:
    assert find_fault(STEADY.learnt(50.0, SETTINGS), 50.0, 1.0, SETTINGS) is not None


def test_only_the_last_steps_count_for_the_budget() -> None:
    history = History().skip(1, range(8), SETTINGS).skip(9, range(64, 72), SETTINGS)
    assert [step for step, _ in history.skipped] == [1, 9]
    assert [step for step, _ in history.skip(11, range(80, 88), SETTINGS).skipped] == [9, 11]
    assert len(history.counted(10, SETTINGS)) == 2
    assert len(history.counted(11, SETTINGS)) == 1


def test_a_history_survives_json() -> None:
    history = STEADY.skip(4, [9, 8, 31], SETTINGS)
    assert History.from_dict(json.loads(json.dumps(history.to_dict()))) == history
    assert History.from_dict({}) == History()


def test_ranges() -> None:
    assert sample_ranges([5, 3, 4, 9]) == ((3, 6), (9, 10))
    assert merge_ranges([(9, 10), (3, 6), (5, 8), (8, 9)]) == ((3, 10),)
    assert describe_ranges(((3, 6), (9, 10))) == "3–5, 9"


@pytest.fixture
def stopped(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> RunDirectory:
    """A run that stopped over its budget, with checkpoints after 2, 4 and 6 steps of attempt 1."""
    directory = RunDirectory(tmp_path)
    for step in (2, 4, 6):
        write_checkpoint(directory.checkpoints, step, attempt=1)
    record_stop(directory, 1, History().skip(5, range(32, 40), SETTINGS).skip(7, range(48, 56), SETTINGS))
    return directory


def checkpoints(directory: RunDirectory) -> list[str]:
    return sorted(path.name for path in directory.checkpoints.iterdir())


def test_a_rollback_takes_the_newest_checkpoint_before_the_first_bad_step(
    stopped: RunDirectory, alone: Processes
) -> None:
    back = plan_rollback(stopped, alone)
    assert back is not None
    assert str(back) == "step-00000004, before the bad steps 5, 7; passing over samples 32–39, 48–55"
    shutil.rmtree(stopped.checkpoints / "step-00000004")
    (stopped.checkpoints / "step-00000002/manifest.json").write_text("{")
    later = plan_rollback(stopped, alone)
    assert later is not None
    assert later.step == 6, "with none before, the oldest"
    shutil.rmtree(stopped.checkpoints)
    with pytest.raises(UserError, match="nothing to go back to"):
        plan_rollback(stopped, alone)


@pytest.mark.parametrize("killed_at", ["written", "moved", "nowhere"])
def test_a_rollback_that_is_killed_is_finished_by_the_next_start(
    stopped: RunDirectory, alone: Processes, killed_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = plan_rollback(stopped, alone)
    reason = stopped.over_budget.read_text()
    if killed_at == "written":
        monkeypatch.setattr("launch.rollback.set_aside", lambda directory: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            carry_out(stopped, back)
    else:
        carry_out(stopped, back)
        if killed_at == "moved":
            stopped.over_budget.write_text(reason)
    set_aside(stopped)
    assert plan_rollback(stopped, alone) is None, "it is never done twice"
    assert checkpoints(stopped) == ["latest", "rolled-back", "step-00000002", "step-00000004"]
    assert (stopped.checkpoints / "latest").read_text() == "step-00000004\n"
    state = DataState(next_sample=32, skipped=((3, 5),), seed=1, digest="", seq_len=8)
    assert pass_over(stopped, state).skipped == ((3, 5), (32, 40), (48, 56))
    assert [entry["number"] for entry in unrecorded(stopped)] == [1]
    stopped.metrics.write_text(json.dumps({"rollback": unrecorded(stopped)[0]}) + "\n")
    assert unrecorded(stopped) == []


def test_what_the_run_saves_after_a_rollback_stays(
    stopped: RunDirectory, alone: Processes, write_checkpoint: Callable[..., Path]
) -> None:
    carry_out(stopped, plan_rollback(stopped, alone))
    write_checkpoint(stopped.checkpoints, 6, attempt=2)
    set_aside(stopped)
    assert "step-00000006" in checkpoints(stopped)
