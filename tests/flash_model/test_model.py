"""The language model: parameters, FLOPs, initial values, what it may see."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flash_model.config import ModelConfig, count_parameters, flops_per_token
from flash_model.flops import data_sheet_tflops
from flash_model.lm import FlashLM, build_model, decayed_parameters
from flash_model.positions import rotary_bias

SMALL: dict[str, Any] = {"vocab_size": 50, "d_model": 16, "n_layers": 3, "qk_dim": 8, "chunk_size": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "flash": {},
    "masked flash": {"causal": False, "norm": "scalenorm"},
    "flash with a rotary bias": {"chunk_size": 512},
    "toeplitz by choice": {"chunk_size": 512, "position_bias": "toeplitz"},
    "flash-quad": {"architecture": "flash_quad", "norm_length": 32},
    "masked flash-quad with a rotary bias": {"architecture": "flash_quad", "norm_length": 600, "causal": False},
    "no sinusoids, threefold expansion": {"scaled_sin": False, "expansion": 3},
}


def config_of(variant: str) -> ModelConfig:
    return ModelConfig(**{**SMALL, **VARIANTS[variant]})


def some_tokens(B: int, T: int, vocab: int = 50, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_counted_by_formula(variant: str) -> None:
    config = config_of(variant)
    model = build_model(config, device="meta")
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())


def test_the_papers_base_model_has_112_million_parameters() -> None:
    config = ModelConfig(vocab_size=32_000, d_model=768, n_layers=24)
    assert round(count_parameters(config) / 1e6) == 112


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_those_torch_counts(variant: str) -> None:
    config = config_of(variant)
    tokens = some_tokens(2, 32)
    flops = flops_per_token(config, 32)
    model = build_model(config)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(tokens)
    assert counter.get_total_flops() == 64 * flops.forward
    with counter:
        model(tokens, tokens).backward()
    assert counter.get_total_flops() == 64 * flops.training


def test_flops_by_part() -> None:
    """d=768, 24 layers, 32k, context 8,192: numbers worked out by hand from the paper's costs."""
    flops = flops_per_token(ModelConfig(vocab_size=32_000, d_model=768, n_layers=24), 8192)
    assert flops.projections == 24 * (2 * 768 * (2 * 1536 + 128) + 2 * 1536 * 768)
    assert flops.local == 24 * 256 * (128 + 1536)
    assert flops.linear == 24 * 4 * 128 * 1536
    assert flops.head == 2 * 768 * 32_000
    assert flops.training == 3 * flops.forward


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("d_model", {"d_model": 15}),
        ("qk_dim", {"qk_dim": 7}),
        ("chunk_size", {"chunk_size": 100}),
        ("norm_length", {"architecture": "flash_quad"}),
        ("head_scale", {"head_scale": -1.0}),
        ("architecture", {"architecture": "mamba"}),
        ("n_layer", {"n_layer": 2}),
        ("norm", {"norm": "batchnorm"}),
        ("d_model", {"d_model": "16"}),
        ("causal", {"causal": "maybe"}),
        ("head_scale", {"head_scale": math.nan}),
    ],
)
def test_impossible_configs_name_the_key(named: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=named):
        ModelConfig(**{**SMALL, **change})


def test_all_impossible_combinations_are_reported_at_once() -> None:
    with pytest.raises(ValidationError, match=r"(?s)d_model.*qk_dim.*chunk_size"):
        ModelConfig(**{**SMALL, "d_model": 15, "qk_dim": 7, "chunk_size": 100})


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    config = config_of("flash")
    torch.manual_seed(1)
    first = build_model(config, seed=5).state_dict()
    torch.manual_seed(2)
    untouched = torch.get_rng_state()
    deeper = build_model(config.model_copy(update={"n_layers": 4}), seed=5).state_dict()
    for name, values in first.items():
        assert torch.equal(deeper[name], values), name
    assert torch.equal(torch.get_rng_state(), untouched)
    other = build_model(config, seed=6).state_dict()
    assert not torch.equal(other["embedding.weight"], first["embedding.weight"])
    assert not torch.equal(first["layers.0.expand.weight"], first["layers.1.expand.weight"])


def test_initial_values_are_the_papers() -> None:
    model = build_model(ModelConfig(vocab_size=2000, d_model=128, n_layers=1))
    values = dict(model.named_parameters())
    layer = "layers.0."
    for name in (
        "embedding.weight",
        *(layer + x for x in ("expand.weight", "contract.weight", "gamma", "bias_weight")),
    ):
        assert abs(values[name].std().item() - 0.02) < 0.002, name
        assert abs(values[name].mean().item()) < 0.003, name
    for name in ("beta", "expand.bias", "contract.bias", "norm.bias"):
        assert not values[layer + name].any(), name
    assert torch.equal(values["norm.weight"], torch.ones(128))
    assert values["positions.scale"].item() == pytest.approx(128**-0.5)


@pytest.mark.parametrize(("width", "std"), [(256, 8e-5), (512, 2.9e-4), (768, 6.5e-4), (1024, 1.2e-3), (2048, 3.6e-3)])
def test_a_fresh_layer_is_near_the_identity(width: int, std: float) -> None:
    model = build_model(ModelConfig(vocab_size=8, d_model=width, n_layers=1))
    x = torch.randn(1, 512, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        measured = model.layers[0](x)[1].std().item()
    assert std / 2 < measured < std * 2


@pytest.mark.parametrize("vocab_size", [4096, 32_768])
@pytest.mark.parametrize(("width", "n_layers"), [(128, 6), (256, 4), (512, 4), (768, 2), (1024, 2), (2048, 2)])
def test_the_first_loss_is_that_of_a_uniform_guess(width: int, n_layers: int, vocab_size: int) -> None:
    """The targets are what follows in random text; a stack this fresh is the identity, whatever its depth."""
    model = build_model(ModelConfig(vocab_size=vocab_size, d_model=width, n_layers=n_layers, chunk_size=64))
    tokens = some_tokens(1, 193, vocab_size)
    with torch.no_grad():
        loss = model(tokens[:, :-1], tokens[:, 1:]).item() / 192
    assert loss == pytest.approx(math.log(vocab_size), rel=0.02)


def test_a_deep_stacks_first_loss_too() -> None:
    model = build_model(ModelConfig(vocab_size=4096, d_model=256, n_layers=72, chunk_size=64))
    tokens = some_tokens(1, 193, 4096)
    with torch.no_grad():
        loss = model(tokens[:, :-1], tokens[:, 1:]).item() / 192
    assert loss == pytest.approx(math.log(4096), rel=0.02)


def test_without_a_head_scale_a_wide_model_starts_far_off() -> None:
    model = build_model(ModelConfig(vocab_size=4096, d_model=1024, n_layers=1, head_scale=1.0))
    tokens = some_tokens(1, 129, 4096)
    with torch.no_grad():
        loss = model(tokens[:, :-1], tokens[:, 1:]).item() / 128
    assert loss > 1.2 * math.log(4096)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_reads_no_other_document_and_no_later_token(variant: str) -> None:
    config = config_of(variant)
    model = build_model(config, dtype=torch.float64, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    tokens, doc_ids = some_tokens(1, 29), torch.tensor([[0] * 11 + [1] * 18])
    changed = tokens.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % config.vocab_size
    with torch.no_grad():
        alone, together = model(tokens[:, :11]), model(tokens, doc_ids=doc_ids)
        torch.testing.assert_close(together[:, :11], alone, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(model(changed, doc_ids=doc_ids)[:, :11], together[:, :11], rtol=1e-12, atol=1e-12)
        one_document = (model(tokens) - model(changed))[:, :11].abs().max()
    assert (one_document < 1e-12) == config.causal


def test_flash_quad_refuses_what_is_longer_than_its_bias() -> None:
    model = build_model(config_of("flash-quad"))
    model(some_tokens(1, 32))
    with pytest.raises(ValueError, match="T = 33"):
        model(some_tokens(1, 33))


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0), (1, 2, 3)])
def test_tokens_that_are_none_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="tokens must have shape"):
        build_model(config_of("flash"))(torch.zeros(shape, dtype=torch.int64))


def test_weight_decay_is_for_matrices() -> None:
    model = build_model(config_of("flash with a rotary bias"), device="meta")
    layers = {f"layers.{i}.{name}.weight" for i in range(3) for name in ("expand", "contract")}
    assert decayed_parameters(model) == layers | {"embedding.weight"}


def test_the_head_is_the_embedding() -> None:
    model = build_model(config_of("flash"))
    assert [name for name, p in model.named_parameters() if 50 in p.shape] == ["embedding.weight"]
    model(some_tokens(1, 8)).sum().backward()
    assert model.embedding.weight.grad is not None
    assert model.embedding.weight.grad.abs().sum(1).min() > 0  # the head reaches rows that were not read


def test_the_rotary_bias_is_that_of_two_rotated_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, dtype=torch.float64, generator=generator) for _ in range(2))
    bias = rotary_bias(a, b, 300, base=100.0)

    def rotated(x: Tensor, position: int) -> list[float]:
        pairs = [
            complex(x[k], x[k + 3]) * complex(math.cos(w), math.sin(w))
            for k in range(3)
            for w in [position * 100.0 ** (-k / 3)]
        ]
        return [p.real for p in pairs] + [p.imag for p in pairs]

    for i, j in ((0, 0), (299, 0), (0, 299), (17, 250), (280, 260)):
        expected = sum(x * y for x, y in zip(rotated(a, i), rotated(b, j), strict=True))
        assert bias[j - i + 299].item() == pytest.approx(expected, abs=1e-12)


def test_training_learns() -> None:
    """Four sequences, learned by heart."""
    config = ModelConfig(vocab_size=12, d_model=32, n_layers=2, qk_dim=16, chunk_size=16)
    model: FlashLM = build_model(config)
    tokens = some_tokens(4, 33, 12).repeat(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(12), rel=0.05)
    assert losses[-1] < 0.3 * losses[0]


def test_data_sheets_of_gpus_that_share_a_part_of_their_name() -> None:
    names = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989, "NVIDIA H200 NVL": 835}
    assert {name: data_sheet_tflops(name) for name in names} == names
    assert data_sheet_tflops("Tesla T4") is None
