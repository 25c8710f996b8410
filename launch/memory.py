"""Memory of a training process by formula, before any device is touched.

What DeepSpeed 0.19.8 allocates for each ZeRO stage is read from its source, what a layer keeps for backward from
flash_model/; tests compare both with what torch really allocates, by operation. All sizes are in bytes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flash_model.config import ModelConfig, count_parameters
from flash_model.loss import logits_rows
from launch.config import RunConfig
from launch.deepspeed_config import deepspeed_config

PARTS = ("weights", "gradients", "optimizer", "activations", "temporary", "buffers")
MIB, GIB = 2**20, 2**30
CUBLAS_WORKSPACES = 64 * MIB
"""On Hopper 32 MiB for each of the two threads, of forward and of backward, that ask for products."""
OUTSIDE_TORCH = 1024 * MIB
"""What a device needs beside torch's allocations: the CUDA context, NCCL, compiled kernels, holes between blocks."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device when it needs most of them, by what they are for, and on the host for what is offloaded."""

    parts: dict[str, float]
    moment: str
    host: float = 0.0

    @property
    def total(self) -> float:
        """Sum of the parts: the most that torch has allocated at a time."""
        return sum(self.parts.values())

    def fits(self, device_bytes: float) -> bool:
        """Whether a device of `device_bytes` is large enough, with what is outside of torch."""
        return self.total + OUTSIDE_TORCH <= device_bytes


def estimate_memory(config: RunConfig, world_size: int, stage: int | None = None) -> Memory:
    """The most that a step needs on each of `world_size` devices, with another ZeRO `stage` if it is given.

    A step needs most where the head's logits are made, in the backward pass of some layer, where gradients are reduced,
    or in the update: the largest of these moments counts.
    """
    if stage is not None and stage != config.train.zero_stage:
        config = config.model_copy(update={"train": config.train.model_copy(update={"zero_stage": stage})})
    states = _training_states(config, world_size)
    always = {"weights": states.weights, "optimizer": states.optimizer, "buffers": states.buffers}
    moment, then = max(_moments(config, states, world_size), key=lambda found: sum(found[1].values()))
    parts = {name: always.get(name, 0.0) + then.get(name, 0.0) for name in PARTS}
    return Memory(parts, moment, states.host)


def fitting_settings(config: RunConfig, world_size: int, device_bytes: float) -> list[str]:
    """Overrides of the configuration with which a step fits a device of `device_bytes`, each with its GiB.

    For each setting the mildest value that is enough by itself; if there is none, the mildest of a few combinations.
    """
    milder: list[tuple[dict[str, Any], ...]] = [
        tuple({"activation_checkpointing": value} for value in (4, 2, "all")),
        tuple({"micro_batch": size} for size in _smaller_batches(config)),
        tuple({"zero_stage": stage} for stage in (1, 2, 3) if stage > config.train.zero_stage),
        ({"offload": "optimizer"}, {"offload": "all", "zero_stage": 3}),
    ]
    all_layers, smallest = {"activation_checkpointing": "all"}, {"micro_batch": min([1, *_smaller_batches(config)])}
    combined: list[dict[str, Any]] = [
        {**all_layers, "zero_stage": 3},
        {**all_layers, **smallest},
        {**all_layers, **smallest, "zero_stage": 3},
        {**all_layers, "zero_stage": 3, "offload": "all"},
        {**all_layers, **smallest, "zero_stage": 3, "offload": "all"},
    ]
    found = [_first_that_fits(config, world_size, device_bytes, options) for options in milder]
    if not any(found):
        found = [_first_that_fits(config, world_size, device_bytes, combined)]
    return [setting for setting in found if setting]


def _smaller_batches(config: RunConfig) -> list[int]:
    size = config.train.micro_batch
    return [smaller for smaller in range(size - 1, 0, -1) if size % smaller == 0]


def _first_that_fits(
    config: RunConfig, world_size: int, device_bytes: float, options: Iterable[dict[str, Any]]
) -> str | None:
    for option in options:
        train = config.train.model_copy(update=option)
        stage, changed = train.zero_stage, config.model_copy(update={"train": train})
        possible = train.offload == "none" or stage == 3 or (train.offload == "optimizer" and stage > 0)
        weaker = len(changed.recomputed_layers) < len(config.recomputed_layers)
        if possible and not weaker and train != config.train:
            needed = estimate_memory(changed, world_size)
            if needed.fits(device_bytes):
                overrides = " ".join(f"train.{key}={value}" for key, value in option.items())
                return f"{overrides} ({needed.total / GIB:.1f} GiB)"
    return None


@dataclass
class _States:
    """What does not depend on the batch."""

    weights: float = 0.0
    """Parameters in the precision of the model, whole or this process's part."""
    optimizer: float = 0.0
    """Float32 weights and moments, once the first update is done."""
    buffers: float = CUBLAS_WORKSPACES
    host: float = 0.0
    accumulated: float = 0.0
    """Gradients kept from one micro batch to the next, and at the time of the update."""
    bucket: float = 0.0
    """Allocated while a backward pass runs."""
    bucket_elements: float = field(default=float("inf"))
    """Gradient elements after which a reduction takes place in the middle of backward; infinite: only at its end."""
    reduction: float = 0.0
    """Temporary tensors of a reduction."""
    update: float = 0.0
    """Temporary tensors of the update."""
    whole_gradients: bool = False
    """Whether each parameter's gradient stays until the end of the backward pass."""


def _training_states(config: RunConfig, world_size: int) -> _States:
    """What DeepSpeed allocates, by stage, precision and offload."""
    P, stage, offload = count_parameters(config.model), config.train.zero_stage, config.train.offload != "none"
    largest = config.model.vocab_size * config.model.d_model
    settings = deepspeed_config(config, 1)["zero_optimization"]
    bf16 = config.train.precision == "bf16"
    width, share = (2 if bf16 else 4), P / world_size
    found = _States()
    if stage == 0:
        # AdamW on the parameters themselves; all gradients are flattened for the sum over processes.
        found.weights, found.optimizer, found.whole_gradients, found.accumulated = 4 * P, 8 * P, True, 4 * P
        found.reduction = 4 * min(P, 5e8) if world_size > 1 else 0
        return found
    bucket = float(settings.get("reduce_bucket_size", 5e8))
    reduced = min(bucket, P)
    master, moments = 4 * share, 8 * share
    if stage == 3:
        found.weights = _stage3_weights(config, world_size, settings, width)
        found.buffers += 4 * bucket  # of the type that gradients are reduced in
        found.bucket_elements = bucket
        # Gradients in float32, one after another in a flat copy, and this process's part of their sum.
        found.reduction = 8 * reduced if world_size == 1 else (4 + 4 + 4 / world_size) * reduced
        subgroup = min(share, float(settings.get("sub_group_size", 1e9)))
        if offload:
            found.host = master + moments + 8 * share + (width * share if config.train.offload == "all" else 0)
        else:
            found.optimizer, found.buffers, found.update = master + moments, found.buffers + 4 * share, 4 * subgroup
        return found
    found.weights = width * P
    if bf16 and stage == 1 and not offload:
        # One float32 gradient for all of the model, whose sum over processes, be it one, is taken in a flat copy.
        found.optimizer, found.buffers = master + moments, found.buffers + 4 * P
        found.whole_gradients, found.accumulated = True, width * P
        found.reduction = 4 * P
        return found
    # A bucket for each backward pass; what is in it is flattened and, in bf16, widened to be reduced.
    accumulates_whole = bf16 and stage == 1
    bucket_width = 4 if accumulates_whole else width
    found.bucket, found.bucket_elements = bucket_width * bucket, bucket
    found.reduction = (bucket_width + (4 if bucket_width == 2 else 0)) * reduced
    if not bf16:
        # The gradients of a micro batch stand beside the sum of those before.
        found.reduction += 4 * (P if stage == 1 else share)
    found.accumulated = 4 * (P if stage == 1 else share) + (4 * share if accumulates_whole else 0)
    found.update = 0 if offload or bf16 else 4 * share
    if offload:
        found.host = master + moments + 4 * share + width * share
        found.buffers += width * largest
        if not bf16:
            found.accumulated = 0
            found.host += 4 * share
    else:
        found.optimizer = master + moments
    return found


def _stage3_weights(config: RunConfig, world_size: int, settings: dict[str, Any], width: int) -> float:
    """This process's part of the parameters, and those that are gathered at a time."""
    P = count_parameters(config.model)
    on_host = config.train.offload == "all"
    kept = 0 if on_host else width * P / world_size
    if world_size == 1 and not on_host:
        return kept  # nothing to gather
    # Until it is used again within the reuse distance a parameter stays, and as many are gathered ahead as may live.
    reuse, live = (float(settings.get(f"stage3_{key}", 1e9)) for key in ("max_reuse_distance", "max_live_parameters"))
    needed = max(config.model.vocab_size * config.model.d_model, layer_parameters(config.model))
    return kept + width * min(P, max(reuse / 2, live, needed))


def layer_parameters(model: ModelConfig) -> int:
    """Learned parameters of one layer."""
    return count_parameters(model.model_copy(update={"n_layers": 2})) - count_parameters(
        model.model_copy(update={"n_layers": 1})
    )


def _moments(config: RunConfig, states: _States, world_size: int) -> Iterator[tuple[str, dict[str, float]]]:
    """What is there at the moments that may need most, beside what is there all the time."""
    model, width = config.model, 2 if config.train.precision == "bf16" else 4
    tokens = config.train.micro_batch * config.data.seq_len
    D, V, P = model.d_model, model.vocab_size, count_parameters(model)
    several = config.samples_per_step > config.train.micro_batch * world_size
    # From the second micro batch on gradients of the ones before are there.
    before = states.accumulated if several else 0.0
    layer, recomputed = tokens * _kept_per_token(model, width) + _kept_bias(model), config.recomputed_layers
    kept = [tokens * D * width if number in recomputed else layer for number in range(model.n_layers)]
    sinusoids = 4 * config.data.seq_len * D if model.scaled_sin else 0
    activations = sum(kept) + sinusoids

    hidden, head_gradient = tokens * D * width, 4 * V * D
    logits = logits_rows(tokens, V, "cuda") * -(-V // 64) * 64 * width
    # What enters the head (uncompiled, the last layer's update too), its norm and the gradient of that; then that
    # gradient scaled in float32.
    entering = (1 if config.train.compile else 2) * hidden
    head = head_gradient + max(entering + 2 * hidden + logits, 2 * hidden + max(8 * tokens * D, head_gradient))
    norm = 12 * tokens * D if model.norm == "scalenorm" else 0  # in plain torch
    yield "the head", {"gradients": before, "activations": activations, "temporary": head + norm}

    transient = tokens * _backward_per_token(model, width)
    per_layer, done = layer_parameters(model), 0
    flushed = False
    for number in reversed(range(model.n_layers)):
        gradients = max(before, width * done) if states.whole_gradients else before
        again = layer if number in recomputed else 0.0
        present = {
            "gradients": gradients + width * V * D,
            "activations": activations + again,
            "temporary": transient,
            "buffers": states.bucket,
        }
        yield f"backward of layer {number}", present
        activations -= kept[number]
        done += per_layer
        if not flushed and done >= states.bucket_elements:
            flushed = True
            reducing = {"temporary": states.reduction, "activations": activations}
            yield f"reducing gradients after layer {number}", present | reducing
    gradients = max(width * P if states.whole_gradients else width * V * D, states.accumulated)
    reducing = {"gradients": gradients, "temporary": states.reduction, "buffers": states.bucket}
    yield "reducing gradients", reducing
    yield "the update", {"gradients": states.accumulated, "temporary": states.update}
    if config.train.offload != "none":
        # All parameters, where they stay in a flat copy too.
        yield "the building of the engine", {"temporary": (1 if config.train.offload == "all" else 2) * width * P}


def _kept_per_token(model: ModelConfig, width: int) -> float:
    """Bytes that a layer keeps for backward: its input, the projection before SiLU, the op's output, the states of
    chunks, and of the norm two float32."""
    D, E, S = model.d_model, model.expanded_dim, model.qk_dim
    return width * (D + 2 * E + S + E + _states_per_token(model)) + 8


def _kept_bias(model: ModelConfig) -> float:
    """Bytes kept to differentiate a layer's bias of two rotary vectors."""
    return 8 * model.qk_dim * model.bias_extent if model.bias_form == "rotary" else 0


def _states_per_token(model: ModelConfig) -> float:
    """Elements of the chunks' states."""
    if model.architecture != "flash":
        return 0.0
    return (1 if model.causal else 2) * model.qk_dim * model.expanded_dim / model.chunk_size


def _backward_per_token(model: ModelConfig, width: int) -> float:
    """Bytes that the backward pass of a layer's op allocates: gradients of its output, what was attended and uvz, the
    heads and scores made again, and their gradients."""
    D, E, S, C = model.d_model, model.expanded_dim, model.qk_dim, model.chunk_size
    if model.architecture == "flash":
        routes = 1 if model.causal else 2
        heads = (3 + 6 * routes) * S + 2 * routes * C
        sums = 4 * E / C + 4 * E / 128 + 4 * S * E / (5 * C)
        return width * (D + 4 * E + heads + _states_per_token(model)) + sums
    strip = 2048  # flash_model.ops.triton_quadratic.STRIP: scores and their gradients of so many keys
    return width * (D + E + E + 2 * E + S + 2 * S + E + 2 * strip) + 8 * S
