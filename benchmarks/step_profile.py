"""Where a training step's time goes: kernels by stage, beside the least time that their work can take."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import models
from benchmarks.models import Entrant, Size
from benchmarks.step import TrainingStep, step_milliseconds
from flash_model.config import ModelConfig

PROFILED_STEPS = 3
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::baddbmm": 1}  # op: index of its left factor
BYTES = torch.bfloat16.itemsize


@dataclass
class Stage:
    """Time and launches of one stage, summed over the profiled steps."""

    milliseconds: float = 0.0
    calls: int = 0
    flops: float = 0.0

    def add(self, milliseconds: float, flops: float = 0.0) -> None:
        """Count one launch."""
        self.milliseconds += milliseconds
        self.calls += 1
        self.flops += flops


def product_role(rows: int, inner: int, columns: int, config: ModelConfig) -> str:
    """Name the dense product (rows, inner)·(inner, columns): which projection, which direction."""
    D, E, V = config.d_model, config.expanded_dim, config.vocab_size
    P = 2 * E + config.qk_dim
    if inner == V:
        return "head, input gradient"
    if V in (rows, columns):
        return "head, forward" if inner == D else "head, weight gradient"
    directions = {
        (D, P): "projections, expand forward",
        (P, D): "projections, expand input gradient",
        (E, D): "projections, contract forward",
        (D, E): "projections, contract input gradient",
    }
    weights = {
        frozenset((D, P)): "projections, expand weight gradient",
        frozenset((D, E)): "projections, contract weight gradient",
    }
    role = directions.get((inner, columns)) or weights.get(frozenset((rows, columns)))
    return role or f"other, products over {inner} to {columns}"


def kernel_stage(name: str, own_kernels: Mapping[str, str]) -> str:
    """Name the stage of a kernel that is no dense product of the model."""
    if name in own_kernels:
        return f"{own_kernels[name]}, {name}"
    if "multi_tensor_apply" in name or "adam" in name.lower():
        return "optimizer"
    if name.startswith("triton_"):
        return f"compiled, {re.sub(r'_?[0-9]+$', '', name)[:60]}"
    return "other, " + re.sub(r"^void |<.*|\(.*", "", name)[:60]


def group_events(events: Iterable[Any], config: ModelConfig, own_kernels: Mapping[str, str]) -> dict[str, Stage]:
    """Sum the kernels of torch profiler events by stage, "group, what"; dense products are told apart by shape."""
    stages: dict[str, Stage] = defaultdict(Stage)
    in_products: dict[str, Stage] = defaultdict(Stage)
    kernels: dict[str, Stage] = defaultdict(Stage)
    for event in events:
        if event.is_user_annotation:
            continue
        if event.device_type.name == "CUDA":
            kernels[event.name].add(event.time_range.elapsed_us() / 1e3)
        elif event.name in PRODUCTS and event.kernels and event.input_shapes:
            left, right = event.input_shapes[PRODUCTS[event.name] :][:2]
            role = product_role(left[-2], left[-1], right[-1], config)
            for kernel in event.kernels:
                in_products[kernel.name].add(kernel.duration / 1e3)
            duration = sum(kernel.duration for kernel in event.kernels) / 1e3
            stages[role].add(duration, 2.0 * math.prod(left) * right[-1])
    for name, seen in kernels.items():
        inside = in_products[name]
        if seen.calls > inside.calls:
            stage = stages[kernel_stage(name, own_kernels)]
            stage.milliseconds += seen.milliseconds - inside.milliseconds
            stage.calls += seen.calls - inside.calls
    return dict(stages)


def own_kernel_groups() -> dict[str, str]:
    """Return the group of each of the project's own Triton kernels: "op", "head", "norms"; none without Triton."""
    try:
        import triton  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return {}
    import importlib
    import pkgutil

    import flash_model

    outside = {"flash_model.triton_cross_entropy": "head", "flash_model.triton_add_norm": "norms"}
    groups: dict[str, str] = {}
    for module in pkgutil.walk_packages(flash_model.__path__, "flash_model."):
        if module.name.rpartition(".")[2].startswith("triton_"):
            members = vars(importlib.import_module(module.name))
            group = outside.get(module.name, "op")
            groups |= {name: group for name, member in members.items() if isinstance(member, triton.JITFunction)}
    return groups


def floor_milliseconds(
    config: ModelConfig, tokens: int, parameters: int, machine: Mapping[str, Any]
) -> dict[str, float]:
    """Return the least time of each group that has one: FLOPs at the measured rate of a product, bytes of a copy."""
    D, E, S = config.d_model, config.expanded_dim, config.qk_dim
    product, copy = 1e-9 / machine["matmul_tflops"], 1e-6 / machine["copy_gb_per_s"]
    return {
        "projections": 3 * 2 * tokens * config.n_layers * D * (3 * E + S) * product,
        "head": 3 * 2 * tokens * D * config.vocab_size * product,
        "op": tokens * config.n_layers * (8 * E + 3 * S) * BYTES * copy,
        "norms": tokens * config.n_layers * 9 * D * BYTES * copy,  # forward 2 read, 2 written; backward 3 and 2
        "optimizer": 7 * BYTES * parameters * copy,  # it, gradient and moments read, all but the gradient written
    }


def profile_step(
    entrant: Entrant, size: Size, context: int, *, compiled: str, device: torch.device, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Profile the training step of a model and return its stages, slowest first, with their floors.

    Stages come in groups: a row for each group, then its members, which have an `inside`.
    """
    batch = size.batch(context)
    model = models.build(entrant, size, context, device, torch.bfloat16)
    config = models.model_config(model)
    assert isinstance(config, ModelConfig), f"{entrant.title} has no stages here"
    parameters, _ = models.model_size(model, context)
    with entrant.chosen_attention():
        step = TrainingStep(model, batch, context, device, compiled)
        step_milliseconds(step, 2)
        milliseconds = sorted(step_milliseconds(step, 5))[2]
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        with profile(activities=activities, record_shapes=True) as profiler:
            step_milliseconds(step, PROFILED_STEPS)
    stages = group_events(profiler.events(), config, own_kernel_groups())
    floors = floor_milliseconds(config, batch * context, parameters, machine)
    rows = []
    for group in sorted({name.partition(",")[0] for name in stages}):
        members = {name: stage for name, stage in stages.items() if name.partition(",")[0] == group}
        rows.append(_row(group, list(members.values()), floors.get(group)))
        for name, stage in sorted(members.items(), key=lambda item: -item[1].milliseconds) if len(members) > 1 else []:
            floor = 1e-9 * stage.flops / PROFILED_STEPS / machine["matmul_tflops"] if stage.flops else None
            rows.append({"inside": group} | _row(name.partition(", ")[2], [stage], floor))
    return {
        "title": entrant.title,
        "context": context,
        "tokens_per_step": batch * context,
        "ms": milliseconds,
        "stages": rows,
    }


def _row(name: str, stages: Sequence[Stage], floor: float | None) -> dict[str, Any]:
    return {
        "stage": name,
        "calls": sum(stage.calls for stage in stages) / PROFILED_STEPS,
        "ms": sum(stage.milliseconds for stage in stages) / PROFILED_STEPS,
        "floor_ms": floor,
    }
