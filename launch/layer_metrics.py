"""Gradient and activation norms, layer by layer, on the steps that ask for them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.config import RunConfig
from launch.engine import Processes
from launch.evaluate import to_device
from pipeline.batches import Batch


class LayerMetrics:
    """Called by all processes. `layer_metrics.every_steps` says when; other steps cost nothing."""

    def __init__(self, config: RunConfig, engine: Any, processes: Processes) -> None:
        self._every = config.layer_metrics.every_steps
        self._engine, self._processes = engine, processes

    def due(self, step: int) -> bool:
        """Whether this step is one of those."""
        return self._every is not None and step % self._every == 0

    def activations(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Root mean square and largest absolute value of what leaves each layer, over the processes' first batches.

        A pass of its own without gradients, in front of the step's: hooks would break the graph of compiled layers.
        """
        layers = self._engine.module.layers
        squares = torch.zeros(len(layers) + 1, dtype=torch.float64, device=self._processes.device)
        largest = torch.zeros(len(layers), dtype=torch.float64, device=self._processes.device)

        def hook(number: int) -> Any:
            def look(layer: torch.nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
                # A layer hands on its input, its update and that one's bias, for the next one to add.
                x = sum(part.float() for part in outputs)
                assert isinstance(x, Tensor)
                squares[number] = x.square().sum(dtype=torch.float64)
                largest[number] = x.abs().max()
                if number == 0:
                    squares[-1] = x.numel()

            return look

        handles = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
        self._engine.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                self._engine(*to_device(batches[0], self._processes.device))
        finally:
            self._engine.train()
            for handle in handles:
                handle.remove()
        dist.all_reduce(squares)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        *sums, count = squares.tolist()
        width = len(str(len(layers) - 1))
        found = {}
        for number, (square, high) in enumerate(zip(sums, largest.tolist(), strict=True)):
            found[f"layers/activation_rms/{number:0{max(width, 2)}}"] = (square / count) ** 0.5
            found[f"layers/activation_max/{number:0{max(width, 2)}}"] = high
        return found

    def gradients(self, norms: dict[str, float]) -> dict[str, float]:
        """The names under which the gradient norms of `GradientNorms` are recorded."""
        width = max(2, len(str(len(self._engine.module.layers) - 1)))
        return {f"layers/grad_norm/{_numbered(layer, width)}": norm for layer, norm in norms.items()}


def _numbered(layer: str, width: int) -> str:
    """layers.3 → 03; other names stay."""
    first, _, number = layer.partition(".")
    return f"{int(number):0{width}}" if first == "layers" and number else layer
