"""Layers that are run again in backward: the same bits, without a GPU's kernels, for less memory."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from flash_model.config import ModelConfig
from flash_model.lm import FlashLM, build_model
from flash_model.ops import reference, reference_quadratic

LAYERS = 4


@pytest.fixture(autouse=True)
def _clean_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def model_of(architecture: str) -> FlashLM:
    config = {"vocab_size": 97, "d_model": 32, "n_layers": LAYERS, "qk_dim": 16, "chunk_size": 16, "norm_length": 64}
    model = build_model(ModelConfig.model_validate({"architecture": architecture, **config}), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():  # biases begin at 0, and would show nothing
            parameter.add_(torch.empty_like(parameter).normal_(std=0.1, generator=generator))
    return model


def trained(model: FlashLM, recomputed: frozenset[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Nats, gradients, and how often the forward op ran."""
    model.recomputed = recomputed
    model.zero_grad()
    tokens = torch.randint(0, 97, (2, 65), generator=torch.Generator().manual_seed(0))
    doc_ids = (torch.arange(64) // 20).expand(2, 64).contiguous()
    module = reference if model.config.architecture == "flash" else reference_quadratic
    with mock.patch.object(module, "forward", wraps=module.forward) as forward:
        nats = model(tokens[:, :-1], tokens[:, 1:], None, doc_ids)
        nats.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradients[name] = parameter.grad
    return nats, gradients, forward.call_count


@pytest.mark.parametrize("architecture", ["flash", "flash_quad"])
@pytest.mark.parametrize("recomputed", [{0, 1, 2, 3}, {0, 2}, {3}], ids=str)
def test_recomputed_layers_give_the_same_bits(architecture: str, recomputed: set[int]) -> None:
    nats, gradients, calls = trained(model_of(architecture), frozenset())
    assert calls == LAYERS
    again, others, calls = trained(model_of(architecture), frozenset(recomputed))
    assert calls == LAYERS + len(recomputed)
    assert torch.equal(again, nats)
    for name, gradient in gradients.items():
        assert torch.equal(others[name], gradient), name


def test_they_do_so_compiled_as_one_graph() -> None:
    model = model_of("flash")
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")  # type: ignore[method-assign]
    nats, gradients, _ = trained(model, frozenset())
    again, others, calls = trained(model, frozenset({0, 1, 2}))
    assert calls == LAYERS + 3, "nothing was recomputed"
    assert torch.equal(again, nats)
    for name, gradient in gradients.items():
        assert torch.equal(others[name], gradient), name


def test_a_recomputed_layer_keeps_its_input_alone() -> None:
    def kept(recomputed: frozenset[int]) -> int:
        model, sizes = model_of("flash"), {}
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        model.recomputed = recomputed

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        tokens = torch.zeros(2, 64, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            nats = model(tokens, tokens)
        assert nats.requires_grad
        return sum(sizes.values())

    # Inside checkpoint() other hooks are in force: these see what is kept outside of recomputed layers.
    inputs = 2 * 64 * 32 * 4
    assert kept(frozenset(range(LAYERS))) < kept(frozenset()) - LAYERS * 4 * inputs
