"""Head and cross-entropy as one op, and the embedding lookup: values, gradients, registration, compilation."""

from collections.abc import Generator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import flash_model.loss
from flash_model.config import ModelConfig
from flash_model.embedding import embed
from flash_model.lm import build_model
from flash_model.loss import linear_cross_entropy

CONFIG = ModelConfig(vocab_size=50, d_model=16, n_layers=2, qk_dim=8, chunk_size=8)


def drawn(N: int, D: int, V: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D) and weight (V, D), to be differentiated in, and targets (N,)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,), generator=generator)


@pytest.fixture(params=[2**25, 7 * 50, 1], ids=["one block", "blocks", "single rows"])
def logits_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(flash_model.loss.LOGITS_AT_ONCE, "cpu", request.param)


@pytest.mark.usefixtures("logits_at_once")
def test_the_loss_is_the_sum_of_nats_over_unmasked_targets() -> None:
    model = build_model(CONFIG, dtype=torch.float64)
    tokens, targets = torch.randint(0, 50, (2, 2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(2)) < 0.7
    log_probs = model(tokens).log_softmax(-1)
    expected = -(log_probs.gather(2, targets[..., None])[..., 0] * mask).sum()
    expected_grads = torch.autograd.grad(expected, list(model.parameters()), retain_graph=True)
    masked_targets = targets.where(mask, -100)
    for loss_mask in (mask, mask.float(), mask.int()):
        loss = model(tokens, masked_targets, loss_mask)
        torch.testing.assert_close(loss, expected.detach(), check_dtype=True, rtol=1e-12, atol=0)
        grads = torch.autograd.grad(2 * loss, list(model.parameters()))
        torch.testing.assert_close(list(grads), [2 * g for g in expected_grads], rtol=1e-10, atol=1e-12)
    assert model(tokens, targets).item() == pytest.approx(-log_probs.gather(2, targets[..., None]).sum().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("logits_at_once")
def test_rounded_losses_are_as_close_as_plain_torch(dtype: torch.dtype) -> None:
    *exact, targets = drawn(60, 16, 50)
    plain, ours = ([t.detach().to(dtype).requires_grad_() for t in exact] for _ in range(2))
    losses = {
        "exact": linear_cross_entropy(exact[0], exact[1], targets),
        "plain": F.cross_entropy((plain[0] @ plain[1].T).float(), targets, reduction="sum"),
        "ours": linear_cross_entropy(ours[0], ours[1], targets),
    }
    assert losses["ours"].dtype == torch.float32
    for loss in losses.values():
        (loss * 0.3).backward()
    for k, reference in enumerate(exact):
        assert reference.grad is not None
        errors = []
        for tensor in (ours[k], plain[k]):
            assert tensor.grad is not None
            assert tensor.grad.dtype == dtype
            errors.append((tensor.grad.double() - reference.grad).norm().item())
        assert errors[0] < 1.5 * errors[1]


@pytest.fixture
def _new_memory_is_nan() -> Generator[None]:
    torch.use_deterministic_algorithms(True)  # with it, torch.empty fills with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [50, 64, 331])
@pytest.mark.usefixtures("_new_memory_is_nan")
def test_nothing_is_left_between_the_rows_of_logits(
    V: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 products on CPUs with AMX read on there: what nobody wrote then is NaN in a gradient, now and then."""
    hidden, weight, targets = drawn(60, 16, V, dtype)
    make_gradients = flash_model.loss._cross_entropy_

    def look_between(logits: Tensor, *arguments: Any) -> Tensor:
        rows = logits.as_strided((len(logits), logits.stride(0)), (logits.stride(0), 1))
        assert not rows[:, V:].any()
        return make_gradients(logits, *arguments)

    monkeypatch.setattr(flash_model.loss, "_cross_entropy_", look_between)
    for gradient in torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight)):
        assert gradient.isfinite().all()


def test_gradients_are_made_only_where_asked() -> None:
    hidden, weight, targets = drawn(4, 8, 6)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad
    for differentiated in ([hidden], [weight], [hidden, weight]):
        inputs = [t if any(t is d for d in differentiated) else t.detach() for t in (hidden, weight)]
        loss = linear_cross_entropy(inputs[0], inputs[1], targets)
        expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
        torch.testing.assert_close(
            torch.autograd.grad(loss, differentiated), torch.autograd.grad(expected, differentiated)
        )


def test_a_missing_gradient_is_an_error_and_not_zero() -> None:
    hidden, weight, targets = drawn(4, 8, 6)
    counts = torch.ones(4, dtype=torch.bool)
    nats, _, _ = torch.ops.flash_model.linear_cross_entropy(hidden, weight, targets, counts, False)
    with pytest.raises(RuntimeError, match="without gradients"):
        nats.backward()


def test_what_does_not_fit_is_named() -> None:
    hidden, weight, targets = drawn(4, 8, 6)
    with pytest.raises(ValueError, match=r"weight .*\(V, D\), D = 8"):
        linear_cross_entropy(hidden, weight[:, :7], targets)
    with pytest.raises(ValueError, match=r"weight is torch\.float32"):
        linear_cross_entropy(hidden, weight.float(), targets)
    with pytest.raises(ValueError, match=r"targets .*\(4,\)"):
        linear_cross_entropy(hidden, weight, targets[:3])
    with pytest.raises(ValueError, match=r"mask .*\(4,\)"):
        linear_cross_entropy(hidden, weight, targets, torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"targets .*float32"):
        linear_cross_entropy(hidden, weight, targets.float())
    with pytest.raises(ValueError, match=r"hidden .*\(\.\.\., D\)"):
        linear_cross_entropy(hidden[0, 0], weight, targets[0])


def test_no_token_at_all() -> None:
    hidden, weight, targets = drawn(0, 8, 6)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, weight)[0].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_passes_opcheck(dtype: torch.dtype) -> None:
    hidden, weight, targets = drawn(7, 4, 5, dtype)
    counts = torch.tensor([True, False, True, True, True, False, True])
    op = torch.ops.flash_model.linear_cross_entropy
    torch.library.opcheck(op, (hidden, weight, targets, counts, True))
    torch.library.opcheck(op, (hidden.detach(), weight.detach(), targets, counts, False))


def test_the_lookup_passes_opcheck() -> None:
    weight = torch.randn(5, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.flash_model.embed, (torch.tensor([[1, 1, 4], [0, 1, 2]]), weight))


def test_the_lookup_is_torchs() -> None:
    _, weight, tokens = drawn(40, 3, 6)
    tokens = tokens.view(2, 20)
    ours, expected = embed(tokens, weight), F.embedding(tokens, weight)
    assert torch.equal(ours, expected)
    (grad,) = torch.autograd.grad(ours.sin().sum(), weight)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sin().sum(), weight)[0])


def test_products_are_counted() -> None:
    hidden, weight, targets = drawn(12, 8, 20)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        linear_cross_entropy(hidden, weight, targets)
    assert counter.get_total_flops() == 2 * 12 * 8 * 20
    with counter:
        linear_cross_entropy(hidden, weight, targets).backward()
    assert counter.get_total_flops() == 3 * 2 * 12 * 8 * 20


def test_activation_checkpointing_keeps_the_gradients() -> None:
    hidden, weight, targets = drawn(12, 8, 20)
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    for reentrant in (False, True):
        tensors = [t.detach().requires_grad_() for t in (hidden, weight)]
        loss: Any = checkpoint(linear_cross_entropy, *tensors, targets, use_reentrant=reentrant)
        loss.backward()
        torch.testing.assert_close([t.grad for t in tensors], list(expected))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_has_the_gradients_of_an_eager_one(backend: str) -> None:
    """Compiled, an earlier form of the loss trained with a gradient of zero, without a word."""
    torch._dynamo.reset()
    model = build_model(CONFIG)
    tokens, targets = torch.randint(0, 50, (2, 2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(40).view(2, 20) % 3 > 0
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        scored = compiled(tokens, targets, mask)  # first, so that a graph without gradients is there to be misused
    loss = compiled(tokens, targets, mask)
    expected = model(tokens, targets, mask)
    torch.testing.assert_close(scored, expected.detach())
    torch.testing.assert_close(loss, expected)
    named = dict(model.named_parameters())
    grads, expected_grads = (torch.autograd.grad(x, list(named.values())) for x in (loss, expected))
    for name, grad, expected_grad in zip(named, grads, expected_grads, strict=True):
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5, msg=name)
