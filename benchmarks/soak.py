"""A run that is hurt again and again, and what is left of it: `python -m benchmarks.soak --kind same --minutes 30`.

A small model is trained by the real `deepspeed` launcher under `launch.supervise`, with an MLflow server. At random
moments (of a seed) its processes are killed, told to stop or stopped, the server dies, the disk is full, a checkpoint
is damaged. What ended the run for good is mended and the same command started again, as a person would. Then an
undisturbed run does as many steps, and the two are compared.

same      two processes throughout: numbers, weights and moments are the same bit for bit
changing  1, 2 or 4 processes and ZeRO stage 0 to 3, others at each start, fp32: losses within 1e-3

Exit status 1 if anything does not hold. Linux; root, or user namespaces, for a small disk to fill.
"""

import argparse
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.machine import describe_machine
from benchmarks.mlflow_server import MLflowServer
from benchmarks.report import markdown_table, number, write_results
from benchmarks.soak_checks import Record, Verdict, exact_samples, exact_store, noticed, same_numbers, same_weights
from benchmarks.soak_faults import FAULTS, LAST, Fault, Moment, Scene, draw_faults
from benchmarks.soak_job import TOKENS_PER_STEP, Disk, Run, marked, prepare_data, replay, write_config
from pipeline.errors import UserError, run_command

Kind = Literal["same", "changing"]

SAMPLES_PER_STEP = 8
TOLERANCE: dict[Kind, float] = {"same": 0.0, "changing": 1e-3}
SHAPES = [(processes, stage) for processes in (1, 2, 4) for stage in (0, 1, 2, 3)]
UNDISTURBED: dict[Kind, tuple[int, int]] = {"same": (2, 2), "changing": (1, 0)}
"""Processes and ZeRO stage of the undisturbed run; of the other one, too, where they stay the same."""
SHARE = 0.8
"""Of the time, for faults; the rest is for the end and the undisturbed run."""
STARTING_SECONDS, SAVING_SECONDS = 9.0, 0.3
"""How long after the start, or the beginning of a checkpoint, a fault comes at most."""
AGAIN_SECONDS, NEVER_SECONDS = 2.0, 3600.0
"""When the supervisor starts the run again; where its shape changes, the soak does before that."""
STEPS_TO_GO = 25
STUCK_SECONDS, SENDER_SECONDS, RUN_SECONDS = 240.0, 90.0, 3600.0
NAMESPACE = "FLASH_SOAK_NAMESPACE"


class Soak:
    """One soak: a run, what happens to it, and what is found."""

    def __init__(
        self,
        kind: Kind,
        folder: Path,
        *,
        seed: int,
        data: Path,
        with_server: bool,
        pause: float,
        results: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        self.kind, self.chance = kind, random.Random(seed)
        self.events: list[dict[str, Any]] = []
        self.orphans: list[str] = []
        self.unexpected: list[str] = []
        self.began = time.monotonic()
        self._folder, self._pause, self._results = folder, pause, results
        self._pending: list[dict[str, Any]] = []
        self._damaged: list[str] = []
        self._shapes: list[tuple[int, int]] = []
        self._shape = UNDISTURBED[kind]
        self._ends_seen, self._exit_seen = 0, False
        self._mark = uuid.uuid4().hex
        self._disk = Disk(folder / "disk")
        self._server = MLflowServer(folder) if with_server else None
        store = self._server.uri if self._server else f"sqlite:///{folder / 'mlflow.db'}"
        config = write_config(folder / "run.yaml", data, {"uri": store, "enabled": with_server})
        (folder / "logs").mkdir()
        self._run = Run(config, folder / "disk/run", folder / "logs", self._mark)
        self._undisturbed = Run(config, folder / "disk/undisturbed", folder / "logs", self._mark)
        self._scene = Scene(self._run, self._server, self._disk, self.chance)

    @property
    def starts(self) -> int:
        """How often the run was started, by the supervisor too."""
        return 1 + sum(len(event["statuses"]) for event in self.events)

    def close(self, kept: Path | None) -> None:
        """End everything that it has started, and copy what is on the small disk to `kept`."""
        for process in self._run.processes():
            process.kill()
        if self._server:
            self._server.wait()
            self._server.kill()
        self._disk.make_room()
        if kept:
            shutil.copytree(self._folder / "disk", kept)
        self._disk.close()

    def hurt(self, names: Sequence[str], minutes: float) -> None:
        """Start the run and let faults come: those named, or drawn while there is time; the last is `LAST`."""
        if self._server:
            self._server.start()
        self._start()
        for name in names:
            self._endure(FAULTS[name])
        drawn: list[Fault] = []
        while not names and time.monotonic() - self.began < 60 * minutes * SHARE:
            drawn = drawn or draw_faults(self.chance, server=self._server is not None)
            self._endure(drawn.pop())
        if self._server:
            self._server.wait()
        self._endure(FAULTS[LAST], last=True)

    def finish(self) -> int:
        """Let the run come to its end, then an undisturbed one; returns their number of steps."""
        steps = self._run.metrics.read().step + STEPS_TO_GO
        self._start(f"train.tokens={steps * TOKENS_PER_STEP}")
        self._recover()
        self._run_out(self._run)
        self._wait(lambda: not self._run.processes(), "the end of all processes", SENDER_SECONDS)
        # Nothing is left to be sent, or, without a server, everything: neither may double a point.
        if replay(self._run.directory, self._mark) != 0:
            raise UserError(f"python -m launch.replay {self._run.directory} failed")
        processes, stage = UNDISTURBED[self.kind]
        overrides = [f"train.zero_stage={stage}", f"train.tokens={steps * TOKENS_PER_STEP}", "tracking.enabled=false"]
        self._undisturbed.start(processes, overrides, wait=NEVER_SECONDS)
        self._run_out(self._undisturbed)
        return steps

    def judge(self, steps: int) -> list[Verdict]:
        """Compare the two, and look for what must not be."""
        run, reference = (Record(each.directory) for each in (self._run, self._undisturbed))
        logs = "".join(path.read_text(errors="replace") for path in sorted((self._folder / "logs").iterdir()))
        return [
            same_numbers(run, reference, TOLERANCE[self.kind]),
            same_weights(self._run.directory, self._undisturbed.directory, exact=self.kind == "same"),
            exact_samples(run, steps, SAMPLES_PER_STEP),
            exact_store(run, self._folder / "mlflow.db"),
            noticed(self._damaged, logs),
            Verdict("no orphans", not self.orphans, "; ".join(self.orphans) or "none"),
            Verdict("no other ends", not self.unexpected, "; ".join(self.unexpected) or "none"),
        ]

    def _start(self, *overrides: str) -> None:
        if self.kind == "changing":
            self._shapes = self._shapes or self.chance.sample(SHAPES, len(SHAPES))
            self._shape = self._shapes.pop()
        processes, stage = self._shape
        self._ends_seen, self._exit_seen = 0, False
        wait = AGAIN_SECONDS if self.kind == "same" else NEVER_SECONDS
        self._run.start(processes, [f"train.zero_stage={stage}", *overrides], wait=wait)

    def _endure(self, fault: Fault, *, last: bool = False) -> None:
        moment = "training" if last else self.chance.choice(fault.moments)
        if moment == "starting":
            latest = self._run.started + STARTING_SECONDS
            time.sleep(self.chance.uniform(0, max(latest - time.monotonic(), 0)))
        else:
            self._recover()
            self._choose_moment(fault, moment)
        if self._shape[0] < fault.processes:
            return
        event = self._event(fault.name, moment)
        self.events.append(event)
        event["done"] = fault.strike(self._scene)
        self._results(self.events)
        if fault.spoils_newest:
            self._damaged.append(event["done"].partition("/")[0])
        if not fault.ends_run:
            self._report(event)
            return
        self._pending.append(event)
        self._wait(lambda: self._ended(event), "the end of the run")
        if fault.name == "full disk":
            time.sleep(self.chance.uniform(0, self._pause))
            self._disk.make_room()
        event["attempt"] = self._run.metrics.read().attempt
        if not last:
            self._tend()

    def _event(self, fault: str, moment: str) -> dict[str, Any]:
        processes, stage = self._shape
        now = time.monotonic()
        return {
            "minutes": (now - self.began) / 60,
            "fault": fault,
            "done": "",
            "moment": moment,
            "processes": processes,
            "stage": stage,
            "step": self._run.metrics.read().step,
            "statuses": [],
            "seconds": None,
            "attempt": self._run.metrics.attempt,
            "at": now,
        }

    def _choose_moment(self, fault: Fault, moment: Moment) -> None:
        since = time.time()
        time.sleep(self.chance.uniform(0, self._pause))
        if fault.spoils_newest:
            # The run cannot go on without any: the one before it must be there.
            self._wait(lambda: len(self._run.checkpoints()) > 1 and self._newest_written() > since, "a new checkpoint")
        if moment == "saving":
            self._wait(self._run.saving, "a checkpoint being written", pause=0.005)
            time.sleep(self.chance.uniform(0, SAVING_SECONDS))

    def _newest_written(self) -> float:
        manifests = [path / "manifest.json" for path in self._run.checkpoints()[-1:]]
        return max((path.stat().st_mtime for path in manifests if path.exists()), default=0.0)

    def _recover(self) -> None:
        """Wait until the run has done a step since it last ended."""
        last = max((event["attempt"] for event in self._pending), default=-1)

        def stepping() -> bool:
            self._tend()
            return self._run.metrics.read().attempt > last

        self._wait(stepping, "the first step after a fault")
        now = time.monotonic()
        for event in self._pending:
            event["seconds"] = now - event["at"]
            self._report(event)
        self._pending = []

    def _tend(self) -> None:
        """Start the run again if it ended for good; an end that no fault explains is held against it."""
        if self._pending:
            self._ended(self._pending[-1])
        else:
            event = self._event("none", "training")
            if self._ended(event):
                self.events.append(event)
                self._pending.append(event)
                self.unexpected.append(f"status {event['statuses']} at step {event['step']}, {self._run.log.name}")
        if self._run.status is not None:
            self._start()

    def _ended(self, event: dict[str, Any]) -> bool:
        """Whether the run has ended, for good or to be started again; what is left of it then is an orphan."""
        said = re.findall(r"supervisor: the run ended with status (\d+)", self._run.log.read_text(errors="replace"))
        new = [int(status) for status in said[self._ends_seen :]]
        self._ends_seen = len(said)
        if new:
            self._run.started = time.monotonic()
            if self.kind == "changing" and self._run.status is None:
                self._run.stop_supervisor()
                self._exit_seen = True
        if self._run.status is not None and not self._exit_seen:
            new.append(self._run.status)
            self._exit_seen = True
        event["statuses"] += new
        if new:
            self._look_for_orphans(event)
        return bool(new)

    def _look_for_orphans(self, event: Mapping[str, Any]) -> None:
        """No process is left but the supervisor, and senders and samplers, which end in their own time."""
        now, deadline = time.time(), time.monotonic() + 1
        while True:
            over = {"sender", "sampler"} | ({"supervisor"} if self._run.status is None else set())
            left = [
                f"{kind} {process.pid} after {event['fault']}"
                for process, kind in marked(self._mark).items()
                if kind not in over and process.create_time() < now
            ]
            if not left:
                return
            if time.monotonic() > deadline:
                self.orphans += left
                return

    def _report(self, event: Mapping[str, Any]) -> None:
        print(" · ".join(event_cells(event)), flush=True)
        self._results(self.events)

    def _run_out(self, run: Run) -> None:
        self._wait(lambda: run.status is not None, "the end of the last step", RUN_SECONDS)
        if run.status != 0 or not (run.directory / "DONE").exists():
            raise UserError(f"the run did not end well: status {run.status}; see {run.log}")

    def _wait(
        self, condition: Callable[[], Any], what: str, seconds: float = STUCK_SECONDS, *, pause: float = 0.1
    ) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise UserError(f"stuck: no sign of {what} within {seconds:.0f} s; see {self._run.log}")
            time.sleep(pause)


def event_cells(event: Mapping[str, Any]) -> list[str]:
    """An event as a row of the table."""
    statuses = ", ".join(map(str, event["statuses"]))
    return [
        f"{event['minutes']:.1f}",
        f"{event['fault']} ({event['done']})",
        event["moment"],
        f"{event['processes']} / {event['stage']}",
        f"{event['step']:,}",
        statuses or "–",
        number(event["seconds"], ".0f"),
    ]


def soak_report(document: Mapping[str, Any]) -> str:
    """Return the tables of a `benchmarks.soak` document."""
    header = ["minute", "fault", "moment", "processes / stage", "step", "exit status", "seconds to a new step"]
    faults = markdown_table(header, [event_cells(event) for event in document["events"]])
    cells = [[v["name"], "holds" if v["passed"] else "FAILS", v["found"]] for v in document["verdicts"]]
    figures, machine = document["figures"], document["machine"]
    parts = [
        f"Soak, {document['kind']}, seed {document['seed']}: {figures['faults']} faults, {figures['minutes']:.0f} min",
        f"{machine['device']}; torch {machine['torch']}; {machine['date']}, commit {machine['commit'] or 'unknown'}",
        faults,
        markdown_table(["verdict", "", "found"], cells),
        f"{figures['steps']:,} steps, {figures['starts']} starts; back after {figures['seconds_median']:.0f} s "
        f"(median), {figures['seconds_max']:.0f} s at most",
    ]
    return "\n\n".join(parts)


def figures_of(events: Sequence[Mapping[str, Any]], steps: int, starts: int, minutes: float) -> dict[str, Any]:
    """The soak in a few numbers."""
    seconds = [event["seconds"] for event in events if event["seconds"] is not None]
    return {
        "faults": sum(event["fault"] != "none" for event in events),
        "steps": steps,
        "starts": starts,
        "minutes": minutes,
        "seconds_median": statistics.median(seconds),
        "seconds_max": max(seconds),
    }


def enter_namespace() -> None:
    """Go on in a mount namespace of this process's own, so that the small disk goes when it ends, however it ends."""
    if os.environ.get(NAMESPACE) == "1":
        return
    os.environ[NAMESPACE] = "1"
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *as_root, "--mount", sys.executable, "-m", "benchmarks.soak", *sys.argv[1:]]
    os.execvp(command[0], command)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=["same", "changing"], default="same")
    parser.add_argument("--minutes", type=float, default=30, help="all in all, about; default 30")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and their moments")
    parser.add_argument("--faults", nargs="+", default=[], choices=FAULTS, help="these, in this order, not random ones")
    parser.add_argument(
        "--pause", type=float, default=12, metavar="SECONDS", help="of training before a fault, at most; default 12"
    )
    parser.add_argument("--data", type=Path, help="a prepared dataset; default: made-up text is prepared")
    parser.add_argument("--no-server", action="store_true", help="MLflow is sent the record at the end, into a file")
    parser.add_argument(
        "--folder", type=Path, help="keep all logs there; default: a temporary one, kept after a failure"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    arguments = parser.parse_args()
    enter_namespace()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder: Path = arguments.folder.absolute() if arguments.folder else Path(tempfile.mkdtemp(prefix="soak-"))
    if arguments.folder:
        folder.mkdir(parents=True)
    document: dict[str, Any] = {"benchmark": "soak", "kind": arguments.kind, "seed": arguments.seed}
    document |= {"machine": describe_machine(torch.device("cpu")), "events": [], "verdicts": [], "figures": {}}

    def note(events: list[dict[str, Any]]) -> None:
        document["events"] = events
        if arguments.json:
            write_results(arguments.json, document)

    soak = Soak(
        arguments.kind,
        folder,
        seed=arguments.seed,
        data=arguments.data.absolute() if arguments.data else prepare_data(folder),
        with_server=not arguments.no_server,
        pause=arguments.pause,
        results=note,
    )
    passed = False
    try:
        soak.hurt(arguments.faults, arguments.minutes)
        steps = soak.finish()
        verdicts = soak.judge(steps)
        minutes = (time.monotonic() - soak.began) / 60
        document["verdicts"] = [asdict(verdict) for verdict in verdicts]
        document["figures"] = figures_of(soak.events, steps, soak.starts, minutes)
        note(soak.events)
        print("\n" + soak_report(document))
        passed = all(verdict.passed for verdict in verdicts)
    finally:
        remove = passed and not arguments.folder
        soak.close(None if remove else folder / "kept")
        if remove:
            shutil.rmtree(folder)
        else:
            print(f"logs and runs: {folder}", file=sys.stderr)
    return int(not passed)


if __name__ == "__main__":
    run_command(main)
