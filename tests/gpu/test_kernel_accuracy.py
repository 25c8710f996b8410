"""Kernels against the float64 reference: outputs and every gradient, on fresh random inputs, in NaN-poisoned memory.

float32 may be off by 1e-5 of a result's norm; bfloat16 by 1.5 times what the same formula in plain torch is off by.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_model.ops import AttentionState
from tests.gpu import plain
from tests.gpu.comparison import Case, Problem, draw, exactly, kernels, measure, public_op, relative_errors

pytestmark = pytest.mark.gpu

FLOAT32_TOLERANCE = 1e-5
BFLOAT16_FACTOR = 1.5
BFLOAT16_ROUNDING = 2**-9  # of a result that is right but for its own rounding
WIDTHS = [(64, 64), (128, 1536), (192, 320), (128, 4096), (256, 512)]  # (S, E)
DIRECTIONS = list(itertools.product((True, False), repeat=2))  # (causal, documents)


def mixed_cases() -> list[Case]:
    """Every chunk with every width, options taken in turn; then every combination of options at the paper's size."""
    cases = []
    for i, (chunk, (S, E)) in enumerate(itertools.product((128, 256, 512), WIDTHS)):
        causal, documents = DIRECTIONS[i % 4]
        T = (257, 2048 + 17, 1000, 100, 4 * chunk)[(i + i // 5) % 5]
        state = causal and (i // 2) % 4 != 1
        cases.append(Case(S, E, T, 1 + i % 3, chunk, causal, documents, state, wide_parameters=i % 3 == 0))
    for causal, documents in DIRECTIONS:
        cases.append(Case(128, 1536, 1000, 2, causal=causal, documents=documents))
    for S, E in ((64, 128), (128, 320)):  # blocks of 64 in one direction, of 128 in the other
        cases.append(Case(S, E, 257, 2, state=True))
    for T, chunk in ((1, 128), (2048 + 17, 256), (1024, 256), (1024, 512)):
        cases.append(Case(128, 1536, T, 3, chunk, documents=True, state=True))
    cases.append(Case(128, 1536, 1, 1, 128, causal=False))
    cases.append(Case(128, 4096, 300, 1, 128))  # wide values have launches of their own
    return cases


def quadratic_cases() -> list[Case]:
    cases = []
    for i, (S, E) in enumerate(WIDTHS):
        causal, documents = DIRECTIONS[(i + 2) % 4]
        T = (257, 1000, 100, 2048 + 17, 1)[i]
        cases.append(Case(S, E, T, 1 + i % 3, None, causal, documents, wide_parameters=i % 3 == 0))
    for (causal, documents), T in zip(DIRECTIONS, (1000, 2048 + 17, 640, 1), strict=True):
        cases.append(Case(128, 1536, T, 2, None, causal, documents, state=True))
    return cases


def plain_torch(problem: Problem, tensors: dict[str, Tensor], state: AttentionState | None) -> Any:
    arguments: dict[str, Any] = tensors | problem.options
    if problem.case.chunk is None:
        return plain.quadratic(**arguments), None
    out, left = plain.mixed_chunk(**arguments, state=state)
    return out, (left if problem.case.returns_state else None)


def together(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The numbers of several problems, one after the other."""
    return {name: torch.cat([result[name].flatten() for result in results]) for name in results[0]}


def measure_exactly(problems: list[Problem]) -> dict[str, Tensor]:
    return together([exactly(problem) for problem in problems])


def assert_accurate(found: dict[str, Tensor], exact: dict[str, Tensor], problems: list[Problem]) -> None:
    errors = relative_errors(found, exact)
    if problems[0].tensors["uvz"].dtype == torch.float32:
        limits = dict.fromkeys(errors, FLOAT32_TOLERANCE)
    else:
        of_plain = relative_errors(together([measure(plain_torch, problem) for problem in problems]), exact)
        limits = {name: BFLOAT16_FACTOR * max(error, BFLOAT16_ROUNDING) for name, error in of_plain.items()}
    wrong = [f"{name}: {error:.2e} > {limits[name]:.2e}" for name, error in errors.items() if error > limits[name]]
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", mixed_cases() + quadratic_cases(), ids=str)
def test_kernels_are_as_accurate_as_they_must_be_and_repeat_their_bits(
    case: Case, dtype: torch.dtype, poison: Callable[[], None]
) -> None:
    problems = [draw(case, dtype, seed) for seed in range(16 if case.T == 1 else 1)]  # one token is a matter of luck
    before = [{name: x.clone() for name, x in problem.tensors.items()} for problem in problems]
    results = []
    for _ in range(2):
        poison()
        results.append(together([measure(kernels, problem) for problem in problems]))
    found, again = results
    assert [name for name in found if not torch.equal(found[name], again[name])] == []
    for problem, tensors in zip(problems, before, strict=True):
        assert [name for name, x in tensors.items() if not torch.equal(x, problem.tensors[name])] == []
    assert_accurate(found, measure_exactly(problems), problems)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("quadratic", [False, True], ids=["mixed", "quadratic"])
def test_gates_at_zero_and_far_out(quadratic: bool, dtype: torch.dtype) -> None:
    """SiLU and its derivative where u, v or z is 0, tiny, or so large that exp overflows."""
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-18, -1e-18, 90.0, -90.0, 20.0, -20.0], dtype=dtype)
    # A few large numbers make up the norm of one draw, and their rounding its error: several are compared as one.
    problems = [draw(Case(64, 64, 257, 2, None if quadratic else 128), dtype, seed) for seed in range(8)]
    for seed, problem in enumerate(problems):
        uvz, generator = problem.tensors["uvz"], torch.Generator().manual_seed(seed)
        chosen = torch.rand(uvz.shape, generator=generator) < 0.1
        values = special[torch.randint(len(special), uvz.shape, generator=generator)]
        values[..., 64:] /= 8  # of v and z: sums would hold nothing else
        uvz.copy_(torch.where(chosen, values, uvz.cpu()))
    assert_accurate(together([measure(kernels, problem) for problem in problems]), measure_exactly(problems), problems)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_long_sums_are_as_accurate_as_short_ones(dtype: torch.dtype) -> None:
    errors = {}
    for T in (2_048, 131_072):
        problem = draw(Case(128, 512, T, state=True), dtype)
        found, exact = together([measure(kernels, problem)]), measure_exactly([problem])
        assert_accurate(found, exact, [problem])
        errors[T] = relative_errors(found, exact)
    for name, short in errors[2_048].items():
        floor = 2e-6 if dtype == torch.float32 else BFLOAT16_ROUNDING
        assert errors[131_072][name] <= 1.5 * max(short, floor), name


def test_more_elements_than_32_bits_count() -> None:
    """The last of the sequences lies wholly behind 2³¹ elements; alone it must come out the same."""
    case = Case(128, 1536, 65_536, 12)
    problem = draw(case, torch.bfloat16)
    assert problem.tensors["uvz"][:-1].numel() > 2**31
    last = Problem(
        case,
        problem.tensors | {"uvz": problem.tensors["uvz"][-1:].clone()},
        problem.options,
        None,
        problem.grad_out[-1:].clone(),
        problem.grad_left[-1:],
    )
    beside_others, alone = measure(kernels, problem), measure(kernels, last)
    for name in ("out", "grad u", "grad v", "grad z"):
        assert relative_errors({name: beside_others[name][-1:]}, {name: alone[name].double()})[name] < 1e-3


@pytest.mark.parametrize("case", [Case(128, 64, 1000, 2, 256, causal, True) for causal in (True, False)], ids=str)
def test_on_these_inputs_every_branch_matters(case: Case) -> None:
    """Without the linear part, or with the bias at its mean, outputs differ; relu cuts off a good part, not all."""
    problem = draw(case, torch.float64)
    out, _ = public_op(problem, problem.tensors, None)
    only_local = {name: x.clone() for name, x in problem.tensors.items()}
    only_local["gamma"][2:] = only_local["beta"][2:] = 0
    only_linear = problem.tensors | {"bias": torch.full_like(problem.tensors["bias"], -1e3)}
    flat_bias = problem.tensors | {"bias": problem.tensors["bias"].mean().expand_as(problem.tensors["bias"])}
    flat_scores = {name: x.clone() for name, x in problem.tensors.items()}
    flat_scores["gamma"][:2] = flat_scores["beta"][:2] = 0
    for changed in (only_local, only_linear, flat_bias, flat_scores):
        changed_out, _ = public_op(problem, changed, None)
        assert 0.05 < ((changed_out - out).norm() / out.norm()).item() < 20


@pytest.mark.parametrize("case", mixed_cases()[-12:] + quadratic_cases()[-4:], ids=str)
def test_the_plain_formula_is_the_reference_in_float64(case: Case) -> None:
    problem = draw(case, torch.float64).to(torch.float64)
    assert max(relative_errors(measure(plain_torch, problem), exactly(problem)).values()) < 1e-11
