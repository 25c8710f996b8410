"""Device functions that the Triton kernels share."""

# Kernels are Triton's, not Python's, to check.
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs, no-warn-unreachable
# mypy: disable-error-code="assignment,misc"

import triton
import triton.language as tl
from triton import knobs

INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(−x)) of a float32 block."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    """SiLU in float32 of a block of any dtype."""
    x = x.to(tl.float32)
    return x * sigmoid(x)


@triton.jit
def activate(x):
    """SiLU of a block, in its dtype. For bfloat16 by the hardware's tanh, whose error is a quarter of its rounding."""
    if x.dtype == tl.bfloat16 and not INTERPRETED:
        half = 0.5 * x.to(tl.float32)
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [half], tl.float32, is_pure=True, pack=1)
        return (half + half * tanh).to(tl.bfloat16)
    return silu(x).to(x.dtype)


@triton.jit
def silu_derivative(x):
    """The derivative of SiLU in float32."""
    x = x.to(tl.float32)
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def gate_input(u):
    """u in float32, kept away from 0, so that `attended` can be had back from SiLU(u) · attended."""
    u = u.to(tl.float32)
    return tl.where(tl.abs(u) < 1e-18, 1e-18, u)


@triton.jit
def dot(a, b, acc):
    """acc + a · b with products and sums in float32, whatever the operands' dtype; never tf32."""
    if INTERPRETED:  # the interpreter's bfloat16 product is wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rotate(x1, x2, cos, sin):
    """Rotate the pairs (x1, x2) by the angles of cos and sin; by their negatives with −sin."""
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin
