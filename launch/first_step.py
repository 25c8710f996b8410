"""A first step on made-up tokens, thrown away: memory that does not suffice is found before data and tracking start."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from launch.config import RunConfig, accumulation_steps
from launch.conversion import master_weights
from launch.engine import Processes
from launch.evaluate import to_device
from launch.gradients import discard_gradients
from launch.memory import GIB, estimate_memory, fitting_settings
from pipeline.batches import Batch
from pipeline.errors import UserError


@contextmanager
def memory_errors_explained(
    config: RunConfig, processes: Processes, *, snapshot: Callable[[], str] = str
) -> Iterator[None]:
    """Turn a device that is out of memory into a `UserError`.

    snapshot: writes down what fills the device while it still does, and says where.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(_explanation(config, processes, str(error), snapshot())) from error


def take_mock_step(config: RunConfig, engine: Any, processes: Processes) -> None:
    """Run forward and backward as a step does, with as much memory in use, and throw the gradient away.

    Weights, optimizer, random numbers and counters stay as they are, bit for bit; compiled code is there afterwards.
    Two micro batches are enough: the second runs beside the gradients of the first. `engine` is fresh. Called by all
    processes.
    """
    weights, stage = master_weights(engine), config.train.zero_stage
    moments = [torch.empty_like(weight) for weight in weights for _ in range(2)]  # there after the first update
    accumulation = accumulation_steps(config, processes.world_size)
    micro_batches = min(2, accumulation)
    batch = to_device(_made_up(config), processes.device)
    # DeepSpeed counts micro batches to know the last one of a step.
    engine.micro_steps = accumulation - micro_batches
    for position in range(micro_batches):
        engine.backward(engine(*batch) / batch[0].numel())
        if position < micro_batches - 1:
            engine.step()
    if processes.device.type == "cuda":
        torch.cuda.synchronize()
    flat = torch.empty_like(max(weights, key=torch.Tensor.numel)) if stage == 3 else None  # of the update
    del moments, flat
    discard_gradients(engine)
    engine.micro_steps = 0


def _made_up(config: RunConfig) -> Batch:
    """A full micro batch of the types that batches have: compiled code is for these."""
    batch = Batch.allocate(config.train.micro_batch, config.data.seq_len)
    tokens = torch.arange(batch.tokens.numel()).view(batch.tokens.shape) % config.model.vocab_size
    batch.tokens.copy_(tokens)
    batch.targets.copy_(tokens)
    batch.doc_ids.zero_()
    batch.loss_mask.fill_(True)
    return batch


def _explanation(config: RunConfig, processes: Processes, error: str, snapshot: str) -> str:
    asked = re.search(r"Tried to allocate ([\d.]+ \wiB)", error)
    capacity = torch.cuda.mem_get_info(processes.device)[1] if processes.device.type == "cuda" else None
    device = f"a device of {capacity / GIB:.1f} GiB" if capacity else "the device"
    needed = estimate_memory(config, processes.world_size)
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needed.parts.items())
    lines = [
        f"train: out of memory in a first step on made-up tokens: it asked for {asked[1] if asked else 'more'} that "
        f"{device} does not have",
        f"by formula a step needs {needed.total / GIB:.1f} GiB of each device, most of it at {needed.moment}: {parts}",
    ]
    if capacity is None or needed.fits(capacity):
        lines.append("by formula that fits: see what else is on the device (nvidia-smi)")
    # Where the formula was too low, what is to fit has to be lower by as much.
    limit = min(capacity or needed.total, needed.total)
    settings = fitting_settings(config, processes.world_size, limit)
    lines += [f"to fit, one of: {'; '.join(settings)}"] if settings else ["to fit: a smaller model or data.seq_len"]
    return "\n  ".join(filter(None, [*lines, snapshot]))
