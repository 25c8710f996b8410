"""Initial values: a pure function of (seed, parameter name)."""

import hashlib
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import nn


class InitialScale(Protocol):
    """What a model's config says about its initial values."""

    @property
    def d_model(self) -> int: ...

    @property
    def init_std(self) -> float: ...


Config = TypeVar("Config", bound=InitialScale)
Model = TypeVar("Model", bound=nn.Module)


def initial_distribution(name: str, config: InitialScale) -> tuple[float, float]:
    """Return mean and standard deviation of a parameter's initial values, by its name (paper, section 3)."""
    owner, _, leaf = f".{name}".rpartition(".")
    if owner.endswith("norm"):
        return (0.0 if leaf == "bias" else 1.0), 0.0
    if owner.endswith("positions"):
        return config.d_model**-0.5, 0.0
    if leaf in ("bias", "beta"):
        return 0.0, 0.0
    return 0.0, config.init_std


@torch.no_grad()
def initialize(model: nn.Module, config: InitialScale, seed: int) -> None:
    """Fill every parameter with its initial values, drawn on the CPU in float32 whatever its device and dtype."""
    for name, parameter in model.named_parameters():
        mean, std = initial_distribution(name, config)
        values = torch.full(parameter.shape, mean)
        if std:
            digest = hashlib.sha256(f"{seed} init {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            values.normal_(mean, std, generator=generator)
        parameter.copy_(values)


def build_initialized(
    module: Callable[[Config], Model],
    config: Config,
    *,
    seed: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Model:
    """Build the module of `config` on a device (None: the CPU) in dtype (None: float32), with its initial values.

    On the device "meta" nothing is allocated nor drawn.
    """
    with torch.device("meta"):
        model = module(config).to(dtype or torch.float32)
    device = torch.device(device or "cpu")
    if device.type != "meta":
        model.to_empty(device=device)
        initialize(model, config, seed)
    return model
