"""Head and cross-entropy on a GPU against float64; bits; gradients of a compiled model; the embedding's gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flash_model.loss
from flash_model import triton_cross_entropy
from flash_model.config import ModelConfig
from flash_model.embedding import embed
from flash_model.lm import build_model
from flash_model.loss import linear_cross_entropy
from tests.gpu.comparison import DEVICE

pytestmark = pytest.mark.gpu

LAUNCHES = ((4096, 8), (8192, 16), (32_768, 32))
VOCABULARIES = (384, 32_000, 32_001, 50_257)


def drawn(N: int, D: int, V: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets and mask; logits of a few nats, some targets masked and out of range."""
    hidden = torch.randn(N, D, dtype=torch.float64, device=DEVICE)
    weight = torch.randn(V, D, dtype=torch.float64, device=DEVICE) * 3 * D**-0.5
    mask = torch.rand(N, device=DEVICE) < 0.8
    return hidden, weight, torch.randint(0, V, (N,), device=DEVICE).where(mask, -100), mask


def loss_and_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> list[Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, mask)
    return [loss.detach(), *torch.autograd.grad(loss * 0.3, (hidden, weight))]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> list[Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits, targets.where(mask, -100), reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss * 0.3, (hidden, weight))]


@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_are_those_of_plain_torch(
    dtype: torch.dtype, launch: tuple[int, int], V: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_cross_entropy, "LAUNCH", launch)
    monkeypatch.setitem(flash_model.loss.LOGITS_AT_ONCE, "cuda", 300 * V)
    problem = drawn(1000, 256, V)
    hidden, weight = problem[0].to(dtype), problem[1].to(dtype)
    exact = plain(hidden.double(), weight.double(), *problem[2:])
    ours, theirs = (f(hidden, weight, *problem[2:]) for f in (loss_and_gradients, plain))
    for found, other, reference in zip(ours, theirs, exact, strict=True):
        error, peer = (((x.double() - reference).norm() / reference.norm()).item() for x in (found, other))
        assert error < max(1.5 * peer, 1e-6)


def test_two_runs_give_the_same_bits() -> None:
    hidden, weight, *rest = drawn(10_000, 768, 32_000)
    first, second = (loss_and_gradients(hidden.bfloat16(), weight.bfloat16(), *rest) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_an_impossible_target_is_not_overlooked() -> None:
    hidden, weight, targets, mask = drawn(64, 64, 500)
    targets[mask.nonzero()[0]] = 500
    assert linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, mask).isnan()


def test_a_compiled_model_has_the_gradients_of_an_eager_one() -> None:
    torch._dynamo.reset()
    model = build_model(ModelConfig(vocab_size=512, d_model=64, n_layers=2, qk_dim=64, chunk_size=128), device=DEVICE)
    tokens, targets = torch.randint(0, 512, (2, 2, 256), device=DEVICE)
    compiled = torch.compile(model, fullgraph=True)
    named = dict(model.named_parameters())
    losses = [f(tokens, targets) for f in (model, compiled)]
    eager, fused = (torch.autograd.grad(loss, list(named.values())) for loss in losses)
    for name, a, b in zip(named, eager, fused, strict=True):
        assert a.abs().max() > 0, name
        assert ((a - b).norm() / a.norm()).item() < 1e-4, name


@pytest.mark.parametrize("tokens_at_once", [2_000, 65_536])
def test_the_gradient_of_the_embedding_is_deterministic_compiled_too(tokens_at_once: int) -> None:
    torch._dynamo.reset()
    weight = torch.randn(32_000, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    # Half of the tokens are one and the same, as in text.
    tokens = torch.randint(0, 32_000, (tokens_at_once,), device=DEVICE) * (
        torch.rand(tokens_at_once, device=DEVICE) < 0.5
    )
    grad = torch.randn(tokens_at_once, 256, device=DEVICE, dtype=torch.bfloat16)
    lookups = (embed, embed, torch.compile(embed, fullgraph=True))
    found = [torch.autograd.grad(lookup(tokens, weight), weight, grad)[0] for lookup in lookups]
    exact = torch.zeros(32_000, 256, device=DEVICE, dtype=torch.float64).index_add_(0, tokens, grad.double())
    assert ((found[0].double() - exact).norm() / exact.norm()).item() < 3e-3
    for other in found[1:]:
        assert torch.equal(found[0], other)
