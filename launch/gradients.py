"""The gradient of a step between its last backward pass and the update: its norms by layer, and throwing it away.

Where DeepSpeed keeps it depends on precision, ZeRO stage and offload; all of that is known here and nowhere else.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from launch.engine import Processes

Share = tuple[torch.nn.Parameter, torch.Tensor]
"""A parameter and this process's share of its gradient."""


class GradientNorms:
    """Sums a step's loss over all processes, and with it the norm of each layer's gradient: one collective for both."""

    def __init__(self, engine: Any, processes: Processes) -> None:
        self._engine, self._processes = engine, processes
        layers: dict[str, int] = {}
        self._layer_of = {
            id(parameter): layers.setdefault(_layer_name(name), len(layers))
            for name, parameter in engine.module.named_parameters()
        }
        self._layers = list(layers)
        self._indices: dict[tuple[int, ...], torch.Tensor] = {}

    def reduce(self, nats: torch.Tensor) -> tuple[float, dict[str, float]]:
        """Sum of `nats` over all processes, and the norm before clipping of each layer's gradient, by layer.

        This waits for the GPU. Called by all processes after the last backward pass; all get the same numbers.
        """
        sums = torch.zeros(1 + len(self._layers), dtype=torch.float64, device=self._processes.device)
        sums[0] = nats
        layers, norms = [], []
        for parameter, norm in self._norms():
            layers.append(1 + self._layer_of[id(parameter)])
            norms.append(norm.to(self._processes.device))
        if norms:
            # In float32, as DeepSpeed's own check: a norm whose square overflows there is no number here either.
            squares = torch.stack(norms).float().square().double()
            sums.index_add_(0, self._on_device(tuple(layers)), squares)
        dist.all_reduce(sums)
        total, *by_layer = sums.tolist()
        return total, {name: math.sqrt(square) for name, square in zip(self._layers, by_layer, strict=True)}

    def _on_device(self, layers: tuple[int, ...]) -> torch.Tensor:
        """The same every step, as a rule; and a copy to the GPU waits until it has done all that it was given."""
        if layers not in self._indices:
            self._indices = {layers: torch.tensor(layers, device=self._processes.device)}
        return self._indices[layers]

    def _norms(self) -> Iterator[Share]:
        optimizer = self._engine.optimizer
        offloaded = getattr(optimizer, "norm_for_param_grads", None)  # only there with an offloaded optimizer
        if offloaded is not None:
            for parameter in self._engine.module.parameters():
                norm = offloaded.get(optimizer.get_param_id(parameter))
                if norm is not None:
                    yield parameter, torch.as_tensor(norm)
            return
        shares = list(_shares(self._engine, self._processes.rank))
        if shares:
            parameters, gradients = zip(*shares, strict=True)
            yield from zip(parameters, torch._foreach_norm(gradients), strict=True)


def total_norm(by_layer: dict[str, float]) -> float:
    """Norm of the whole gradient; infinite where its square is no float32."""
    square = sum(norm * norm for norm in by_layer.values())
    return math.sqrt(square) if square <= torch.finfo(torch.float32).max else square


def _layer_name(parameter: str) -> str:
    first, *rest = parameter.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first


def _shares(engine: Any, rank: int) -> Iterator[Share]:
    """Gradients that are whole in every process count in the first one."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        for parameter in engine.module.parameters():
            if rank == 0 and parameter.grad is not None:
                yield parameter, parameter.grad
    elif hasattr(optimizer, "fp32_groups_gradients"):  # stage 1 in bf16
        for group, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            if rank == 0:
                yield from zip(group, gradients, strict=True)
    else:
        groups = optimizer.fp16_groups if stage == 3 else optimizer.params_in_partition
        for number, group in enumerate(groups):
            gradients = [g for g in optimizer.averaged_gradients[number] if not getattr(g, "_zero_padding", False)]
            # What is left beyond the parameters is padding too.
            yield from zip(group, gradients, strict=False)


def discard_gradients(engine: Any) -> None:
    """Throw the accumulated gradient away, as if the step had never been: what `engine.step()` does on an overflow.

    Weights, moments and their counts of steps stay as they are. Called by all processes after the last backward pass.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer._overflow_clean_up(prev_scale=1.0)
    elif hasattr(optimizer, "fp32_groups_gradients"):
        optimizer.zero_grad()
    elif stage > 0:
        optimizer.micro_step_id = -1  # stage_1_and_2.INITIAL_MICRO_STEP_ID
        optimizer.zero_grad(set_to_none=True)
        if optimizer.cpu_offload:
            optimizer._offload_accumulated_param_ids = set()
            optimizer.reset_cpu_buffers()
        for number in optimizer.averaged_gradients:
            optimizer.averaged_gradients[number] = optimizer.all_grad_tensors[number] = None
    engine.zero_grad()
    # Tells DeepSpeed where the next step's accumulation begins.
    engine.micro_steps += 1
