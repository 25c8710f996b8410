"""What a person sees of a running job: what it is, then one line a step, in a terminal or a log file."""

import time
from collections.abc import Iterator

import torch

from flash_model.config import count_parameters, flops_per_token
from flash_model.flops import data_sheet_tflops
from flash_model.ops.dispatch import use_kernel
from launch.config import RunConfig, accumulation_steps
from launch.console import duration
from launch.engine import Processes
from pipeline.mixture import Mixture


class Pace:
    """Times the steps and keeps what is known of speed."""

    def __init__(self, config: RunConfig, training_flops_per_token: float, processes: Processes) -> None:
        self._tokens = config.train.tokens_per_step
        self._flops = training_flops_per_token
        self._world_size = processes.world_size
        self._gpu = processes.device.type == "cuda"
        self._peak = config.train.peak_tflops or self._known_peak(config)
        self._recent: list[float] | None = None
        self._began = self._ready = 0.0
        self._mark: float | None = None
        self.metrics: dict[str, float] = {}

    def _known_peak(self, config: RunConfig) -> float | None:
        if not self._gpu or config.train.precision != "bf16":
            return None
        return data_sheet_tflops(torch.cuda.get_device_name())

    def start_step(self) -> None:
        """A step begins: right where the one before ended, unless something else took place in between."""
        self._began = time.perf_counter() if self._mark is None else self._mark

    def data_ready(self) -> None:
        """The step's batches are there."""
        self._ready = time.perf_counter()

    def end_step(self) -> None:
        """The update is done."""
        self._mark = time.perf_counter()
        seconds = self._mark - self._began
        # The first step of a process warms up, or compiles: it says nothing of those to come.
        self._recent = [] if self._recent is None else [*self._recent[-49:], seconds]
        speed = self._tokens / seconds
        self.metrics = {
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": speed,
            "perf/data_wait_fraction": (self._ready - self._began) / seconds,
        }
        if self._peak:
            self.metrics["perf/mfu"] = speed * self._flops / (self._world_size * self._peak * 1e12)
        if self._gpu:
            # As torch.cuda.max_memory_allocated, which flattens all of the allocator's figures first.
            figures = torch.cuda.memory_stats_as_nested_dict()
            self.metrics["perf/gpu_memory_gib"] = figures["allocated_bytes"]["all"]["peak"] / 2**30

    def pause(self) -> None:
        """What happened since the last step (evaluation, saving) does not count as training."""
        self._mark = None

    def seconds_left(self, steps: int) -> float:
        """Expected seconds of `steps` more steps, from the median of recent ones."""
        return sorted(self._recent)[len(self._recent) // 2] * steps if self._recent else float("nan")


def first_lines(config: RunConfig, training: Mixture, processes: Processes) -> Iterator[str]:
    """What this run is: where it is kept, model, data, processes and precision, how long it will be, and which code
    the op runs.
    """
    model, train = config.model, config.train
    flops = flops_per_token(model, config.data.seq_len).training
    direction = "causal" if model.causal else "bidirectional"
    store = f"{config.mlflow_store}, experiment {config.tracking.experiment}" if config.tracking.enabled else "not used"
    yield f"run: {config.run.dir}; MLflow: {store}"
    yield (
        f"model: {model.architecture}, {direction}, {_short(count_parameters(model))} parameters ({model.n_layers} "
        f"layers, width {model.d_model:,}), {_short(flops)} FLOP a token at context {config.data.seq_len:,}"
    )
    total = sum(part.weight for part in training.components)
    listed = ", ".join(
        f"{part.name} {part.weight / total:.0%}, {_short(part.dataset.n_tokens)} tokens" for part in training.components
    )
    yield f"data: {listed}; validation: {', '.join(config.data.validation) or 'none'}"
    device = torch.cuda.get_device_name(processes.device) if processes.device.type == "cuda" else "CPU"
    yield (
        f"training: {config.steps:,} steps of {train.tokens_per_step:,} tokens; {processes.world_size} × {device}, "
        f"{train.micro_batch} × {accumulation_steps(config, processes.world_size)} windows each, {train.precision}, "
        f"ZeRO {train.zero_stage}, {'compiled' if train.compile else 'not compiled'}, {_op_line(config, processes)}"
    )


def _op_line(config: RunConfig, processes: Processes) -> str:
    model = config.model
    chunk_size = model.chunk_size if model.architecture == "flash" else None
    op = "mixed_chunk_attention" if model.architecture == "flash" else "quadratic_attention"
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    kernel = use_kernel(op, processes.device.type, dtype, model.expanded_dim, model.qk_dim, chunk_size)
    return "ops by Triton kernels" if kernel else "ops by the reference in plain torch"


def progress_line(config: RunConfig, step: int, metrics: dict[str, float], pace: Pace, fault: str | None = None) -> str:
    """One line: step, tokens, loss, learning rate, gradient norm, speed, utilisation, memory, steps skipped lately,
    time left; of a bad step what was wrong with it. Columns stay where they are from line to line.
    """
    number = f"step {step:>{len(str(config.steps))}}/{config.steps}"
    if fault:
        return f"{number}  BAD, not learnt from: {fault}"
    parts = [
        number,
        f"tokens {_short(metrics['train/tokens']):>5}",
        f"loss {metrics['train/loss']:7.4f}",
        f"lr {metrics['train/lr']:.2e}",
        f"grad {metrics['train/grad_norm']:7.3f}",
        f"{_short(metrics['perf/tokens_per_second']):>5} tok/s",
    ]
    if "perf/mfu" in metrics:
        parts.append(f"mfu {metrics['perf/mfu']:5.1%}")
    if "perf/gpu_memory_gib" in metrics:
        parts.append(f"mem {metrics['perf/gpu_memory_gib']:5.1f} GiB")
    parts.append(f"left {duration(pace.seconds_left(config.steps - step)):>6}")
    if "train/skipped_steps" in metrics:
        parts.append(f"skipped {metrics['train/skipped_steps']:.0f}")
    return "  ".join(parts)


def _short(number: float) -> str:
    """Three digits and a unit: 4.10k, 65.5k, 123M; at most five characters, so that columns keep their places."""
    for unit, size in (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12), ("P", 1e15)):
        if number < 999.5 * size or unit == "P":
            break
    value = number / size
    if not unit:
        return f"{value:.0f}"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{unit}"
