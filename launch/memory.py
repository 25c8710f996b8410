"""Memory of a training process by formula, before any device is touched."""

from dataclasses import dataclass

from flash_model.config import count_parameters
from launch.config import RunConfig


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """Sum of the parts, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(config: RunConfig, world_size: int, stage: int) -> Memory:
    """Bytes on each of `world_size` devices under ZeRO `stage`.

    Parameters and gradients by dtype, AdamW's two moments and (bf16) the float32 weights, cut over the devices as the
    stage says; activations as the layers save them for backward. Buckets and fragmentation come on top.
    """
    parameters = count_parameters(config.model)
    bf16 = config.train.precision == "bf16"
    width = 2 if bf16 else 4
    weights = parameters * width / (world_size if stage == 3 else 1)
    # bf16 gradients are accumulated in float32 beside the bf16 ones of the running backward pass.
    gradients = parameters * (4 + 2 * bf16) / (world_size if stage >= 2 else 1)
    optimizer = parameters * (8 + 4 * bf16) / (world_size if stage >= 1 else 1)
    return Memory(weights, gradients, optimizer, _activations(config, width))


def _activations(config: RunConfig, width: int) -> float:
    model = config.model
    expanded = model.expansion * model.d_model
    # A layer keeps its input, the projection before SiLU, the op's output and (flash) a state for each chunk.
    states = model.qk_dim * expanded / model.chunk_size if model.architecture == "flash" else 0
    per_token = model.n_layers * width * (model.d_model + 2 * expanded + model.qk_dim + expanded + states)
    return config.train.micro_batch * config.data.seq_len * per_token
