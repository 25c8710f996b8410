"""The two normalisations of the paper."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """The parameters of a norm named by `ModelConfig.norm`: layernorm's weight and bias, scalenorm's one gain.

    `normalize`, or an op of which the norm is a part, does the arithmetic.
    """

    def __init__(self, kind: str, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps, self.center = width, eps, kind == "layernorm"
        if self.center:
            self.weight = nn.Parameter(torch.ones(width))
            self.bias = nn.Parameter(torch.zeros(width))
        else:
            self.gain = nn.Parameter(torch.ones(1))  # DeepSpeed cannot broadcast a 0-dimensional parameter

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return gain and shift (width,). Copies: under ZeRO-3 parameters are there only as long as this runs."""
        if self.center:
            return self.weight.clone(), self.bias.clone()
        return self.gain.repeat(self.width), self.gain.new_zeros(self.width)


def normalize(x: Tensor, gain: Tensor, shift: Tensor, *, center: bool, eps: float) -> Tensor:
    """Return x over the root of its mean square, after its mean was taken off (center), times gain plus shift.

    Means are over the last dimension, eps is added to the mean square; computed in float32 or better.
    """
    if center:
        return F.layer_norm(x, gain.shape, gain, shift, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain + shift).to(x.dtype)
