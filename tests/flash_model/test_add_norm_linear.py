"""The kernels of `add_norm_linear` under Triton's interpreter, and its plain form, against float64 by the formula.

In a process of its own: triton reads the switch when it is imported, and others import it without.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_model.add_norm_linear import add_norm_linear
from flash_model.config import ModelConfig
from flash_model.gau import GatedAttentionUnit
from flash_model.init import initialize

N, EPS = 37, 1e-3
ARCHITECTURES = ("flash", "flash_quad")
CASES = list(itertools.product((64, 96), (True, False), (True, False)))


def drawn(D: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(D)
    shapes = {
        "x": (N, D),
        "update": (N, D),
        "update_bias": (D,),
        "gain": (D,),
        "shift": (D,),
        "weight": (24, D),
        "bias": (24,),
    }
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def formula(given: dict[str, Tensor], *, center: bool, has_update: bool) -> tuple[Tensor, Tensor]:
    """The sum and its norm, by the paper."""
    total, gain, shift = given["x"], given["gain"], given["shift"]
    if has_update:
        total = total + given["update"] + given["update_bias"]
    centered = total - total.mean(1, keepdim=True) if center else total
    return total, centered / (centered.square().mean(1, keepdim=True) + EPS).sqrt() * gain + shift


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def kernel_errors(D: int, center: bool, has_update: bool) -> dict[str, float]:
    """Errors of the op on its kernels, outputs and gradients, in float32."""
    names = [name for name in drawn(D) if has_update or not name.startswith("update")]
    exact = {name: value.requires_grad_() for name, value in drawn(D).items()}
    total, normed = formula(exact, center=center, has_update=has_update)
    outputs = (total, normed @ exact["weight"].T + exact["bias"])
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in outputs]
    expected = [*outputs, *torch.autograd.grad(outputs, [exact[name] for name in names], grads)]

    single = {name: value.detach().float().requires_grad_() for name, value in exact.items()}
    arguments: list[Any] = [single[name] if name in names else None for name in single]
    ours = add_norm_linear(*arguments, eps=EPS, center=center)
    found = [*ours, *torch.autograd.grad(ours, [single[name] for name in names], [g.float() for g in grads])]
    labels = ["total", "projected", *(f"gradient of {name}" for name in names)]
    return {label: distance(*pair) for label, *pair in zip(labels, found, expected, strict=True)}


def same_compiled(architecture: Any) -> bool:
    """Whether a layer is one graph with the op's kernels in it, and its gradients those of the eager one."""
    config = ModelConfig(
        architecture=architecture, vocab_size=8, d_model=64, n_layers=1, qk_dim=64, chunk_size=128, norm_length=64
    )
    layer = GatedAttentionUnit(config)
    initialize(layer, config, seed=0)
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    results = []
    for module in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        for update in ((), (x.flip(1), x[0, 0])):
            out = sum(module(x, None, *update))
            results.append(torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))
    return all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6)
        for eager, compiled in zip(results[:2], results[2:], strict=True)
        for a, b in zip(eager, compiled, strict=True)
    )


def main() -> None:
    """Print, as JSON, the errors by case, and whether layers compile."""
    from flash_model import triton_add_norm
    from tests.flash_model.interpreter import hasten_interpreter

    hasten_interpreter()
    torch.use_deterministic_algorithms(True)  # with it, torch.empty fills with NaN: what is left unwritten shows
    vars(sys.modules["flash_model.add_norm_linear"])["_has_kernels"] = lambda _: True
    triton_add_norm.PROGRAMS = 5  # unequal shares of the rows
    results: dict[str, Any] = {str(case): kernel_errors(*case) for case in CASES}
    for architecture in ARCHITECTURES:
        results[architecture] = same_compiled(architecture)
    print(json.dumps(results))


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_are_the_formula(measured: dict[str, Any], case: tuple[int, bool, bool]) -> None:
    assert {name: error for name, error in measured[str(case)].items() if not error < 1e-6} == {}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plain_form_is_the_formula(case: tuple[int, bool, bool]) -> None:
    D, center, has_update = case
    given = drawn(D)
    arguments: list[Any] = [given[n] if has_update or not n.startswith("update") else None for n in given]
    total, projected = add_norm_linear(*arguments, eps=EPS, center=center)
    expected, normed = formula(given, center=center, has_update=has_update)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(projected, normed @ given["weight"].T + given["bias"], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_layer_with_the_kernels_compiles_to_one_graph(measured: dict[str, Any], architecture: str) -> None:
    assert measured[architecture]


if __name__ == "__main__":
    main()
