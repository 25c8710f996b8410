"""Where a training step's time goes: kernels by stage, beside the least time that their work can take."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import models
from benchmarks.models import Entrant, Size
from benchmarks.step import TrainingStep, step_milliseconds
from flash_model.config import ModelConfig

PROFILED_STEPS = 3
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::baddbmm": 1}  # op: index of its left factor
UPDATE_BYTES = 14  # moved for a bfloat16 parameter: it, gradient, moments read; all but one written


@dataclass
class Stage:
    """Time and launches of one stage, summed over the profiled steps."""

    milliseconds: float = 0.0
    calls: int = 0
    flops: float = field(default=0.0)

    def add(self, milliseconds: float, flops: float = 0.0) -> None:
        """Count one launch."""
        self.milliseconds += milliseconds
        self.calls += 1
        self.flops += flops


def product_role(rows: int, inner: int, columns: int, config: ModelConfig) -> str:
    """Name the dense product (rows, inner)·(inner, columns): which projection, which direction."""
    D, E, V = config.d_model, config.expanded_dim, config.vocab_size
    P = 2 * E + config.qk_dim
    directions = {
        (D, P): "expand, forward",
        (P, D): "expand, input gradient",
        (E, D): "contract, forward",
        (D, E): "contract, input gradient",
        (D, V): "head, forward",
        (V, D): "head, input gradient",
    }
    weights = {
        frozenset((D, P)): "expand, weight gradient",
        frozenset((D, E)): "contract, weight gradient",
        frozenset((D, V)): "head, weight gradient",
    }
    role = directions.get((inner, columns)) or weights.get(frozenset((rows, columns)))
    return role or f"products over {inner} to {columns}"


def kernel_stage(name: str, op_kernels: Iterable[str]) -> str:
    """Name the stage of a kernel that is no dense product of the model."""
    if any(name.startswith(kernel) for kernel in op_kernels):
        return f"op: {name}"
    if "multi_tensor_apply" in name or "adam" in name.lower():
        return "optimizer"
    if name.startswith("triton_"):
        return f"compiled: {re.sub(r'_?[0-9]+$', '', name)[:60]}"
    if name.startswith(("Memcpy", "Memset")):
        return name.split(" ")[0]
    return re.sub(r"^void |<.*|\(.*", "", name)[:60]


def group_events(events: Iterable[Any], config: ModelConfig, op_kernels: Iterable[str]) -> dict[str, Stage]:
    """Sum the kernels of torch profiler events (microseconds) by stage; dense products are told apart by shape."""
    stages: dict[str, Stage] = defaultdict(Stage)
    in_products: dict[str, float] = defaultdict(float)
    launches_in_products: dict[str, int] = defaultdict(int)
    kernels: dict[str, Stage] = defaultdict(Stage)
    for event in events:
        if event.device_type.name == "CUDA":
            kernels[event.name].add(event.self_device_time_total / 1e3)
        elif event.name in PRODUCTS and event.kernels and event.input_shapes:
            left, right = event.input_shapes[PRODUCTS[event.name] :][:2]
            flops = 2.0 * math.prod(left) * right[-1]
            duration = sum(kernel.duration for kernel in event.kernels) / 1e3
            stages[product_role(left[-2], left[-1], right[-1], config)].add(duration, flops)
            for kernel in event.kernels:
                in_products[kernel.name] += kernel.duration / 1e3
                launches_in_products[kernel.name] += 1
    for name, seen in kernels.items():
        calls = seen.calls - launches_in_products[name]
        if calls > 0:
            stage = stages[kernel_stage(name, op_kernels)]
            stage.milliseconds += seen.milliseconds - in_products[name]
            stage.calls += calls
    return dict(stages)


def op_kernel_names() -> list[str]:
    """Return the names of the project's own Triton kernels; none where there is no Triton."""
    try:
        import triton  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return []
    import importlib
    import pkgutil

    import flash_model

    names = []
    for module in pkgutil.walk_packages(flash_model.__path__, "flash_model."):
        if module.name.rpartition(".")[2].startswith("triton_"):
            members = vars(importlib.import_module(module.name))
            names += [name for name, member in members.items() if isinstance(member, triton.JITFunction)]
    return names


def profile_step(
    entrant: Entrant, size: Size, context: int, *, compiled: str, device: torch.device, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Profile the training step of a model and return its stages, slowest first, with their floors.

    A floor is the FLOPs of a product at the measured rate of a large one, or bytes at the measured rate of a copy.
    """
    batch = size.batch(context)
    model = models.build(entrant, size, context, device, torch.bfloat16)
    config = models.model_config(model)
    if not isinstance(config, ModelConfig):
        raise ValueError(f"--profile: {entrant.title} has no stages here; take a FLASH model")
    parameters, _ = models.model_size(model, context)
    with entrant.chosen_attention():
        step = TrainingStep(model, batch, context, device, compiled)
        step_milliseconds(step, 2)
        milliseconds = sorted(step_milliseconds(step, 5))[2]
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        with profile(activities=activities, record_shapes=True) as profiler:
            step_milliseconds(step, PROFILED_STEPS)
    stages = group_events(profiler.events(), config, op_kernel_names())
    floors = {
        name: 1e-9 * stage.flops / PROFILED_STEPS / machine["matmul_tflops"]
        for name, stage in stages.items()
        if stage.flops
    }
    floors["optimizer"] = 1e-6 * UPDATE_BYTES * parameters / machine["copy_gb_per_s"]
    return {
        "title": entrant.title,
        "context": context,
        "tokens_per_step": batch * context,
        "ms": milliseconds,
        "stages": [
            {
                "stage": name,
                "calls": stage.calls / PROFILED_STEPS,
                "ms": stage.milliseconds / PROFILED_STEPS,
                "floor_ms": floors.get(name),
            }
            for name, stage in sorted(stages.items(), key=lambda item: -item[1].milliseconds)
        ],
    }
