"""The training loop."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flash_model.config import flops_per_token
from launch.agreement import check_same, check_shared
from launch.backup import Backup, check_place
from launch.bad_steps import History, bad_step_record, find_fault, over_budget_message
from launch.checkpoint import (
    Progress,
    check_compatible,
    load_checkpoint,
    newest_usable,
    read_manifest,
)
from launch.config import RunConfig, accumulation_steps, component_name
from launch.console import say
from launch.datasets_used import dataset_facts
from launch.engine import Processes, build_engine, set_learning_rate, update
from launch.evaluate import Validation, to_device
from launch.first_step import memory_errors_explained, take_mock_step
from launch.gradients import GradientNorms, discard_gradients, total_norm
from launch.initial_weights import find_origin, load_weights
from launch.layer_metrics import LayerMetrics
from launch.profiling import Profiler
from launch.progress import Pace, first_lines, progress_line
from launch.rollback import Rollback, carry_out, pass_over, plan_rollback, record_stop, set_aside
from launch.run_directory import RunDirectory
from launch.samples import Samples, read_prompts
from launch.saving import CheckpointSaver, SavedCheckpoint
from launch.schedule import learning_rate
from launch.stop import StopRequest
from launch.tracking import NodeSampler, Tracker, last_attempt, run_facts
from launch.watchdog import Phase, Watchdog
from pipeline.batches import DataState, TrainingStream
from pipeline.errors import UserError
from pipeline.masking import Corruption
from pipeline.mixture import Component, Mixture
from pipeline.prefetch import StepLoader
from pipeline.shards import TokenDataset

FINISHED, STOPPED, BAD_NUMBERS = 0, 75, 70
"""Exit statuses: last step reached; stopped cleanly and to be resumed; over the budget of bad steps, or no gradient."""


Datasets = tuple[Mixture, dict[str, TokenDataset]]
"""What is trained on, and the validation sets by name."""


def open_datasets(config: RunConfig) -> Datasets:
    """Open all of a run's datasets.

    Raises `UserError` if one is missing or does not fit the model, the others or the masking.
    """
    components = [
        Component(component_name(part), TokenDataset.open(part.path, part.split), part.weight)
        for part in config.data.components
    ]
    for component in components:
        if component.dataset.n_tokens < config.data.seq_len:
            raise UserError(
                f"data.seq_len: {config.data.seq_len:,} tokens are more than all of {component.dataset.path}, "
                f"which has {component.dataset.n_tokens:,}; lower it or prepare more text"
            )
    training = Mixture(components)
    validation = {name: TokenDataset.open(ref.path, ref.split) for name, ref in config.data.validation.items()}
    first = components[0].dataset
    if first.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size:,} is smaller than the vocabulary of {first.path}, "
            f"which has {first.vocab_size:,} pieces; set it to at least that"
        )
    for name, dataset in validation.items():
        if dataset.tokenizer_sha256 != first.tokenizer_sha256:
            raise UserError(
                f"data.validation.{name}: {dataset.path} has another tokenizer than {first.path}: prepare it with "
                f"content.tokenizer.path={first.tokenizer_path}"
            )
    if config.data.masked_lm:
        Corruption(config.data.masked_lm, first)  # refuses a tokenizer without a mask piece
    read_prompts(config, first.tokenizer_path)  # refuses what the model cannot go on from
    return training, validation


def open_stream(config: RunConfig, training: Mixture, state: DataState | None = None) -> TrainingStream:
    """The samples of the run, from `state` on. Raises `UserError` if that is of other data."""
    data = config.data
    return TrainingStream(training, seq_len=data.seq_len, seed=config.run.seed, masked_lm=data.masked_lm, state=state)


def open_steps(config: RunConfig, stream: TrainingStream, processes: Processes) -> StepLoader:
    """This process's share of the steps of `stream`."""
    return StepLoader(
        stream,
        samples_per_step=config.samples_per_step,
        micro_batch=config.train.micro_batch,
        rank=processes.rank,
        world_size=processes.world_size,
        ahead=config.data.prefetch,
    )


def train(config: RunConfig, datasets: Datasets, processes: Processes) -> int:
    """Train to the last step or to a reason to stop; returns the exit status. Called by all processes.

    datasets: what `open_datasets` found.
    """
    with Watchdog(config.watchdog, processes) as watchdog, Profiler(config, processes) as profiler:
        return _train(config, datasets, processes, watchdog, profiler)


def _train(config: RunConfig, datasets: Datasets, processes: Processes, watchdog: Watchdog, profiler: Profiler) -> int:
    directory = RunDirectory(config.run.dir)
    training, validation = datasets
    accumulation = accumulation_steps(config, processes.world_size)
    check_same(config, training, validation, processes)
    processes.once(lambda: check_place(config.checkpoint.copy_to, directory.checkpoints))
    resume_from, back = _choose_start(config, directory, training, processes)
    tokenizer_sha256 = training.components[0].dataset.tokenizer_sha256
    origin = None if resume_from else find_origin(config, tokenizer_sha256, processes)
    stop = StopRequest(config.run.dir, config.run.max_hours, launched=processes.launched)
    for line in first_lines(config, training, processes):
        say(line)
    with memory_errors_explained(config, processes, snapshot=profiler.snapshot):
        profiler.engine = engine = build_engine(config, processes)
        if config.train.mock_step or (config.train.mock_step is None and processes.device.type == "cuda"):
            take_mock_step(config, engine, processes)
    attempt = processes.once(lambda: last_attempt(directory.metrics)) + 1
    facts = run_facts(config, _dataset_facts(training, validation), processes.world_size)
    check_shared(directory.path, processes)
    processes.once(lambda: directory.open(config, facts))
    processes.once(lambda: carry_out(directory, back))
    uid, copy_to = processes.once(lambda: directory.uid), config.checkpoint.copy_to
    backup = Backup(directory.checkpoints, copy_to, uid) if copy_to and processes.rank == 0 else None

    stream = open_stream(config, training)
    progress = Progress(0, 0, stream.state, attempt, History())
    if resume_from is not None:
        saved = load_checkpoint(resume_from, read_manifest(resume_from), engine, processes)
        data = processes.once(lambda: pass_over(directory, saved.data))
        progress = replace(saved, attempt=attempt, data=data)
        stream = open_stream(config, training, progress.data)
        if back:
            say(f"going back to {back}")
        say(f"continuing from {resume_from.name}: {progress.tokens:,} tokens seen")
    elif origin is not None:
        load_weights(origin, engine, processes)
    norms = GradientNorms(engine, processes)
    pace = Pace(config, flops_per_token(config.model, config.data.seq_len).training, processes)
    # From here on the run is recorded, and how it ends.
    tracker = Tracker(directory, config, attempt) if processes.rank == 0 else None
    sampler = NodeSampler(directory, config, attempt, processes)
    watchdog.before_exit = tracker.lost if tracker else None

    tokenizer = training.components[0].dataset.tokenizer_path
    validate = Validation(config, validation, engine, processes)
    samples = Samples(config, tokenizer, engine, processes)
    layer_metrics = LayerMetrics(config, engine, processes)

    def enter(phase: Phase) -> None:
        watchdog.enter(phase)
        profiler.enter(phase)

    def announce(checkpoint: SavedCheckpoint) -> None:
        say(str(checkpoint))
        if backup:
            backup.notice()
        if tracker:
            tracker.checkpoint(checkpoint.step, checkpoint.path)

    saver = CheckpointSaver(
        directory.checkpoints,
        engine,
        processes,
        config,
        tokenizer=tokenizer,
        run_uid=uid,
        protected=lambda: {path for path in (resume_from, backup and backup.busy_with) if path},
        announce=announce,
    )

    def save(scores: dict[str, float] | None = None) -> None:
        enter("save")
        saver.begin(progress, mlflow_run_id=tracker.run_id if tracker else None, scores=scores)

    def score() -> dict[str, float]:
        found = validate.score(progress.step, lambda: enter("evaluate"))
        written = samples.write(progress.step, progress.tokens, lambda: enter("evaluate"))
        if tracker and found:
            tracker.log(progress.step, found | {"train/tokens": progress.tokens})
        if tracker and written:
            tracker.text(progress.step, written)
        return found

    status, saved_step = FINISHED, progress.step if resume_from is not None else None
    over_budget: History | None = None
    outcome = "FAILED"
    steps = open_steps(config, stream, processes)
    try:
        while progress.step < config.steps:
            number = progress.step + 1
            pace.start_step()
            profiler.start(number)
            enter("data")
            step = steps.next()
            enter("wait")
            reason = stop.reason
            # One sum over all processes: how many targets there are, who wants to stop, who has written a checkpoint.
            targets, stopping, written = processes.total(step.targets, reason is not None, saver.written)
            pace.data_ready()
            if stopping:
                say(f"stopping: {_first(processes.gather(reason))}")
                status = STOPPED
                break

            watched: dict[str, float] = {}
            if layer_metrics.due(number):
                enter("forward")
                watched = layer_metrics.activations(step.batches)
            # DeepSpeed averages over processes and micro batches; the loss is a sum over the step's global targets.
            scale = processes.world_size * accumulation / max(targets, 1)
            nats = torch.zeros((), dtype=torch.float64, device=processes.device)
            for position, batch in enumerate(step.batches):
                enter("forward")
                summed = engine(*to_device(batch, processes.device))
                nats += summed.detach().double()
                enter("backward")
                engine.backward(summed * scale)
                if position < accumulation - 1:
                    engine.step()
            enter("step")
            steps.refill()
            # This waits for the GPU: nothing reads the step's batches any more when the next step is asked for.
            total_nats, layer_norms = norms.reduce(nats)
            loss, norm = total_nats / max(targets, 1), total_norm(layer_norms)
            if norm == 0 and targets:
                status = _report_no_gradient(progress, targets, compiled=config.train.compile)
                break
            # All processes have the same numbers, and find the same.
            fault = find_fault(progress.history, loss, norm, config.bad_steps)
            lr = learning_rate(config, progress.step)
            if fault is None:
                set_learning_rate(engine, lr)
                update(engine)
                history = progress.history.learnt(loss, config.bad_steps) if targets else progress.history
            else:
                discard_gradients(engine)
                history = progress.history.skip(number, step.samples, config.bad_steps)
                within_budget = len(history.skipped) <= config.bad_steps.budget
                if tracker:
                    found = bad_step_record(fault, step.samples, loss, layer_norms, skipped=within_budget)
                    tracker.bad_step(number, found)
                say(progress_line(config, number, {}, pace, fault))
                if not within_budget:
                    status, over_budget = BAD_NUMBERS, history
                    break
            tokens_before = progress.tokens
            progress = replace(
                progress,
                step=number,
                tokens=tokens_before + config.train.tokens_per_step,
                data=step.state,
                history=history,
            )
            pace.end_step()
            if profiler.stop():
                pace.pause()

            if written == processes.world_size:
                enter("save")
                saver.finish()
                pace.pause()
            last, scores = progress.step == config.steps, None
            if tracker:
                metrics = {"train/lr": lr, "train/tokens": progress.tokens, **pace.metrics}
                if fault is None:
                    metrics |= {"train/loss": loss, "train/grad_norm": norm}
                    if layer_metrics.due(number):
                        metrics |= watched | layer_metrics.gradients(layer_norms)
                if skipped := history.counted(progress.step, config.bad_steps):
                    metrics["train/skipped_steps"] = len(skipped)
                logged = progress.step % config.train.log_every == 0 or last
                tracker.log(progress.step, metrics, step.samples)
                if (logged or progress.step == 1) and fault is None:
                    say(progress_line(config, progress.step, metrics, pace))
            if last or _passed(config.evaluate.every_tokens, tokens_before, progress.tokens):
                scores = score()
                pace.pause()
            if last or _passed(config.checkpoint.every_tokens, tokens_before, progress.tokens):
                save(scores)
                saved_step = progress.step
                pace.pause()
        if (status == STOPPED or over_budget) and saved_step != progress.step:
            save()
        enter("save")
        saver.finish()
        if over_budget:
            processes.once(lambda: record_stop(directory, attempt, over_budget))
            say(over_budget_message(over_budget, config.bad_steps))
        if status == FINISHED:
            processes.once(lambda: directory.finish(progress.step, progress.tokens))
            say(f"done: {progress.step:,} steps, {progress.tokens:,} tokens in {directory.path}")
        outcome = {FINISHED: "FINISHED", STOPPED: "KILLED"}.get(status, "FAILED")
        enter("wait")
        sampler.close()
        # All meet before the record is closed: only the first process waits for MLflow, and it has all nodes' samples.
        processes.barrier()
    except Exception as error:
        profiler.explain(error)
        watchdog.failed(error)
        raise
    finally:
        steps.close()
        saver.close()
        sampler.close()
        if tracker and (message := tracker.close(outcome)):
            say(message)

    def copying(goes_on: bool) -> tuple[int, int]:
        enter("wait")  # however long it takes: the copies see for themselves whether something moves
        going_on, told_to_stop = processes.total(goes_on, stop.reason is not None)
        return going_on, told_to_stop

    # Only the first process copies. The others stay: half a minute after one has left, launchers kill the rest, SLURM's
    # even after a status of 0.
    if backup and (message := backup.close(hurry=status == STOPPED, give_up=lambda: copying(True)[1] > 0)):
        say(message)
    while copying(False)[0]:
        pass
    directory.close()
    return status


def _choose_start(
    config: RunConfig, directory: RunDirectory, training: Mixture, processes: Processes
) -> tuple[Path | None, Rollback | None]:
    """The checkpoint to continue from, agreed by all processes; None to start anew. With it, a rollback to do."""
    processes.once(lambda: directory.check(config.run.resume))
    if not processes.once(lambda: directory.exists):
        return None, None
    processes.once(directory.check_unused)
    check_shared(directory.path, processes)  # where it is not, its checkpoints look damaged
    processes.once(lambda: set_aside(directory))
    back = plan_rollback(directory, processes) if config.bad_steps.rollback else None
    passed_over: list[str] = []
    checkpoint: Path | None
    if back:
        checkpoint = directory.checkpoints / back.checkpoint
    else:
        checkpoint, passed_over = newest_usable(directory.checkpoints, processes)

    def check() -> None:
        for reason in passed_over:
            say(reason)
        if checkpoint is not None:
            manifest = read_manifest(checkpoint)
            check_compatible(checkpoint, manifest, config)
            open_stream(config, training, DataState.from_dict(manifest["data"]))  # refuses other data
        elif config.run.resume == "must" or passed_over:
            raise UserError(
                f"run.dir: nothing to resume from: {directory.checkpoints} holds no usable checkpoint; "
                "delete the directory to start anew"
            )

    processes.once(check)
    return checkpoint, back


def _passed(every: int | None, before: int, now: int) -> bool:
    """Whether a multiple of `every` tokens lies in (before, now]."""
    return every is not None and now // every > before // every


def _report_no_gradient(progress: Progress, targets: int, *, compiled: bool) -> int:
    advice = "try train.compile=false" if compiled else "no gradient reaches the parameters"
    say(f"error: step {progress.step + 1} has {targets:,} targets and a gradient of exactly 0: {advice}")
    return BAD_NUMBERS


def _first(reasons: list[str | None]) -> str:
    return next(reason for reason in reasons if reason)


def _dataset_facts(training: Mixture, validation: dict[str, TokenDataset]) -> list[dict[str, Any]]:
    parts = training.components
    trained = {"training" if len(parts) == 1 else f"training/{part.name}": part.dataset for part in parts}
    return [dataset_facts(context, dataset) for context, dataset in {**trained, **validation}.items()]
