"""Check a run without starting it: `python -m launch.plan CONFIG [key=value …] [--devices N]`.

Prints parameters, FLOPs, memory by ZeRO stage, steps, epochs and time. Needs no GPU, and starts no process.
"""

import argparse
from collections.abc import Iterator

from flash_model.config import count_parameters, flops_per_token
from launch.config import RunConfig, accumulation_steps, load_run_config
from launch.memory import estimate_memory
from launch.progress import duration
from launch.trainer import open_datasets
from pipeline.errors import UserError, run_command

ASSUMED_UTILISATION = 0.4


def plan_lines(
    config: RunConfig, *, devices: int, memory_gib: float | None, peak_tflops: float | None
) -> Iterator[str]:
    """The plan of a run, a line at a time. Raises `UserError` where the run could not start."""
    model, train, data = config.model, config.train, config.data
    accumulation = accumulation_steps(config, devices)
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
    try:
        training, validation = open_datasets(config)
    except UserError as error:
        yield f"data        not ready: {error}"
    else:
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
    yield f"memory      GiB on each device, {train.precision}, by formula (temporary buffers come on top)"
    yield "            ZeRO  weights  gradients  optimizer  activations   total"
    for stage in range(4):
        parts = estimate_memory(config, devices, stage)
        columns = [
            size / 2**30 for size in (parts.weights, parts.gradients, parts.optimizer, parts.activations, parts.total)
        ]
        marks = "  ← configured" if stage == train.zero_stage else ""
        if memory_gib is not None and columns[-1] > memory_gib:
            marks += f"  does not fit {memory_gib:g} GiB"
        listed = "{:>8.2f} {:>10.2f} {:>10.2f} {:>12.2f} {:>7.2f}".format(*columns)
        yield f"            {stage}   {listed}{marks}"
    peak = peak_tflops or train.peak_tflops
    if peak:
        seconds = flops.training * tokens / (devices * peak * 1e12 * ASSUMED_UTILISATION)
        yield (
            f"time        {duration(seconds)} if {devices} devices of {peak:g} TFLOP/s reach {ASSUMED_UTILISATION:.0%} "
            "of it (an assumption: measure a few steps)"
        )
    else:
        yield "time        give --peak TFLOPS of one device for an estimate"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.plan", description=__doc__)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--devices", type=int, default=1, help="number of devices (processes); default 1")
    parser.add_argument("--memory", type=float, metavar="GiB", help="memory of a device: says which stages fit")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="peak TFLOP/s of a device: gives the time")
    arguments = parser.parse_intermixed_args()
    if arguments.devices < 1:
        raise UserError(f"--devices: {arguments.devices} is not a number of devices; give 1 or more")
    config = load_run_config(arguments.config, arguments.overrides)
    for line in plan_lines(config, devices=arguments.devices, memory_gib=arguments.memory, peak_tflops=arguments.peak):
        print(line)
    return 0


if __name__ == "__main__":
    run_command(main)
