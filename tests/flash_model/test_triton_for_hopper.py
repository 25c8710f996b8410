"""The kernels of a training step compiled for an H100, on a machine that has none.

The interpreter of the other tests knows nothing of registers, shared memory or matrix units. Here the ops launch their
kernels as they would on a GPU, but Triton has a driver that compiles for sm_90 and runs nothing: in a process of its
own, which prints what came out.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.gpu.comparison import Case, draw, measure, public_op

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = 227 * 1024  # bytes, the most that a program may have on sm_90
SPILLED = 1024  # bytes of registers that a thread may keep in memory: about what float32's backward does

CASES: dict[str, tuple[Case, torch.dtype]] = {
    "mixed": (Case(128, 1536, 512), torch.bfloat16),
    "wide, documents, a state": (Case(128, 4096, 300, documents=True, state=True), torch.bfloat16),
    "both directions": (Case(128, 1536, 300, causal=False, documents=True), torch.bfloat16),
    "float32": (Case(128, 1536, 512), torch.float32),
    "quadratic": (Case(128, 1536, 512, chunk=None), torch.bfloat16),
}
# Kernels with products of matrices that a case is the first to compile. In float32 none may use the matrix units, which
# would round to tf32.
PRODUCTS = {
    "mixed": "scores forward backward quad_backward",
    "wide, documents, a state": "scores forward backward",
    "both directions": "scores chunk_sums output gate_backward products_backward quad_backward",
    "float32": "",
    "quadratic": "scores attend score_grads key_grads query_grads",
    "norm and loss": "",
}


class Launcher:
    """Launches nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        pass


class Driver:
    """What Triton asks of a driver, for a GPU that is not there; keeps what it is given to load."""

    launcher_cls = Launcher

    def __init__(self) -> None:
        self.loaded: list[dict[str, Any]] = []
        properties = {"max_shared_mem": SHARED_MEMORY}
        self.utils = SimpleNamespace(load_binary=self.load, get_device_properties=lambda _: properties)

    def load(self, name: str, binary: bytes, shared: int, _device: int) -> tuple[int, ...]:
        self.loaded.append({"name": name, "shared": shared, **examine(binary)})
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, most threads

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def examine(binary: bytes) -> dict[str, int]:
    """Bytes that a thread spills, and instructions for Hopper's matrix units (wgmma) and for those before it."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack = re.search(r"STACK:(\d+)", listing)
    assert stack, listing[:500]
    products = re.findall(r"\b([HQ]G?MMA)\b", listing)
    wgmma = products.count("HGMMA")
    return {"spilled": int(stack[1]), "wgmma": wgmma, "mma": len(products) - wgmma}


def norm_and_loss() -> None:
    from flash_model import triton_add_norm, triton_cross_entropy

    rows, row = torch.randn(8, 768).bfloat16(), torch.randn(768).bfloat16()
    total, _, mean, scale = triton_add_norm.forward(rows, rows, row, row, row, eps=1e-5, center=True)
    triton_add_norm.backward(rows, rows, total, mean, scale, row, row, center=True)
    logits, targets = torch.randn(8, 32_000).bfloat16(), torch.zeros(8, dtype=torch.int64)
    triton_cross_entropy.cross_entropy_(logits, targets, targets == 0, True)


def main() -> None:
    """Print, as JSON by case, what its kernels were compiled to, or the traceback of what went wrong."""
    from triton.runtime import driver

    from flash_model.ops import dispatch

    vars(dispatch)["use_kernel"] = lambda *_: True
    results: dict[str, Any] = {}
    for name in PRODUCTS:
        hopper = Driver()
        driver.set_active(hopper)
        try:
            measure(public_op, draw(*CASES[name])) if name in CASES else norm_and_loss()
            results[name] = hopper.loaded
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, __file__], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("case", PRODUCTS)
def test_kernels_fit_an_h100_and_use_its_matrix_units(case: str, compiled: dict[str, Any]) -> None:
    kernels = compiled[case]
    assert isinstance(kernels, list), kernels
    assert [kernel for kernel in kernels if kernel["shared"] > SHARED_MEMORY or kernel["spilled"] > SPILLED] == []
    assert [kernel for kernel in kernels if kernel["mma"]] == []
    on_matrix_units = {kernel["name"].removesuffix("_kernel") for kernel in kernels if kernel["wgmma"]}
    assert on_matrix_units == set(PRODUCTS[case].split())


if __name__ == "__main__":
    main()
