"""The ops as torch sees them: registration, compile, dtypes, FLOP counts, refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flash_model.config import ModelConfig
from flash_model.gau import GatedAttentionUnit
from flash_model.init import initialize
from flash_model.ops import AttentionState, mixed_chunk_attention, quadratic_attention, reference, reference_quadratic

B, T, C, S, E = 2, 12, 4, 4, 6
NO_STATE: dict[str, Any] = dict.fromkeys(["doc_ids", "state_sum", "state_count", "state_doc_id"])


def tensors(heads: int = 4, extent: int = C, dtype: torch.dtype = torch.float32, T: int = T) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"uvz": (B, T, 2 * E + S), "gamma": (heads, S), "beta": (heads, S), "bias": (2 * extent - 1,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def a_state() -> AttentionState:
    return AttentionState(torch.ones(B, S, E), torch.tensor([1, 2]), torch.tensor([0, 0]))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("with_documents", [False, True])
def test_opcheck(causal: bool, with_documents: bool) -> None:
    doc_ids = torch.tensor([[0] * 5 + [1] * 6, [0] * 11]) if with_documents else None
    leaves = [x.requires_grad_() for x in tensors(T=11).values()]
    state: tuple[Tensor | None, ...] = (None, None, None)
    if causal:
        state = (a_state().sum.requires_grad_(), a_state().count, a_state().doc_id)
    op = torch.ops.flash_model.mixed_chunk
    torch.library.opcheck(op, (*leaves, None, doc_ids, *state, C, causal, 8, 1e4, False, False))
    if causal:
        leaves = [x.requires_grad_() for x in tensors(T=12).values()]
        projection_bias = torch.zeros(2 * E + S, requires_grad=True)
        torch.library.opcheck(op, (*leaves, projection_bias, None, *state, C, causal, 8, 1e4, True, False))
    quad = [x.requires_grad_() for x in tensors(heads=2, extent=16, T=11).values()]
    torch.library.opcheck(torch.ops.flash_model.quadratic, (*quad, doc_ids, 12, causal, 0, 1e4, False))


@pytest.mark.parametrize("architecture", ["flash", "flash_quad"])
def test_a_layer_compiles_to_one_graph(architecture: Any) -> None:
    config = ModelConfig(
        architecture=architecture, vocab_size=8, d_model=8, n_layers=1, qk_dim=4, chunk_size=4, norm_length=512
    )
    layer = GatedAttentionUnit(config)
    initialize(layer, config, seed=0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(0))
    doc_ids = torch.tensor([[0] * 3 + [1] * 7] * 2)
    results = []
    for module in (layer, compiled):
        layer.zero_grad()
        out = sum(module(x, doc_ids, x.flip(1)))
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    torch.testing.assert_close(results[0], results[1])


def test_bfloat16_sums_in_float32_and_takes_float32_parameters() -> None:
    given = tensors()
    given["uvz"] = given["uvz"].bfloat16()
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    out, state = mixed_chunk_attention(**leaves, chunk_size=C, return_state=True)
    assert out.dtype == torch.bfloat16
    assert state.sum.dtype == torch.float32
    out.float().sum().backward()
    assert [x.grad.dtype for x in leaves.values() if x.grad is not None] == [torch.bfloat16] + [torch.float32] * 3
    wide = {name: x.detach().double() for name, x in given.items()}
    torch.testing.assert_close(out.double(), mixed_chunk_attention(**wide, chunk_size=C), rtol=2**-8, atol=1e-5)
    out_quad = quadratic_attention(
        given["uvz"].detach(), given["gamma"][:2], given["beta"][:2], torch.zeros(31), norm_length=T
    )
    assert out_quad.dtype == torch.bfloat16


def test_rotation_stays_exact_at_long_positions() -> None:
    """float32 position × frequency would be off by 8e-3 here."""
    given = tensors()
    far = mixed_chunk_attention(**given, chunk_size=C, start=131_072, state=a_state())
    wide = {name: x.double() for name, x in given.items()}
    state = a_state()._replace(sum=a_state().sum.double())
    expected = mixed_chunk_attention(**wide, chunk_size=C, start=131_072, state=state)
    torch.testing.assert_close(far.double(), expected, rtol=1e-5, atol=1e-5)


def test_inputs_that_are_views_work() -> None:
    given = tensors()
    wide = torch.randn(B, T, 2 * E + S + 3)
    wide[..., 3:] = given["uvz"]
    expected = mixed_chunk_attention(**given, chunk_size=C)
    torch.testing.assert_close(mixed_chunk_attention(**{**given, "uvz": wide[..., 3:]}, chunk_size=C), expected)
    for turned in (given["uvz"].mT.contiguous().mT, given["uvz"].transpose(0, 1).contiguous().transpose(0, 1)):
        torch.testing.assert_close(mixed_chunk_attention(**{**given, "uvz": turned}, chunk_size=C), expected)
        # What torch.compile is told about the result's strides holds for such inputs as well.
        quad = quadratic_attention(**{**tensors(heads=2, extent=T), "uvz": turned}, norm_length=T)
        assert quad.is_contiguous()


def test_only_the_state_is_asked_for() -> None:
    given = {name: x.requires_grad_() for name, x in tensors().items()}
    _, state = mixed_chunk_attention(**given, chunk_size=C, return_state=True)
    (grad,) = torch.autograd.grad(state.sum.sum(), given["uvz"])
    assert grad[..., :E].abs().max() == 0
    assert grad[..., E:].abs().min() > 0


def test_flops_are_those_of_the_matrix_products() -> None:
    """Bidirectional, nothing is masked: torch counts the reference's own products. Causal counts the blocks half."""
    given = tensors()
    measured = FlopCounterMode(display=False)
    with measured:
        reference.forward(reference.Inputs(**given, **NO_STATE, chunk_size=C, causal=False, start=0, rope_base=1e4))
    products = measured.get_total_flops()
    assert products == B * T * (2 * C * (S + E) + 4 * S * E)
    assert _counted(mixed_chunk_attention, given, chunk_size=C, causal=False) == (products, 3 * products)
    causal = products - B * T * C * (S + E)
    assert _counted(mixed_chunk_attention, given, chunk_size=C) == (causal, 3 * causal)

    quad = tensors(heads=2, extent=16)
    measured = FlopCounterMode(display=False)
    with measured:
        reference_quadratic.forward(
            reference_quadratic.Inputs(**quad, doc_ids=None, norm_length=T, causal=False, start=0, rope_base=1e4)
        )
    products = measured.get_total_flops()
    assert products == B * T * 2 * T * (S + E)
    assert _counted(quadratic_attention, quad, norm_length=T, causal=False) == (products, 3 * products)
    assert _counted(quadratic_attention, quad, norm_length=T) == (products // 2, 3 * products // 2)


def _counted(op: Any, given: dict[str, Any], **options: Any) -> tuple[int, int]:
    """FLOPs of a forward pass, and of a forward and a backward pass."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    counter = FlopCounterMode(display=False)
    with counter:
        out = op(**leaves, **options)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops()


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("uvz", {"uvz": torch.zeros(B, 2 * E + S)}),
    ("uvz", {"uvz": torch.zeros(B, 0, 2 * E + S)}),
    ("uvz", {"uvz": torch.zeros(0, T, 2 * E + S)}),
    ("uvz", {"uvz": torch.zeros(B, T, 2 * E + S + 1)}),
    ("uvz", {"uvz": torch.zeros(B, T, 2 * E + S, dtype=torch.float16)}),
    ("uvz", {"uvz": torch.zeros(B, T, 2 * E + S, dtype=torch.int64)}),
    ("gamma", {"gamma": torch.zeros(2, S)}),
    ("gamma", {"gamma": torch.zeros(4, S, dtype=torch.int64)}),
    ("gamma", {"gamma": torch.zeros(4, S, device="meta")}),
    ("beta", {"beta": torch.zeros(4, S + 2)}),
    ("bias", {"bias": torch.zeros(2 * C)}),
    ("chunk_size", {"chunk_size": 6, "bias": torch.zeros(11)}),
    ("chunk_size", {"chunk_size": 0}),
    ("start", {"start": 2}),
    ("start", {"start": -4}),
    ("doc_ids", {"doc_ids": torch.zeros(B, T + 1, dtype=torch.int64)}),
    ("doc_ids", {"doc_ids": torch.zeros(B, T)}),
    ("doc_ids", {"doc_ids": torch.zeros(B, T, dtype=torch.bool)}),
    ("doc_ids", {"doc_ids": torch.zeros(B, T, dtype=torch.uint16)}),
    ("doc_ids", {"doc_ids": torch.arange(T).flip(0).expand(B, T)}),
    ("doc_ids", {"doc_ids": torch.arange(T, dtype=torch.uint8).flip(0).expand(B, T)}),
    ("rope_base", {"rope_base": 0.0}),
    ("projection_bias", {"projection_bias": torch.zeros(2 * E)}),
    ("projection_bias", {"projection_bias": torch.zeros(2 * E + S, device="meta")}),
    ("state", {"causal": False, "state": a_state()}),
    ("return_state", {"causal": False, "return_state": True}),
    ("return_state", {"uvz": torch.zeros(B, T + 1, 2 * E + S), "return_state": True}),
    ("state.sum", {"state": a_state()._replace(sum=torch.zeros(B, E, S))}),
    ("state.count", {"state": a_state()._replace(count=torch.zeros(B + 1))}),
    ("state.count", {"state": a_state()._replace(count=torch.ones(B)), "start": 2 * C}),
    ("state.count .* = 0", {"state": a_state()}),
    ("state.count .* = 1", {"state": a_state(), "start": C}),
    ("state.count", {"state": a_state()._replace(count=torch.tensor([-1, 1])), "start": 2 * C}),
    ("state.doc_id", {"state": a_state()._replace(doc_id=torch.zeros(()))}),
    ("state.doc_id", {"state": a_state()._replace(doc_id=torch.zeros(B)), "start": 2 * C}),
]


@pytest.mark.parametrize(("named", "change"), REFUSED)
def test_wrong_arguments_are_named(named: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=named):
        mixed_chunk_attention(**{**tensors(), "chunk_size": C, **change})


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("T = 12", {"bias": torch.zeros(2 * 11 - 1)}),
        ("bias", {"bias": torch.zeros(30)}),
        ("norm_length", {"norm_length": 0}),
        ("start", {"start": -1}),
        ("rope_base", {"rope_base": float("nan")}),
        ("gamma", {"gamma": torch.zeros(4, S)}),
        ("doc_ids", {"doc_ids": torch.arange(T).flip(0).expand(B, T)}),
    ],
)
def test_wrong_arguments_of_the_quadratic_op_are_named(named: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=named):
        quadratic_attention(**{**tensors(heads=2, extent=16), "norm_length": T, **change})
