"""Training steps of a small model on a GPU: the same bits twice, and compiled the gradients of an exact model."""

from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_model.config import ModelConfig
from flash_model.lm import FlashLM, build_model
from tests.gpu.comparison import DEVICE, relative_errors

pytestmark = pytest.mark.gpu

ARCHITECTURES = pytest.mark.parametrize("architecture", ["flash", "flash_quad"])


@pytest.fixture
def deterministic() -> Generator[None]:
    """What `deterministic: true` in a run's configuration sets."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def build(architecture: Any, dtype: torch.dtype) -> FlashLM:
    config = ModelConfig(
        architecture=architecture,
        vocab_size=1000,
        d_model=128,
        n_layers=2,
        qk_dim=64,
        chunk_size=128,
        norm_length=512,
        init_std=0.1,
    )
    return build_model(config, device=DEVICE, dtype=dtype)


def batch(step: int) -> dict[str, Tensor]:
    """Few pieces, so that many tokens add to the same row of the embedding's gradient."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 40, (2, 401), generator=generator)
    doc_ids = (torch.rand(2, 400, generator=generator) < 0.01).long().cumsum(1)
    loss_mask = torch.rand(2, 400, generator=generator) < 0.9
    parts = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "doc_ids": doc_ids, "loss_mask": loss_mask}
    return {name: x.to(DEVICE) for name, x in parts.items()}


def train(architecture: str, compiled: bool, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final parameters of a fresh model."""
    torch._dynamo.reset()
    model = build(architecture, torch.bfloat16)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=DEVICE.type == "cuda")
    losses = []
    for step in range(steps):
        loss = forward(**batch(step)) / 720
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


@ARCHITECTURES
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.usefixtures("deterministic")
def test_two_runs_have_the_same_bits(architecture: str, compiled: bool) -> None:
    losses, parameters = train(architecture, compiled, steps=5)
    losses_again, parameters_again = train(architecture, compiled, steps=5)
    assert losses[-1] < 0.9 * losses[0]
    assert losses == losses_again
    assert [name for name, x in parameters.items() if not torch.equal(x, parameters_again[name])] == []


@ARCHITECTURES
def test_a_compiled_model_has_the_gradients_of_an_exact_one(architecture: str) -> None:
    torch._dynamo.reset()

    def gradients(model: FlashLM, forward: Any) -> dict[str, Tensor]:
        model.zero_grad()
        forward(**batch(0)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model = build(architecture, torch.float32)
    compiled = gradients(model, torch.compile(model, fullgraph=True))
    exact = gradients(model.double(), model)
    assert len(exact) == len(list(model.parameters()))
    errors = relative_errors(compiled, exact)
    assert max(errors.values()) < 1e-4, errors
