"""Check a run without starting it: `python -m launch.plan CONFIG [key=value …] [--devices N]`.

Prints parameters, FLOPs, memory by ZeRO stage, steps, epochs and time; with --memory, which settings fit. Checks the
data, `run.init_from` and `checkpoint.copy_to` as a run does. Needs no GPU, and starts no process.
"""

import argparse
import math
from collections.abc import Iterator

from flash_model.config import count_parameters, flops_per_token
from launch.backup import check_place
from launch.config import RunConfig, accumulation_steps, load_run_config
from launch.console import duration
from launch.engine import Alone
from launch.initial_weights import find_origin
from launch.memory import GIB, OUTSIDE_TORCH, PARTS, estimate_memory, fitting_settings
from launch.run_directory import RunDirectory
from launch.trainer import open_datasets
from pipeline.errors import UserError, run_command

ASSUMED_UTILISATION = 0.4


def plan_lines(
    config: RunConfig, *, devices: int, memory_gib: float | None, peak_tflops: float | None
) -> Iterator[str]:
    """The plan of a run, a line at a time. Raises `UserError` where the run could not start."""
    model, train, data = config.model, config.train, config.data
    accumulation = accumulation_steps(config, devices)
    check_place(config.checkpoint.copy_to, RunDirectory(config.run.dir).checkpoints)
    parameters, flops = count_parameters(model), flops_per_token(model, data.seq_len)
    tokens = config.steps * train.tokens_per_step
    size = f"{model.n_layers} layers, d_model {model.d_model}: {parameters:,} parameters"
    yield f"model       {model.architecture}, {size}"
    per_token = f"{flops.training / 1e6:,.1f} MFLOP per token trained (3 × forward)"
    yield f"flops       {per_token}, {flops.training * tokens:.3g} FLOP in all"
    yield (
        f"batch       {train.tokens_per_step:,} tokens = {devices} devices × {accumulation} accumulated × "
        f"micro batch {train.micro_batch} × seq_len {data.seq_len:,}"
    )
    yield f"steps       {config.steps:,} steps, {tokens:,} tokens"
    tokenizer_sha256 = None
    try:
        training, validation = open_datasets(config)
    except UserError as error:
        yield f"data        not ready: {error}"
    else:
        tokenizer_sha256 = training.components[0].dataset.tokenizer_sha256
        samples = config.steps * config.samples_per_step
        if len(training.components) > 1:
            yield f"data        mixture of {len(training.components)}; digest {training.digest[:16]}"
        for part, quota in zip(training.components, training.quotas, strict=True):
            dataset, share = part.dataset, quota / training.block
            epochs = samples * share / -(-dataset.n_tokens // data.seq_len)
            seen = f"{dataset.n_tokens:,} tokens, {epochs:.2f} epochs; digest {dataset.digest[:16]}"
            start = "data        " if len(training.components) == 1 else f"            {part.name}, {share:.4g} of it: "
            yield f"{start}{dataset.path}: {seen}"
        for name, dataset in validation.items():
            yield f"            {name}: {dataset.n_tokens:,} tokens, {dataset.n_utf8_bytes:,} bytes"
    if origin := find_origin(config, tokenizer_sha256, Alone()):
        yield f"weights     of {origin}: undamaged, of this model"
    yield from _memory_lines(config, devices, memory_gib)
    peak = peak_tflops or train.peak_tflops
    if peak:
        again = len(config.recomputed_layers) / model.n_layers * (flops.forward - flops.head)
        seconds = (flops.training + again) * tokens / (devices * peak * 1e12 * ASSUMED_UTILISATION)
        yield (
            f"time        {duration(seconds)} if {devices} devices of {peak:g} TFLOP/s reach {ASSUMED_UTILISATION:.0%} "
            "of it (an assumption: measure a few steps)"
        )
    else:
        yield "time        give --peak TFLOPS of one device for an estimate"


def _memory_lines(config: RunConfig, devices: int, memory_gib: float | None) -> Iterator[str]:
    train = config.train
    recomputed = f", {len(config.recomputed_layers)} of {config.model.n_layers} layers recomputed"
    offloaded = {"none": "", "optimizer": ", optimizer on the host", "all": ", parameters and optimizer on the host"}
    yield (
        f"memory      GiB on each device, {train.precision}{recomputed if config.recomputed_layers else ''}"
        f"{offloaded[train.offload]}; what torch allocates at the most, by formula"
    )
    yield "            ZeRO  " + " ".join(f"{name:>11}" for name in PARTS) + "    total"
    allowed = [3] if train.offload == "all" else [1, 2, 3] if train.offload != "none" else [0, 1, 2, 3]
    for stage in allowed:
        if stage == 0 and train.precision == "bf16":
            continue
        memory = estimate_memory(config, devices, stage)
        marks = "  ← configured" if stage == train.zero_stage else ""
        if memory_gib is not None:
            marks += "  fits" if memory.fits(memory_gib * GIB) else f"  does not fit {memory_gib:g} GiB"
        listed = " ".join(f"{memory.parts[name] / GIB:>11.2f}" for name in PARTS)
        yield f"            {stage}     {listed}  {memory.total / GIB:>7.2f}{marks}"
    memory = estimate_memory(config, devices)
    beside = f"{OUTSIDE_TORCH / GIB:.0f} GiB more is needed beside torch"
    yield f"            most of it at: {memory.moment}; {beside}"
    if memory.host:
        yield f"            {memory.host / GIB:.2f} GiB of the host's memory for each device"
    if memory_gib is not None and not memory.fits(memory_gib * GIB):
        yield f"            to fit {memory_gib:g} GiB, one of:"
        settings = fitting_settings(config, devices, memory_gib * GIB)
        yield from (f"              {setting}" for setting in settings or ["nothing: a smaller model or data.seq_len"])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.plan", description=__doc__)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--devices", type=int, default=1, help="number of devices (processes); default 1")
    parser.add_argument("--memory", type=float, metavar="GiB", help="memory of a device: says which stages fit")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="peak TFLOP/s of a device: gives the time")
    arguments = parser.parse_intermixed_args()
    for name in ("devices", "memory", "peak"):
        given = getattr(arguments, name)
        if given is not None and not 0 < given < math.inf:
            raise UserError(f"--{name}: {given:g}: give more than 0")
    config = load_run_config(arguments.config, arguments.overrides)
    for line in plan_lines(config, devices=arguments.devices, memory_gib=arguments.memory, peak_tflops=arguments.peak):
        print(line)
    return 0


if __name__ == "__main__":
    run_command(main)
