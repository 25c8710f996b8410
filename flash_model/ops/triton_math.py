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


@triton.jit
def gated(u, attended):
    """SiLU(u) · attended in float32, with u as `gate_input` has it; likewise attended's gradient of the output's."""
    return silu(gate_input(u)) * attended.to(tl.float32)


@triton.jit
def gate_backward(u, out, grad_out):
    """The gradient of u, in float32, of out = `gated`(u, attended): attended is not needed."""
    u = gate_input(u)
    return grad_out.to(tl.float32) * out.to(tl.float32) * (1.0 / u + 1.0 - sigmoid(u))


@triton.jit
def load_rows(ptr, inside, WHOLE: tl.constexpr):
    """Load a block; where not WHOLE, rows that are not inside (rows, 1) are 0."""
    if WHOLE:
        return tl.load(ptr)
    else:  # noqa: RET505
        return tl.load(ptr, mask=inside, other=0.0)


@triton.jit
def store_rows(ptr, x, inside, WHOLE: tl.constexpr):
    """Store a block in the pointers' dtype, where not WHOLE only the rows inside (rows, 1)."""
    x = x.to(ptr.dtype.element_ty)
    if WHOLE:
        tl.store(ptr, x)
    else:
        tl.store(ptr, x, mask=inside)


@triton.jit
def rotated_head(a1, a2, gamma_ptr, beta_ptr, head: tl.constexpr, pair, present, cos, sin, S: tl.constexpr):
    """RoPE(activation · gamma + beta) of one head, as its two halves."""
    first = head * S + pair
    second = first + S // 2
    gamma1 = tl.load(gamma_ptr + first, mask=present, other=0.0).to(tl.float32)[None, :]
    gamma2 = tl.load(gamma_ptr + second, mask=present, other=0.0).to(tl.float32)[None, :]
    beta1 = tl.load(beta_ptr + first, mask=present, other=0.0).to(tl.float32)[None, :]
    beta2 = tl.load(beta_ptr + second, mask=present, other=0.0).to(tl.float32)[None, :]
    return rotate(a1 * gamma1 + beta1, a2 * gamma2 + beta2, cos, sin)


@triton.jit
def _add4(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def rotated_head_backward(
    x1, x2, a1, a2, cos, sin, gamma_ptr, partial, pair, present,
    head: tl.constexpr, HEADS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Gradient of one rotated head → that of the activation; its sums over the rows, gamma's and beta's, are stored."""
    H: tl.constexpr = S // 2
    x1, x2 = rotate(x1, x2, cos, -sin)
    gamma_sum1, gamma_sum2, beta_sum1, beta_sum2 = tl.reduce((x1 * a1, x2 * a2, x1, x2), 0, _add4)
    tl.store(partial + head * S, gamma_sum1, mask=present)
    tl.store(partial + head * S + H, gamma_sum2, mask=present)
    tl.store(partial + (HEADS + head) * S, beta_sum1, mask=present)
    tl.store(partial + (HEADS + head) * S + H, beta_sum2, mask=present)
    gamma1 = tl.load(gamma_ptr + head * S + pair, mask=present, other=0.0).to(tl.float32)
    gamma2 = tl.load(gamma_ptr + head * S + H + pair, mask=present, other=0.0).to(tl.float32)
    return x1 * gamma1[None, :], x2 * gamma2[None, :]
