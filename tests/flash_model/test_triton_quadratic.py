"""The kernels of FLASH-Quad under Triton's interpreter, on small problems, against the float64 reference.

Triton reads TRITON_INTERPRET when it is imported, so all cases run in one process of their own, which prints what came
out; each then is a test here.
"""

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flash_model.ops import reference_quadratic

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("out", "uvz", "gamma", "beta", "bias")
STRIP = 256


class Case(NamedTuple):
    """A problem, drawn from its own numbers."""

    T: int
    B: int = 1
    E: int = 64
    S: int = 64
    causal: bool = True
    documents: bool = False
    start: int = 0
    extent_beyond: int = 0
    bfloat16: bool = False

    @property
    def name(self) -> str:
        return "-".join(f"{key}{int(value)}" for key, value in self._asdict().items())


CASES = [
    Case(300, B=2),
    Case(600, start=256, extent_beyond=40),
    Case(300, B=2, documents=True, extent_beyond=3),
    Case(300, B=2, causal=False, documents=True, start=7),
    Case(520, causal=False, S=128),
    Case(256, E=192, S=192),
    Case(1, B=3),
    Case(300, documents=True, bfloat16=True),
]


def draw(case: Case) -> tuple[reference_quadratic.Inputs, Tensor]:
    generator = torch.Generator().manual_seed(case.T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    B, T, E, S = case.B, case.T, case.E, case.S
    dtype = torch.bfloat16 if case.bfloat16 else torch.float32
    uvz = normal(B, T, 2 * E + S)
    uvz[:, :, ::16] = 0  # a closed gate must not hide what was attended
    documents = (torch.rand(B, T, generator=generator) < 0.03).long().cumsum(1) if case.documents else None
    bias = normal(2 * (T + case.extent_beyond) - 1)
    inputs = reference_quadratic.Inputs(
        uvz.to(dtype), normal(2, S), normal(2, S), bias, documents, T, case.causal, case.start, 10000.0
    )
    return inputs, normal(B, T, E).to(dtype)


class LargestTensor(TorchDispatchMode):
    """Watches how large, in float32 elements, the largest tensor is that is made meanwhile."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.nbytes // 4)
        return made


def outcome_of(case: Case) -> dict[str, float]:
    """The size of the largest tensor made, and the relative errors of out and of all gradients."""
    from flash_model.ops import triton_quadratic

    inputs, grad_out = draw(case)
    with LargestTensor() as largest:
        out = triton_quadratic.forward(inputs)
        got = (out, *triton_quadratic.backward(grad_out, inputs, out))
    for tensor, origin in zip(got, (inputs.uvz, *inputs[:4]), strict=True):
        assert tensor.dtype == origin.dtype
    exact_inputs = inputs._replace(**{name: getattr(inputs, name).double() for name in NAMES[1:]})
    exact = (
        reference_quadratic.forward(exact_inputs),
        *reference_quadratic.backward(grad_out.double(), exact_inputs),
    )
    errors = {name: float((a.double() - b).norm() / b.norm()) for name, a, b in zip(NAMES, got, exact, strict=True)}
    return {"largest": largest.elements, **errors}


def main() -> None:
    """Print, as JSON by case, what came out, or the traceback of what went wrong."""
    from flash_model.ops import triton_quadratic
    from tests.flash_model.interpreter import hasten_interpreter

    hasten_interpreter()
    torch.use_deterministic_algorithms(True)  # with it, torch.empty fills with NaN
    triton_quadratic.STRIP = STRIP
    # The interpreter's time goes by the number of blocks: few large ones.
    for name in triton_quadratic.LAUNCHES[torch.float32]:
        triton_quadratic.LAUNCHES[torch.float32][name] = triton_quadratic.Launch(128, 128, 64, 4, 1)
    results: dict[str, Any] = {}
    for case in CASES:
        try:
            results[case.name] = outcome_of(case)
        except Exception:
            results[case.name] = traceback.format_exc()
    print(json.dumps(results))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.flash_model.test_triton_quadratic"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outcomes: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_agree_with_the_float64_reference(case: Case, outcomes: dict[str, Any]) -> None:
    outcome = outcomes[case.name]
    assert isinstance(outcome, dict), outcome
    tolerance = 1e-2 if case.bfloat16 else 1e-5  # casts to bfloat16 truncate in the interpreter
    errors = {name: outcome[name] for name in NAMES}
    assert max(errors.values()) <= tolerance, errors
    assert all(error == error for error in errors.values()), errors


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_memory_grows_with_strips_not_with_the_square_of_the_length(outcomes: dict[str, Any]) -> None:
    case = next(case for case in CASES if case.T > 2 * STRIP and case.causal)
    padded = -(-case.T // 256) * 256
    assert outcomes[case.name]["largest"] <= padded * max(STRIP, case.E, 2 * case.S) < case.T**2


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_more_sequences_than_a_launch_holds_are_named_before_any_kernel_runs() -> None:
    from flash_model.ops.triton_quadratic import MOST_SEQUENCES, forward

    uvz, heads = torch.zeros(1, 1, 192).expand(MOST_SEQUENCES + 1, 1, 192), torch.zeros(2, 64)
    inputs = reference_quadratic.Inputs(uvz, heads, heads, torch.zeros(1), None, 1, True, 0, 10_000.0)
    with pytest.raises(ValueError, match="uvz holds 65,536 sequences"):
        forward(inputs)


if __name__ == "__main__":
    main()
