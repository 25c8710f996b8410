"""Runs several cases in one launch, since starting DeepSpeed costs more than training these models.

Started by the deepspeed launcher with a JSON file: a list of {"config", "overrides", "action"}. The action is
"train" (with "stop_after": steps after which a STOP file appears, and "spoil": what goes wrong in the last process in
the step that begins with a sample; with "out_of_memory", a rank, that process has too little for the engine, with "all"
they have in the mock step, and the error's text goes to "message"; with "slow_copy", a file, checkpoints are copied for
a while, and the file appears when they are), "gradients" (the first step's, to "output") or "resave" (load the only
checkpoint of the run "source", save it into the folder "output").
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402

from launch import trainer  # noqa: E402
from launch.backup import Backup  # noqa: E402
from launch.checkpoint import load_checkpoint, read_manifest  # noqa: E402
from launch.config import RunConfig, accumulation_steps, load_run_config  # noqa: E402
from launch.engine import Processes, build_engine, start_processes  # noqa: E402
from launch.evaluate import to_device  # noqa: E402
from launch.saving import CheckpointSaver  # noqa: E402
from launch.trainer import open_datasets, open_steps, open_stream, train  # noqa: E402
from pipeline.errors import USER_ERROR_EXIT, UserError  # noqa: E402
from pipeline.prefetch import Step, StepLoader  # noqa: E402


def main() -> int:
    spec = Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--")))
    processes = start_processes()
    statuses = []
    for case in json.loads(spec.read_text()):
        config = load_run_config(case["config"], case["overrides"])
        if case["action"] == "gradients":
            gradients(config, processes, Path(case["output"]))
            statuses.append(0)
            continue
        if case["action"] == "resave":
            resave(config, processes, Path(case["source"]), Path(case["output"]))
            statuses.append(0)
            continue
        if processes.rank == 0 and "stop_after" in case:
            threading.Thread(target=stop_after, args=(config.run.dir, case["stop_after"]), daemon=True).start()
        with (
            spoilt(case.get("spoil", {}), processes),
            out_of_memory(case.get("out_of_memory"), processes),
            slow_copy(case.get("slow_copy")),
        ):
            try:
                statuses.append(train(config, open_datasets(config), processes))
                assert "slow_copy" not in case or Path(case["slow_copy"]).exists(), "it left before the first one"
            except UserError as error:
                if processes.rank == 0:
                    Path(case["message"]).write_text(str(error))
                statuses.append(USER_ERROR_EXIT)
        assert "prefetch" not in [thread.name for thread in threading.enumerate()], "a thread outlived its run"
        assert "mlflow" not in sys.modules, "only a run's sender loads MLflow"
    if processes.rank == 0:
        spec.with_suffix(".statuses").write_text(json.dumps(statuses))
    processes.leave()
    return 0


@contextmanager
def slow_copy(done: str | None) -> Iterator[None]:
    """Let the copies that the end of a run waits for take a second."""
    close = Backup.close

    def close_slowly(backup: Backup, *, hurry: bool, give_up: Callable[[], bool]) -> str | None:
        for _ in range(5):
            time.sleep(0.2)
            assert not give_up()
        message = close(backup, hurry=hurry, give_up=give_up)
        Path(str(done)).touch()
        return message

    with mock.patch.object(Backup, "close", close_slowly) if done else nullcontext():
        yield


@contextmanager
def out_of_memory(whose: str | int | None, processes: Processes) -> Iterator[None]:
    """Let all processes run out of memory in the mock step, or one while engines are built."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 1 has …")

    fault: Any = nullcontext()
    if whose == "all":
        fault = mock.patch.object(trainer, "take_mock_step", fail)
    elif whose == processes.rank:
        fault = mock.patch.object(trainer, "build_engine", fail)
    with fault:
        yield


def stop_after(run_dir: Path, steps: int) -> None:
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"train/loss"') < steps:
        time.sleep(0.002)
    (run_dir / "STOP").touch()


@contextmanager
def spoilt(faults: dict[str, str], processes: Processes) -> Iterator[None]:
    """Let the last process's first micro batch of the named steps go wrong: loss, gradient, spike, hang or fail."""
    pending: list[str] = []
    next_step = StepLoader.next

    def take(loader: StepLoader) -> Step:
        step = next_step(loader)
        pending[:] = [faults[str(step.samples[0])]] if str(step.samples[0]) in faults else []
        return step

    def spoil(module: torch.nn.Module, inputs: Any, summed: torch.Tensor) -> torch.Tensor:
        if not module.training or not pending or processes.rank != processes.world_size - 1:
            return summed
        fault = pending.pop()
        if fault == "hang":
            time.sleep(3600)
        if fault == "fail":
            raise RuntimeError("made up")
        if fault == "gradient":
            summed.register_hook(lambda gradient: gradient * torch.inf)
            return summed
        return summed * {"loss": torch.nan, "spike": 5.0}[fault]

    def build_spoilt(config: RunConfig, processes: Processes) -> Any:
        engine = build_engine(config, processes)
        engine.module.register_forward_hook(spoil)
        return engine

    with mock.patch.object(StepLoader, "next", take), mock.patch.object(trainer, "build_engine", build_spoilt):
        yield


def gradients(config: RunConfig, processes: Processes, output: Path) -> None:
    from deepspeed.utils import safe_get_full_grad

    accumulation = accumulation_steps(config, processes.world_size)
    engine: Any = build_engine(config, processes)
    steps = open_steps(config, open_stream(config, open_datasets(config)[0]), processes)
    step = steps.next()
    mine = [int(batch.loss_mask.sum()) for batch in step.batches]
    (targets,) = processes.total(sum(mine))
    for position, batch in enumerate(step.batches):
        summed = engine(*to_device(batch, processes.device))
        engine.backward(summed * (processes.world_size * accumulation / targets))
        if position < accumulation - 1:
            engine.step()
    full = {name: safe_get_full_grad(parameter) for name, parameter in engine.module.named_parameters()}
    masks = processes.gather(mine)
    steps.close()
    if processes.rank == 0:
        torch.save({"gradients": full, "targets": masks}, output)


def resave(config: RunConfig, processes: Processes, source: Path, output: Path) -> None:
    engine = build_engine(config, processes)
    (checkpoint,) = processes.once(lambda: list((source / "checkpoints").glob("step-*")))
    progress = load_checkpoint(checkpoint, read_manifest(checkpoint), engine, processes)
    tokenizer = open_datasets(config)[0].components[0].dataset.tokenizer_path
    saver = CheckpointSaver(output, engine, processes, config, tokenizer=tokenizer)
    saver.begin(progress)
    saver.finish()
    saver.close()


if __name__ == "__main__":
    sys.exit(main())
