"""Whom a job that hangs waits for."""

from launch.watchdog import Report, culprits

NOW = 1000.0


def report(rank: int, count: int, phase: str, *, age: float = 20.0, received: float = NOW) -> Report:
    return Report(rank, 100 + rank, "host", count, phase, age, limit=10.0, received=received)


def test_the_one_furthest_behind_is_waited_for() -> None:
    found = culprits([report(0, 8, "wait"), report(1, 7, "data"), report(2, 8, "wait")], NOW)
    assert [r.rank for r in found] == [1]


def test_the_one_that_does_not_report_is_waited_for_wherever_it_was() -> None:
    reports = [report(0, 8, "backward"), report(1, 8, "backward", age=0.5, received=NOW - 20)]
    assert [r.rank for r in culprits(reports, NOW)] == [1]
    assert reports[1].overdue(NOW)


def test_processes_at_the_same_place_are_named_together() -> None:
    assert [r.rank for r in culprits([report(0, 8, "step"), report(1, 8, "step")], NOW)] == [0, 1]


def test_without_a_limit_nothing_is_overdue() -> None:
    assert not Report(0, 1, "host", 3, "save", age=1e9, limit=None, received=NOW).overdue(NOW)
