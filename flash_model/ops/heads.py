"""Pieces that both reference ops are made of, each beside its adjoint.

B batch, T time, S query/key, H heads. Adjoints take the gradient of the result and return those of the inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_model.positions import rotate


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype sums are taken in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def silu_adjoint(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of SiLU(x) with respect to x, times `grad`."""
    return torch.ops.aten.silu_backward(grad, x)


def rotated_heads(z_BTS: Tensor, gamma_HS: Tensor, beta_HS: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return RoPE(SiLU(z) · gamma + beta) for every head: (H, B, T, S)."""
    heads_HBTS = torch.addcmul(beta_HS[:, None, None], F.silu(z_BTS), gamma_HS[:, None, None])
    return rotate(heads_HBTS, cos, sin)


def rotated_heads_adjoint(
    grad_HBTS: Tensor, z_BTS: Tensor, gamma_HS: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of z (B, T, S), gamma and beta (H, S)."""
    grad_HBTS = rotate(grad_HBTS, cos, -sin)
    activation_BTS = F.silu(z_BTS)
    grad_gamma = torch.stack([(grad_BTS * activation_BTS).sum((0, 1)) for grad_BTS in grad_HBTS])
    grad_activation = grad_HBTS[0] * gamma_HS[0]
    for grad_BTS, gamma_S in zip(grad_HBTS[1:], gamma_HS[1:], strict=True):
        grad_activation.addcmul_(grad_BTS, gamma_S)
    return silu_adjoint(grad_activation, z_BTS), grad_gamma, grad_HBTS.sum((1, 2))


def toeplitz(bias: Tensor, first_row: int, rows: int, columns: int) -> Tensor:
    """Return the bias of queries first_row … on keys 0 …, (rows, columns): element [i, j] is bias[j − i + L − 1].

    bias: (2L − 1,) with L ≥ first_row + rows and L ≥ columns.
    """
    low = (len(bias) + 1) // 2 - (first_row + rows)
    return bias[low : low + rows + columns - 1].unfold(0, columns, 1).flip(0)


def add_toeplitz_adjoint(grad_bias: Tensor, grad: Tensor, first_row: int) -> None:
    """Add to grad_bias (2L − 1,) the sums over the diagonals of grad (rows, columns), the gradient of `toeplitz`."""
    rows, columns = grad.shape
    low = (len(grad_bias) + 1) // 2 - (first_row + rows)
    # Read back as rows one element shorter, each row shifts by one more place: diagonals become columns.
    skewed = F.pad(grad.flip(0), (0, rows)).flatten()[: rows * (rows + columns - 1)].view(rows, rows + columns - 1)
    grad_bias[low : low + rows + columns - 1] += skewed.sum(0)
