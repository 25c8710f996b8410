"""Kernels under everything torch does with an op, and what must never be seen: the future, other documents, padding."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flash_model.config import ModelConfig
from flash_model.flops import mixed_chunk_flops, quadratic_flops
from flash_model.gau import GatedAttentionUnit
from flash_model.init import initialize
from flash_model.ops import AttentionState, mixed_chunk_attention, quadratic_attention
from tests.gpu.comparison import DEVICE, Case, Problem, draw, kernels, measure, relative_errors

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
OPS = pytest.mark.parametrize("chunk", [128, None], ids=["mixed", "quadratic"])
SMALL: dict[str, Any] = {"S": 64, "E": 64}
KERNEL = DEVICE.type == "cuda"


def run(problem: Problem, uvz: Tensor | None = None) -> Tensor:
    tensors = problem.tensors if uvz is None else problem.tensors | {"uvz": uvz}
    return kernels(problem, tensors, problem.state)[0]


@DTYPES
@pytest.mark.parametrize("documents", [False, True])
def test_pieces_through_the_state_are_the_whole(documents: bool, dtype: torch.dtype) -> None:
    problem = draw(Case(**SMALL, T=1024 + 65, B=2, chunk=128, documents=documents, state=True), dtype)
    borders = [0, 128, 512, 1024, 1024 + 65]

    def in_pieces(
        problem: Problem, tensors: dict[str, Tensor], state: AttentionState | None
    ) -> tuple[Tensor, Tensor | None]:
        outs, doc_ids = [], problem.options["doc_ids"]
        for first, end in itertools.pairwise(borders):
            arguments: dict[str, Any] = tensors | problem.options
            arguments["uvz"] = tensors["uvz"][:, first:end]
            arguments["start"] += first
            arguments["doc_ids"] = None if doc_ids is None else doc_ids[:, first:end]
            if end == borders[-1]:
                outs.append(mixed_chunk_attention(**arguments, state=state))
            else:
                out, state = mixed_chunk_attention(**arguments, state=state, return_state=True)
                outs.append(out)
        return torch.cat(outs, 1), None

    whole = measure(kernels, problem)
    errors = relative_errors(measure(in_pieces, problem), {name: x.double() for name, x in whole.items()})
    assert max(errors.values()) < (1e-5 if dtype == torch.float32 else 1e-2), errors


@OPS
@DTYPES
def test_nothing_is_seen_of_the_future(chunk: int | None, dtype: torch.dtype) -> None:
    T = 300
    problem = draw(Case(**SMALL, T=T, chunk=chunk), dtype)
    out = run(problem)
    for t in (0, 1, 127, 128, 129, 200, 256, T - 1):
        changed = problem.tensors["uvz"].clone()
        changed[:, t] += 1
        changed_out = run(problem, changed)
        assert torch.equal(changed_out[:, :t], out[:, :t])
        assert not torch.equal(changed_out[:, t:], out[:, t:])

        uvz = problem.tensors["uvz"].clone().requires_grad_()
        (grad,) = torch.autograd.grad(run(problem, uvz)[:, : t + 1].float().sum(), uvz)
        assert not grad[:, t + 1 :].any()
        assert grad[:, : t + 1].any() == out[:, : t + 1].any()


@OPS
@DTYPES
@pytest.mark.parametrize("causal", [True, False])
def test_nothing_is_seen_of_other_documents(causal: bool, chunk: int | None, dtype: torch.dtype) -> None:
    problem = draw(Case(**SMALL, T=800, chunk=chunk, causal=causal), dtype)
    lengths = [70, 300, 14, 216, 150, 50]  # inside a chunk, over chunks, from border to border
    doc_ids = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))[None].to(DEVICE)
    problem.options["doc_ids"] = doc_ids
    out = run(problem)
    for document in range(6):
        own = doc_ids[0] == document
        changed = problem.tensors["uvz"].clone()
        changed[:, ~own] += 1
        changed_out = run(problem, changed)
        assert torch.equal(changed_out[:, own], out[:, own])
        assert not torch.equal(changed_out[:, ~own], out[:, ~own])

        uvz = problem.tensors["uvz"].clone().requires_grad_()
        (grad,) = torch.autograd.grad(run(problem, uvz)[:, own].float().sum(), uvz)
        assert not grad[:, ~own].any()
        assert grad[:, own].any()


@OPS
@DTYPES
def test_views_among_nan_and_expanded_gradients(chunk: int | None, dtype: torch.dtype) -> None:
    """Strided inputs give what contiguous ones give, and nothing is read of what lies between and around them."""
    problem = draw(Case(**SMALL, T=257, B=2, chunk=chunk, documents=True), dtype)
    given = problem.tensors["uvz"]
    B, T, width = given.shape
    around = torch.full((B + 2, T + 70, width + 9), torch.nan, dtype=dtype, device=DEVICE)
    around[1:-1, 64 : 64 + T, 9:] = given
    grad = problem.grad_out[:, :1, :1].expand(B, T, SMALL["E"])

    results: list[dict[str, Tensor]] = []
    for uvz, grad_out in (
        (given, grad.contiguous()),
        (around[1:-1, 64 : 64 + T, 9:], grad),
        (given.mT.contiguous().mT, grad.mT.contiguous().mT),
    ):
        leaves = {name: x.detach().requires_grad_() for name, x in (problem.tensors | {"uvz": uvz}).items()}
        out = kernels(problem, leaves, None)[0]
        gradients = torch.autograd.grad(out, list(leaves.values()), grad_out)
        results.append({"out": out.detach()} | dict(zip(leaves, gradients, strict=True)))
    expected = {name: x.double() for name, x in results[0].items()}
    for other in results[1:]:
        assert max(relative_errors(other, expected).values()) < (1e-6 if dtype == torch.float32 else 1e-3)


@OPS
def test_int32_documents_and_other_numbers_for_them_change_nothing(chunk: int | None) -> None:
    problem = draw(Case(**SMALL, T=300, B=2, chunk=chunk, documents=True), torch.bfloat16)
    out = run(problem)
    problem.options["doc_ids"] = problem.options["doc_ids"].int() * 1000 - 7
    assert torch.equal(run(problem), out)


@DTYPES
@pytest.mark.parametrize("causal", [True, False])
def test_opcheck(causal: bool, dtype: torch.dtype) -> None:
    problem = draw(Case(**SMALL, T=256, B=2, chunk=128, causal=causal, documents=True, state=causal), dtype)
    arguments = problem.tensors | problem.options | {"rope_base": 1e4, "return_state": causal, "kernel": KERNEL}
    arguments["projection_bias"] = problem.tensors["uvz"][0, 0].clone()
    arguments |= dict.fromkeys(("state_sum", "state_count", "state_doc_id"))
    if problem.state is not None:
        arguments |= {f"state_{name}": x for name, x in problem.state._asdict().items() if x is not None}
    torch.library.opcheck(torch.ops.flash_model.mixed_chunk, (), require_gradients(arguments))
    quad = draw(Case(**SMALL, T=256, B=2, chunk=None, causal=causal, documents=True), dtype)
    arguments = quad.tensors | quad.options | {"rope_base": 1e4, "kernel": KERNEL}
    torch.library.opcheck(torch.ops.flash_model.quadratic, (), require_gradients(arguments))


def require_gradients(arguments: dict[str, Any]) -> dict[str, Any]:
    for value in arguments.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_()
    return arguments


@DTYPES
@pytest.mark.parametrize("causal", [True, False])
def test_the_projections_bias_gets_the_sum_over_tokens(causal: bool, dtype: torch.dtype) -> None:
    problem = draw(Case(**SMALL, T=300, B=2, chunk=128, causal=causal, documents=True), dtype)
    uvz = problem.tensors["uvz"].clone().requires_grad_()
    projection_bias = torch.zeros(uvz.shape[2], dtype=dtype, device=DEVICE, requires_grad=True)
    arguments: dict[str, Any] = problem.tensors | problem.options | {"uvz": uvz}
    out = mixed_chunk_attention(**arguments, projection_bias=projection_bias)
    grad_uvz, grad_bias = torch.autograd.grad(out, (uvz, projection_bias), problem.grad_out)
    expected = grad_uvz.double().sum((0, 1))
    assert grad_bias.dtype == dtype
    assert ((grad_bias - expected).norm() / expected.norm()).item() < (1e-5 if dtype == torch.float32 else 1e-2)


def build_layer(architecture: Any, dtype: torch.dtype) -> GatedAttentionUnit:
    config = ModelConfig(
        architecture=architecture, vocab_size=64, d_model=64, n_layers=1, qk_dim=64, chunk_size=128, norm_length=300
    )
    layer = GatedAttentionUnit(config)
    initialize(layer, config, seed=0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(20)  # initial values are so small that the layer would be the identity
    return layer.to(DEVICE, dtype)


def layer_results(layer: nn.Module, forward: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(2, 300, 64, generator=generator, device=DEVICE).to(dtype)
    x = x.to(next(layer.parameters()).dtype).requires_grad_()
    doc_ids = (torch.arange(300, device=DEVICE) >= 130).long().expand(2, 300)
    layer.zero_grad()
    out = sum(forward(x, doc_ids, x.flip(1)))
    out.square().sum().backward()
    found = {"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    return {name: value.clone() for name, value in found.items() if value is not None}


@DTYPES
@pytest.mark.parametrize("architecture", ["flash", "flash_quad"])
def test_a_compiled_layer_is_one_graph_and_gives_the_same(architecture: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    layer = build_layer(architecture, dtype)
    compiled = layer_results(layer, torch.compile(layer, fullgraph=True), dtype)
    eager = layer_results(layer, layer, dtype)
    exact = layer_results(layer.double(), layer, dtype)
    assert len(compiled) == 2 + len(list(layer.parameters()))
    floor = 1e-5 if dtype == torch.float32 else 2**-7
    errors, of_eager = relative_errors(compiled, exact), relative_errors(eager, exact)
    assert [name for name, error in errors.items() if error > 1.5 * max(of_eager[name], floor)] == []


@pytest.mark.parametrize("architecture", ["flash", "flash_quad"])
def test_activation_checkpointing_gives_the_same_bits(architecture: str) -> None:
    layer = build_layer(architecture, torch.bfloat16)
    kept = layer_results(layer, layer, torch.bfloat16)
    recomputed = layer_results(layer, lambda *args: checkpoint(layer, *args, use_reentrant=False), torch.bfloat16)
    assert [name for name in kept if not torch.equal(kept[name], recomputed[name])] == []


@OPS
@pytest.mark.parametrize("causal", [True, False])
def test_flops_are_counted_by_formula(causal: bool, chunk: int | None) -> None:
    case = Case(128, 256, 1024, 2, chunk, causal)
    counter = FlopCounterMode(display=False)
    with counter:
        measure(kernels, draw(case, torch.bfloat16))
    if chunk is None:
        expected = quadratic_flops(2 * 1024, 1024, 128, 256, causal)
    else:
        expected = mixed_chunk_flops(2 * 1024, 1024, 128, 256, chunk, causal)
    assert counter.get_total_flops() == 3 * expected


MIXED: dict[str, Any] = {
    "gamma is on cpu": lambda p: {"gamma": p.tensors["gamma"].cpu()},
    "bias is on cpu": lambda p: {"bias": p.tensors["bias"].cpu()},
    "doc_ids is on cpu": lambda p: {"doc_ids": torch.zeros(2, 256, dtype=torch.int64)},
    "state.sum is on cpu": lambda p: {"state": p.state._replace(sum=p.state.sum.cpu())},
    "state.count is on cpu": lambda p: {"state": p.state._replace(count=p.state.count.cpu())},
    "uvz must be .*float16": lambda p: {"uvz": p.tensors["uvz"].half()},
    "gamma must be .*int64": lambda p: {"gamma": p.tensors["gamma"].long()},
    "chunk_size": lambda p: {"chunk_size": 96},
    "start": lambda p: {"start": 64},
    "return_state": lambda p: {"uvz": p.tensors["uvz"][:, :200], "return_state": True},
}
QUADRATIC: dict[str, Any] = {
    "beta is on cpu": lambda p: {"beta": p.tensors["beta"].cpu()},
    "uvz must be .*float16": lambda p: {"uvz": p.tensors["uvz"].half()},
    "T = 256": lambda p: {"bias": p.tensors["bias"][:401]},
    "norm_length": lambda p: {"norm_length": 0},
}


@pytest.mark.parametrize("message", MIXED)
def test_wrong_arguments_are_named(message: str) -> None:
    problem = draw(Case(**SMALL, T=256, B=2, chunk=128, state=True), torch.bfloat16)
    arguments = problem.tensors | problem.options | {"state": problem.state} | MIXED[message](problem)
    with pytest.raises(ValueError, match=message):
        mixed_chunk_attention(**arguments)


@pytest.mark.parametrize("message", QUADRATIC)
def test_wrong_arguments_of_the_quadratic_op_are_named(message: str) -> None:
    problem = draw(Case(**SMALL, T=256, B=2, chunk=None), torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        quadratic_attention(**(problem.tensors | problem.options | QUADRATIC[message](problem)))
