"""Angles, rotations and sinusoids of positions.

Angles come from float64 and their sines and cosines are rounded once: a table for the starts of blocks times a table
for the offsets inside a block. A float32 position times a frequency would be off by 8e-3 at 131,072 positions.
"""

import torch
from torch import Tensor


def frequencies(half: int, base: float, device: torch.device | None = None) -> Tensor:
    """Return base^(−k/half) for k = 0 … half − 1 as float64 (half,)."""
    return base ** (-torch.arange(half, dtype=torch.float64, device=device) / half)


def cos_sin(
    start: int,
    length: int,
    half: int,
    *,
    base: float,
    block: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of position × frequency for positions start …, each (length, half) of `dtype`.

    `block` is the length of the offset table: only length/block + block angles are evaluated for each frequency.
    """
    return torch.ops.flash_model.cos_sin(start, length, half, base, block, dtype, device or torch.device("cpu"))


# An op, so that the compiler takes the tables as they are: it would fuse the float64 powers, sines and cosines into
# whatever reads them, and evaluate them again for every element of a batch.
@torch.library.custom_op("flash_model::cos_sin", mutates_args=())
def _cos_sin(
    start: int, length: int, half: int, base: float, block: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    frequency = frequencies(half, base, device)
    starts = start + block * torch.arange(-(-length // block), dtype=torch.float64, device=device)
    offsets = torch.arange(block, dtype=torch.float64, device=device)
    start_angle, offset_angle = starts[:, None, None] * frequency, offsets[:, None] * frequency
    start_cos, start_sin = start_angle.cos().to(dtype), start_angle.sin().to(dtype)
    offset_cos, offset_sin = offset_angle.cos().to(dtype), offset_angle.sin().to(dtype)
    cos = start_cos * offset_cos - start_sin * offset_sin
    sin = start_sin * offset_cos + start_cos * offset_sin
    return cos.reshape(-1, half)[:length].clone(), sin.reshape(-1, half)[:length].clone()


@_cos_sin.register_fake
def _(
    start: int, length: int, half: int, base: float, block: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    cos = torch.empty(length, half, dtype=dtype, device=device)
    return cos, torch.empty_like(cos)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[k], x[k + half]) of the last dimension by the angles of cos and sin, (T, half): RoPE.

    Its inverse and its gradient are the rotation by `-sin`. Not differentiated by autograd: it writes in place.
    """
    x1, x2 = x.chunk(2, dim=-1)
    half = x1.shape[-1]
    rotated = torch.empty_like(x)
    torch.mul(x1, cos, out=rotated[..., :half]).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=rotated[..., half:]).addcmul_(x1, sin)
    return rotated


def rotate_heads(x_BTHS: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` for heads side by side, (B, T, H, S) by (T, S / 2) angles: differentiable, in x's dtype."""
    x1, x2 = x_BTHS.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([(x1 * cos - x2 * sin).to(x1.dtype), (x2 * cos + x1 * sin).to(x1.dtype)], -1)


def rotary_bias(a: Tensor, b: Tensor, extent: int, *, base: float) -> Tensor:
    """Return aᵀ R_i R_jᵀ b as a Toeplitz vector (2·extent − 1,): element j − i + extent − 1 is that of query i, key j.

    a, b: (S,) learned. A product of two rotations depends on i − j alone, so no (extent, extent) tensor is needed
    (paper, section 3: 512 positions and more).
    """
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    (a1, a2), (b1, b2) = a.to(dtype).chunk(2), b.to(dtype).chunk(2)
    cos, sin = cos_sin(
        1 - extent, 2 * extent - 1, len(a1), base=base, block=min(extent, 256), dtype=dtype, device=a.device
    )
    return cos @ (a1 * b1 + a2 * b2) + sin @ (a2 * b1 - a1 * b2)


def sinusoids(
    start: int, length: int, width: int, *, base: float, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """Return the ScaledSin table (length, width) of positions start …: half sines, half cosines, not yet scaled."""
    cos, sin = cos_sin(start, length, width // 2, base=base, block=256, dtype=dtype, device=device)
    return torch.cat([sin, cos], dim=-1)
