"""`add_norm_linear` on a GPU: as exact as plain torch, the same bits twice, and no more kept than it says."""

import pytest
import torch
from torch import Tensor

from flash_model.add_norm_linear import add_norm_linear
from flash_model.norms import normalize

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
NAMES = ("x", "update", "update_bias", "gain", "shift", "weight", "bias")
both_norms = pytest.mark.parametrize("center", [True, False], ids=["layernorm", "scalenorm"])


def drawn(D: int, P: int = 320, rows: tuple[int, int] = (3, 700)) -> dict[str, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(D)
    shapes = {"x": (*rows, D), "update": (*rows, D), "update_bias": (D,), "gain": (D,), "shift": (D,)}
    shapes |= {"weight": (P, D), "bias": (P,)}
    made = {n: torch.randn(s, generator=generator, device=DEVICE, dtype=torch.float64) for n, s in shapes.items()}
    return made | {"grad_total": torch.randn_like(made["x"]), "grad": torch.randn(*rows, P, device=DEVICE).double()}


def plain(
    x: Tensor, update: Tensor | None, update_bias: Tensor, *others: Tensor, eps: float, center: bool
) -> tuple[Tensor, Tensor]:
    gain, shift, weight, bias = others
    total = x if update is None else x + (update + update_bias)
    return total, normalize(total, gain, shift, center=center, eps=eps) @ weight.T + bias


def results(function: object, given: dict[str, Tensor], dtype: torch.dtype, center: bool, update: bool) -> list[Tensor]:
    assert callable(function)
    leaves = {name: given[name].detach().to(dtype).requires_grad_() for name in NAMES if update or "update" not in name}
    total, projected = function(*(leaves.get(name) for name in NAMES), eps=1e-5, center=center)
    grads = (given["grad_total"].to(dtype), given["grad"].to(dtype))
    found = torch.autograd.grad((total, projected), list(leaves.values()), grads)
    return [total.detach(), projected.detach(), *found]


@both_norms
@pytest.mark.parametrize("update", [True, False], ids=["update", "no update"])
@pytest.mark.parametrize("D", [64, 768, 1000, 2048, 5120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_are_those_of_plain_torch(dtype: torch.dtype, D: int, update: bool, center: bool) -> None:
    given = drawn(D)
    for name in NAMES:
        given[name] = given[name].to(dtype).double()
    exact = results(plain, given, torch.float64, center, update)
    ours, theirs = (results(f, given, dtype, center, update) for f in (add_norm_linear, plain))
    for found, other, reference in zip(ours, theirs, exact, strict=True):
        error, peer = (((x.double() - reference).norm() / reference.norm()).item() for x in (found, other))
        assert found.dtype == dtype
        assert error < max(1.5 * peer, 2e-6)


@both_norms
def test_two_runs_give_the_same_bits(center: bool) -> None:
    given = drawn(768, rows=(8, 1000))
    first, second = (results(add_norm_linear, given, torch.bfloat16, center, True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_a_bias_at_any_address_gives_the_same_bits(offset: int) -> None:
    given = {name: value.bfloat16() for name, value in drawn(768, P=3200, rows=(8, 512)).items()}
    expected = add_norm_linear(*(given[name] for name in NAMES), eps=1e-5, center=True)
    moved = torch.empty(offset + 3200, device=DEVICE, dtype=torch.bfloat16)[offset:].copy_(given["bias"])
    found = add_norm_linear(*((given | {"bias": moved})[name] for name in NAMES), eps=1e-5, center=True)
    assert moved.data_ptr() % 16 != 0
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


def test_torch_accepts_the_op() -> None:
    given = [drawn(64, rows=(1, 40))[name].float() for name in NAMES]
    flat = [t.reshape(-1, 64) if t.ndim == 3 else t for t in given]
    for update in (True, False):
        arguments = [t.detach().requires_grad_() for t in flat]
        torch.library.opcheck(
            torch.ops.flash_model.add_norm_linear,
            (arguments[0], *(arguments[1:3] if update else (None, None)), *arguments[3:], 1e-5, True),
        )


def test_the_sum_is_all_that_is_kept() -> None:
    given = {name: value.bfloat16().requires_grad_() for name, value in drawn(768, rows=(4, 1024)).items()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        add_norm_linear(*(given[name] for name in NAMES), eps=1e-5, center=True)
    assert sum(t.numel() for t in kept if t.shape[0] == 4 * 1024 and t.ndim == 2) == 4 * 1024 * 768


def test_no_rows_are_no_error() -> None:
    given = drawn(64, rows=(1, 0))
    total, projected, *grads = results(add_norm_linear, given, torch.bfloat16, True, True)
    assert total.shape == (1, 0, 64)
    assert projected.shape == (1, 0, 320)
    assert not any(grad.any() for grad in grads[2:])
