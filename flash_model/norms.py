"""The two normalisations of the paper."""

import torch
from torch import Tensor, nn


class ScaleNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) · gain over the last dimension, with one scalar gain; computed in float32 or better."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(1))  # DeepSpeed cannot broadcast a 0-dimensional parameter

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.gain).to(x.dtype)


def build_norm(kind: str, width: int, eps: float) -> nn.Module:
    """Return the norm named by `ModelConfig.norm`: "layernorm" or "scalenorm"."""
    return nn.LayerNorm(width, eps=eps) if kind == "layernorm" else ScaleNorm(eps)
