"""The kernels of mixed chunk attention under Triton's interpreter, on small problems, against the float64 reference.

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
from typing import Any

import pytest
import torch

from flash_model.ops.reference import Inputs
from tests.gpu.comparison import Case, draw, exactly, measure, public_op, relative_errors, runs_kernels

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton
    import triton.language as tl

    from flash_model.ops.triton_mixed_chunk_products import token_rows

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def second_sequence_kernel(base: Any, distance: Any, T: Any, WIDTH: tl.constexpr) -> None:
        """How many bytes the second of two sequences of (T, WIDTH) bytes begins behind the first."""
        b, t = tl.program_id(0) * 0, tl.arange(0, 1)
        first, second = token_rows(base, b, t, T, WIDTH), token_rows(base, b + 1, t, T, WIDTH)
        tl.store(distance + t[:, None], second.to(tl.int64) - first.to(tl.int64))


ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.5e-2}  # casts to bfloat16 truncate in the interpreter

CASES = [
    (Case(64, 64, 300, chunk=128), torch.float32),
    (Case(64, 64, 300, 2, 128, documents=True, state=True), torch.float32),
    (Case(64, 64, 256, 1, 128, documents=True, state=True), torch.float32),
    (Case(64, 128, 257, chunk=128, causal=False), torch.float32),
    (Case(64, 64, 300, 2, 128, causal=False, documents=True), torch.float32),
    (Case(192, 64, 100, chunk=128, state=True), torch.float32),
    (Case(64, 64, 300, chunk=256, documents=True), torch.float32),
    (Case(64, 64, 1, chunk=128), torch.float32),
    (Case(64, 64, 256, 2, 128, documents=True, state=True, wide_parameters=True), torch.bfloat16),
]


def name_of(case: Case, dtype: torch.dtype) -> str:
    return f"{case}-{str(dtype).removeprefix('torch.')}"


def errors_of(case: Case, dtype: torch.dtype) -> dict[str, float]:
    problem = draw(case, dtype)
    os.environ["FLASH_OP"] = "reference"
    exact = exactly(problem)
    os.environ["FLASH_OP"] = "triton"
    assert runs_kernels(case, dtype)
    return relative_errors(measure(public_op, problem), exact)


def main() -> None:
    """Print, as JSON by case, the relative errors, or the traceback of what went wrong."""
    from tests.flash_model.interpreter import hasten_interpreter

    hasten_interpreter()
    torch.use_deterministic_algorithms(True)  # with it, torch.empty fills with NaN
    results: dict[str, Any] = {}
    for case, dtype in CASES:
        try:
            results[name_of(case, dtype)] = errors_of(case, dtype)
        except Exception:
            results[name_of(case, dtype)] = traceback.format_exc()
    distance = torch.zeros(1, dtype=torch.int64)
    second_sequence_kernel[(1,)](torch.zeros(1, dtype=torch.int8), distance, 300_000, WIDTH=8320)
    results["second sequence"] = int(distance)
    print(json.dumps(results))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(("case", "dtype"), CASES, ids=[name_of(*case) for case in CASES])
def test_interpreted_kernels_equal_the_reference(case: Case, dtype: torch.dtype, interpreted: dict[str, Any]) -> None:
    errors = interpreted[name_of(case, dtype)]
    assert isinstance(errors, dict), errors
    assert {name: error for name, error in errors.items() if error > TOLERANCE[dtype]} == {}


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_offsets_of_long_sequences_do_not_overflow(interpreted: dict[str, Any]) -> None:
    """Sequences of a 1.3B model beyond 258,000 tokens have more than 2³¹ elements."""
    assert interpreted["second sequence"] == 300_000 * 8320


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_more_chunks_than_a_launch_holds_are_named_before_any_kernel_runs() -> None:
    from flash_model.ops.triton_mixed_chunk import MOST_CHUNKS, forward

    uvz, heads = torch.zeros(1, 1, 192).expand(MOST_CHUNKS + 1, 1, 192), torch.zeros(4, 64)
    inputs = Inputs(uvz, heads, heads, torch.zeros(255), None, None, None, None, 128, True, 0, 10_000.0)
    with pytest.raises(ValueError, match="uvz holds 65,536 chunks, 65,536 sequences of 1 tokens in chunks of 128"):
        forward(inputs, return_state=False)


if __name__ == "__main__":
    main()
