"""The cross-entropy kernel under Triton's interpreter.

In a process of its own: triton reads the switch when it is imported, and others import it without.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

SIZES = {"one block": (50, 64), "no padding": (64, 64), "a short last block": (257, 64), "many blocks": (1000, 128)}
DTYPES = (torch.float32, torch.bfloat16)


def measure(V: int, block: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernel makes of random logits with NaN between the rows, held against plain torch in float64."""
    from flash_model import loss, triton_cross_entropy

    triton_cross_entropy.LAUNCH = (block, 4)
    generator = torch.Generator().manual_seed(V)
    logits = torch.full((11, -(-V // 64) * 64), torch.nan, dtype=dtype)[:, :V]
    logits.copy_(torch.randn(11, V, generator=generator) * 3)
    logits[2, V // 2] = 500.0
    targets = torch.randint(0, V, (11,), generator=generator)
    counts = torch.arange(11) % 4 > 0
    targets[0] = V + 7
    exact = logits.double()
    nats = loss._cross_entropy_(exact, targets.where(counts, 0), counts, True)
    scored = triton_cross_entropy.cross_entropy_(logits, targets, counts, False)
    trained = triton_cross_entropy.cross_entropy_(logits, targets, counts, True)
    targets[1] = V
    return {
        "nats": ((trained - nats).abs() / nats.clamp(min=1)).max().item(),
        "gradient": ((logits - exact).norm() / exact.norm()).item(),
        "scoring agrees": torch.equal(scored, trained),
        "ignored rows": logits[~counts].abs().max().item(),
        "impossible target": triton_cross_entropy.cross_entropy_(logits, targets, counts, False)[1].item(),
    }


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_is_plain_torch(measured: dict[str, dict[str, Any]], size: str, dtype: torch.dtype) -> None:
    found = measured[f"{size} {dtype}"]
    assert found["nats"] < 2e-6
    # The interpreter cuts bfloat16 off where a GPU rounds: errors of up to 2^-8.
    assert found["gradient"] < (1e-6 if dtype == torch.float32 else 2**-8)
    assert found["scoring agrees"]
    assert found["ignored rows"] == 0
    assert found["impossible target"] != found["impossible target"]


if __name__ == "__main__":
    cases = {f"{name} {dtype}": (*size, dtype) for name, size in SIZES.items() for dtype in DTYPES}
    print(json.dumps({name: measure(*case) for name, case in cases.items()}))
