"""The models that `benchmarks.step` trains, and the sizes at which FLASH meets its peers."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.plain_flash import PlainFlashLM
from flash_model import baselines, config
from flash_model.baselines import TransformerConfig, TransformerLM
from flash_model.config import ModelConfig, ModelFlops
from flash_model.init import initial_distribution
from flash_model.lm import FlashLM


@dataclass(frozen=True)
class Size:
    """A size of model: two gated attention units stand for one layer of a Transformer."""

    d_model: int
    transformer_layers: int
    tokens_per_step: int
    contexts: tuple[int, ...]
    vocab_size: int = 32_000
    head_dim: int = 64
    qk_dim: int = 128
    chunk_size: int = 256

    def batch(self, context: int) -> int:
        """Sequences in a step: one at least, however long."""
        return max(1, self.tokens_per_step // context)


SIZES: Mapping[str, Size] = {
    "110m": Size(768, 12, 65_536, (512, 2048, 8192, 32_768, 131_072)),
    "1.3b": Size(2048, 24, 32_768, (512, 8192, 32_768)),
    "tiny": Size(64, 1, 512, (128, 256), vocab_size=512, head_dim=32, qk_dim=16, chunk_size=64),
}


def _flash(size: Size, context: int) -> FlashLM:
    return FlashLM(_flash_config(size, "flash", context))


def _plain_flash(size: Size, context: int) -> FlashLM:
    return PlainFlashLM(_flash_config(size, "flash", context))


def _flash_quad(size: Size, context: int) -> FlashLM:
    return FlashLM(_flash_config(size, "flash_quad", context))


def _flash_config(size: Size, architecture: str, context: int) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "architecture": architecture,
            "vocab_size": size.vocab_size,
            "d_model": size.d_model,
            "n_layers": 2 * size.transformer_layers,
            "qk_dim": size.qk_dim,
            "chunk_size": size.chunk_size,
            "norm_length": context,
        }
    )


def _transformer(architecture: str, widening: int = 1) -> Callable[[Size, int], TransformerLM]:
    def build(size: Size, _context: int) -> TransformerLM:
        fields = {
            "architecture": architecture,
            "vocab_size": size.vocab_size,
            "d_model": size.d_model,
            "n_layers": size.transformer_layers,
            "head_dim": widening * size.head_dim,
        }
        return TransformerLM(TransformerConfig.model_validate(fields))

    return build


@dataclass(frozen=True)
class Entrant:
    """A model to be timed. `group`: its line in a plot. `attention`: the fused attention that torch must use."""

    title: str
    group: str
    build: Callable[[Size, int], nn.Module]
    attention: SDPBackend | None = None
    by_default: Callable[[int], bool] = lambda context: True
    """Whether a context is measured when no model was asked for by name."""

    def chosen_attention(self) -> AbstractContextManager[None]:
        """Inside it, and when traced inside it, attention runs on `attention`."""
        return nullcontext() if self.attention is None else sdpa_kernel(self.attention)


FA2, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
LONG_CONTEXT = 131_072

ENTRANTS: Mapping[str, Entrant] = {
    "flash": Entrant("FLASH", "FLASH", _flash),
    "t++-fa2": Entrant("Transformer++, FA2", "Transformer++", _transformer("transformer++"), FA2),
    "t++-cudnn": Entrant("Transformer++, cuDNN", "Transformer++", _transformer("transformer++"), CUDNN),
    "flash-plain": Entrant("FLASH in plain torch", "FLASH in plain torch", _plain_flash),
    "t++-wide-fa2": Entrant(
        "Transformer++, heads twice as wide, FA2",
        "Transformer++, wide heads",
        _transformer("transformer++", 2),
        FA2,
        lambda context: context >= LONG_CONTEXT,
    ),
    "t++-wide-cudnn": Entrant(
        "Transformer++, heads twice as wide, cuDNN",
        "Transformer++, wide heads",
        _transformer("transformer++", 2),
        CUDNN,
        lambda context: context >= LONG_CONTEXT,
    ),
    "flash-quad": Entrant("FLASH-Quad", "FLASH-Quad", _flash_quad, None, lambda context: context <= 8192),
    "t+-fa2": Entrant("Transformer+, FA2", "Transformer+", _transformer("transformer+"), FA2, lambda context: False),
    "t-fa2": Entrant("Transformer, FA2", "Transformer", _transformer("transformer"), FA2, lambda context: False),
}


@torch.no_grad()
def build(entrant: Entrant, size: Size, context: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Build the model for sequences of `context` tokens with the initial distribution of training.

    Drawn on the device, unlike `initialize`: a billion normal numbers take a CPU longer than the benchmark itself.
    """
    with torch.device("meta"):
        model = entrant.build(size, context)
    model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    config = model_config(model)
    for name, parameter in model.named_parameters():
        mean, std = initial_distribution(name, config)
        parameter.normal_(mean, std, generator=generator)
    return model


def model_config(model: nn.Module) -> ModelConfig | TransformerConfig:
    """Return the config of a language model of this project."""
    assert isinstance(model, FlashLM | TransformerLM)
    return model.config


def model_size(model: nn.Module, context: int) -> tuple[int, ModelFlops]:
    """Return parameters and model FLOPs per token, by formula."""
    if isinstance(model, TransformerLM):
        return baselines.count_parameters(model.config), baselines.flops_per_token(model.config, context)
    assert isinstance(model, FlashLM)
    return config.count_parameters(model.config), config.flops_per_token(model.config, context)
