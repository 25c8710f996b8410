"""The baselines: what they compute, what they may see, parameters, FLOPs, initial values."""

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flash_model.baselines import (
    TransformerConfig,
    TransformerLayer,
    TransformerLM,
    build_baseline,
    count_parameters,
    flops_per_token,
)
from flash_model.lm import decayed_parameters

ARCHITECTURES = get_args(TransformerConfig.model_fields["architecture"].annotation)
SMALL: dict[str, Any] = {"vocab_size": 50, "d_model": 24, "n_layers": 3, "head_dim": 8}


def config_of(architecture: str, **changes: Any) -> TransformerConfig:
    return TransformerConfig(**{**SMALL, "architecture": architecture, **changes})


def some_tokens(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (B, T), generator=torch.Generator().manual_seed(seed))


def lively(config: TransformerConfig) -> TransformerLM:
    """A float64 model whose every parameter is far from zero, so that no part of it can be forgotten."""
    model = build_baseline(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def norm(x: list[float], weight: Tensor, bias: Tensor, eps: float) -> list[float]:
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    scaled = [(value - mean) / math.sqrt(variance + eps) for value in x]
    return [value * w + b for value, w, b in zip(scaled, weight.tolist(), bias.tolist(), strict=True)]


def dense(x: list[float], weight: Tensor) -> list[float]:
    return [sum(w * value for w, value in zip(row, x, strict=True)) for row in weight.tolist()]


def add(x: list[float], y: list[float]) -> list[float]:
    return [a + b for a, b in zip(x, y, strict=True)]


def rotated(x: list[float], position: int) -> list[float]:
    half = len(x) // 2
    angles = [position * 10000.0 ** (-k / half) for k in range(half)]
    first = [x[k] * math.cos(angles[k]) - x[k + half] * math.sin(angles[k]) for k in range(half)]
    return first + [x[k + half] * math.cos(angles[k]) + x[k] * math.sin(angles[k]) for k in range(half)]


def layer_by_hand(layer: TransformerLayer, x_TD: list[list[float]], reads: Callable[[int, int], bool]) -> Tensor:
    """The layer in scalars, token by token, from the formulas of a pre-norm Transformer."""
    config, K, D = layer.config, layer.config.head_dim, layer.config.d_model
    normed = [norm(x, layer.attention_norm.weight, layer.attention_norm.bias, config.norm_eps) for x in x_TD]
    qkv = [dense(x, layer.project_qkv.weight) for x in normed]
    out = []
    for i, x in enumerate(x_TD):
        attended = []
        for head in range(0, D, K):

            def part(j: int, which: int, head: int = head) -> list[float]:
                values = qkv[j][which * D + head : which * D + head + K]
                return rotated(values, j) if config.rotary and which < 2 else values

            read = [j for j in range(len(x_TD)) if reads(i, j)]
            query = part(i, 0)
            scores = [sum(a * b for a, b in zip(query, part(j, 1), strict=True)) / math.sqrt(K) for j in read]
            weights = [math.exp(score) for score in scores]
            for k in range(K):
                summed = sum(weight * part(j, 2)[k] for weight, j in zip(weights, read, strict=True))
                attended.append(summed / sum(weights))
        x = add(x, dense(attended, layer.project_attended.weight))
        expanded = dense(
            norm(x, layer.feed_forward_norm.weight, layer.feed_forward_norm.bias, config.norm_eps), layer.expand.weight
        )
        if config.gated:
            F = len(expanded) // 2
            hidden = [g / (1 + math.exp(-g)) * v for g, v in zip(expanded[:F], expanded[F:], strict=True)]
        else:
            hidden = [h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in expanded]
        out.append(add(x, dense(hidden, layer.contract.weight)))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_layer_is_its_formula(architecture: str, causal: bool) -> None:
    model = lively(config_of(architecture, causal=causal))
    x = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    layer = model.layers[1]
    assert isinstance(layer, TransformerLayer)
    expected = layer_by_hand(layer, x[0].tolist(), lambda i, j: j <= i or not causal)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, model._rotation(x), None)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_changing_a_token_changes_no_earlier_output(architecture: str) -> None:
    model = lively(config_of(architecture))
    tokens = some_tokens(2, 20)
    changed = tokens.clone()
    changed[:, 11] = (changed[:, 11] + 1) % 50
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :11], after[:, :11])
    assert (before[:, 11:] != after[:, 11:]).any(-1).all()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_documents_do_not_read_each_other(causal: bool) -> None:
    model = lively(config_of("transformer++", causal=causal))
    tokens = some_tokens(1, 20)
    doc_ids = torch.tensor([[0] * 7 + [1] * 13])
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 50
    with torch.no_grad():
        before, after = model(tokens, doc_ids=doc_ids), model(changed, doc_ids=doc_ids)
    assert torch.equal(before[:, 7:], after[:, 7:])
    assert not torch.equal(before[:, :7], after[:, :7])
    with torch.no_grad():
        first_alone = model(tokens[:, :7])
    torch.testing.assert_close(before[:, :7], first_alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_bfloat16_model_is_near_its_float64_self(architecture: str) -> None:
    """Rotations of bfloat16 queries come from tables of float32, and nothing leaves the model's dtype."""
    model = lively(config_of(architecture))
    tokens = some_tokens(2, 40)
    with torch.no_grad():
        expected = model(tokens)
        logits = model.to(torch.bfloat16)(tokens)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_and_flops_by_formula(architecture: str, causal: bool) -> None:
    """torch counts all of a causal attention, the formula its half; forward and backward count three times forward."""
    config = config_of(architecture, causal=causal)
    model, tokens = build_baseline(config, dtype=torch.float64), some_tokens(2, 32)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    flops = flops_per_token(config, 32)
    assert flops.local == 3 * 4 * 32 * 24 / (2 if causal else 1)
    counter = FlopCounterMode(display=False)
    # Its fused attention on the CPU is one that torch does not count.
    with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
        model(tokens)
    assert counter.get_total_flops() == 64 * (flops.forward + (flops.local if causal else 0))
    assert flops.training == 3 * flops.forward


@pytest.mark.parametrize(("d_model", "n_layers", "millions"), [(768, 12, 110), (2048, 24, 1280)])
def test_a_layer_keeps_twelve_d_squared(d_model: int, n_layers: int, millions: float) -> None:
    sizes: dict[str, Any] = {"vocab_size": 32_000, "d_model": d_model, "n_layers": n_layers}
    counts = [count_parameters(TransformerConfig(architecture=name, **sizes)) for name in ARCHITECTURES]
    for count in counts:
        assert count == pytest.approx(12 * n_layers * d_model**2 + 32_000 * d_model, rel=6e-3)
        assert count / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("d_model", [128, 512, 1024])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_loss_is_that_of_guessing(architecture: str, d_model: int) -> None:
    config = config_of(architecture, vocab_size=4096, d_model=d_model, n_layers=4, head_dim=64)
    tokens = torch.randint(0, 4096, (1, 129), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        nats = build_baseline(config)(tokens[:, :-1], tokens[:, 1:]) / 128
    assert float(nats) == pytest.approx(math.log(4096), rel=0.03)


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    config = config_of("transformer++")
    first = build_baseline(config, seed=5).state_dict()
    torch.manual_seed(2)
    deeper = build_baseline(config.model_copy(update={"n_layers": 4}), seed=5).state_dict()
    for name, values in first.items():
        assert torch.equal(deeper[name], values), name
    assert not torch.equal(build_baseline(config, seed=6).embedding.weight, first["embedding.weight"])


def test_weight_decay_is_for_matrices() -> None:
    model = build_baseline(config_of("transformer"), device="meta")
    kept = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    assert decayed_parameters(model) == {name for name, _ in model.named_parameters()} - kept


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("d_model", {"d_model": 20}),
        ("head_dim", {"d_model": 21, "head_dim": 7}),
        ("head_scale", {"head_scale": 0.0}),
        ("n_head", {"n_head": 4}),
    ],
)
def test_impossible_configs_name_the_key(named: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=named):
        config_of("transformer++", **change)
