"""The faults of a soak: what is done to a run, when, and what may follow."""

import contextlib
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from benchmarks.mlflow_server import MLflowServer
from benchmarks.soak_job import Disk, Run

Moment = Literal["training", "saving", "starting"]


@dataclass
class Scene:
    """What faults happen to."""

    run: Run
    server: MLflowServer | None
    disk: Disk
    chance: random.Random


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        strike: does it; returns what exactly was done.
        moments: when it can happen.
        ends_run: whether the run ends of it.
        spoils_newest: whether it needs a checkpoint that the running attempt has written.
        processes: how many the run must have: nothing notices that its only process is stopped.
    """

    name: str
    strike: Callable[[Scene], str]
    moments: tuple[Moment, ...] = ("training", "saving", "starting")
    ends_run: bool = True
    spoils_newest: bool = False
    processes: int = 1


_ABOVE = {"rank": ("rank", "launcher", "runner"), "launcher": ("launcher", "runner")}
"""In the first seconds of a start there may be nothing yet below the runner."""


def _signal(number: signal.Signals, wanted: str) -> Callable[[Scene], str]:
    def strike(scene: Scene) -> str:
        while True:
            for role in _ABOVE.get(wanted, (wanted,)):
                if found := sorted(scene.run.processes(role), key=lambda process: process.pid):
                    victim = scene.chance.choice(found)
                    _send(victim, number)
                    return f"pid {victim.pid}" if role == wanted else f"of which there was only the {role} yet"
            time.sleep(0.1)

    return strike


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _kill_everything(scene: Scene) -> str:
    victims = scene.run.processes()
    for process in victims:
        _send(process, signal.SIGKILL)
    return f"{len(victims)} processes"


def _kill_server(scene: Scene) -> str:
    assert scene.server is not None
    scene.server.wait()
    scene.server.kill()
    seconds = scene.chance.uniform(3, 40)
    scene.server.come_back(seconds)
    return f"started again after {seconds:.0f} s"


def _fill_disk(scene: Scene) -> str:
    free = scene.chance.randrange(1_600_000)
    scene.disk.fill(free)
    return f"{free / 1e6:.2f} MB left"


def _damage(how: Literal["truncated", "byte flipped", "manifest removed"]) -> Callable[[Scene], str]:
    def strike(scene: Scene) -> str:
        for process in scene.run.processes("rank"):
            _send(process, signal.SIGKILL)
        newest = scene.run.checkpoints()[-1]
        files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
        file = newest / "manifest.json" if how == "manifest removed" else scene.chance.choice(files)
        _spoil(file, how, scene.chance)
        return f"{newest.name}/{file.relative_to(newest)}"

    return strike


def _spoil(file: Path, how: str, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if how == "manifest removed":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: chance.randrange(len(content))])
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)


_RUNNING: tuple[Moment, ...] = ("training", "saving")

FAULTS = {
    fault.name: fault
    for fault in (
        Fault("SIGKILL rank", _signal(signal.SIGKILL, "rank")),
        Fault("SIGKILL launcher", _signal(signal.SIGKILL, "launcher")),
        Fault("SIGKILL runner", _signal(signal.SIGKILL, "runner")),
        Fault("SIGTERM rank", _signal(signal.SIGTERM, "rank")),
        Fault("SIGTERM launcher", _signal(signal.SIGTERM, "launcher")),
        Fault("SIGTERM runner", _signal(signal.SIGTERM, "runner")),
        Fault("SIGTERM supervisor", _signal(signal.SIGTERM, "supervisor")),
        Fault("SIGSTOP rank", _signal(signal.SIGSTOP, "rank"), _RUNNING, processes=2),
        Fault("machine gone", _kill_everything),
        Fault("full disk", _fill_disk, _RUNNING),
        Fault("checkpoint truncated", _damage("truncated"), _RUNNING, spoils_newest=True),
        Fault("checkpoint byte flipped", _damage("byte flipped"), _RUNNING, spoils_newest=True),
        Fault("checkpoint manifest removed", _damage("manifest removed"), _RUNNING, spoils_newest=True),
        Fault("MLflow server killed", _kill_server, ends_run=False),
        Fault("SIGKILL sender", _signal(signal.SIGKILL, "sender"), _RUNNING, ends_run=False),
    )
}
"""By name."""

LAST = "SIGTERM rank"
"""With it, while training, every soak ends: the start after it goes to the run's last step."""


def draw_faults(chance: random.Random, *, server: bool) -> "list[Fault]":
    """Every fault once, in random order."""
    faults = [fault for fault in FAULTS.values() if server or fault.name != "MLflow server killed"]
    return chance.sample(faults, len(faults))
