"""Run every kernel once on small odd shapes, for a tool that watches memory.

compute-sanitizer --tool memcheck python -m tests.gpu.sanitize
compute-sanitizer --tool racecheck python -m tests.gpu.sanitize [bfloat16 | float32]
"""

import sys

import torch

from flash_model.add_norm_linear import add_norm_linear
from flash_model.loss import linear_cross_entropy
from tests.gpu.comparison import DEVICE, Case, draw, kernels, measure

CASES = [
    Case(64, 64, 257, 2, 128, documents=True, state=True),
    Case(64, 64, 256, 2, 128, documents=True, state=True),
    Case(64, 128, 300, 1, 128, causal=False),
    Case(128, 192, 300, 2, 256, causal=False, documents=True),
    Case(192, 128, 513, 1, 512),
    Case(64, 64, 1, 1, 128),
    Case(64, 2112, 130, 1, 128),
    Case(64, 64, 257, 2, None, documents=True, state=True),
    Case(128, 320, 300, 1, None, causal=False),
]


def run_loss(dtype: torch.dtype) -> None:
    """The head and its cross-entropy, forward and backward, with a vocabulary that no block divides."""
    hidden = torch.randn(77, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = torch.randn(1001, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 1001, (77,), device=DEVICE)
    linear_cross_entropy(hidden, weight, targets, targets % 3 != 0).backward()


def run_norm(dtype: torch.dtype) -> None:
    """Both norms with and without an update, forward and backward, in a width that no block is."""
    shapes = ((3, 201, 96), (3, 201, 96), (96,), (96,), (96,), (40, 96), (40,))
    x, update, update_bias, *others = (
        torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes
    )
    gain, shift, weight, bias = others
    for center in (True, False):
        for added, its_bias in ((update, update_bias), (None, None)):
            total, projected = add_norm_linear(x, added, its_bias, gain, shift, weight, bias, eps=1e-5, center=center)
            (total.sum() + projected.sum()).backward()


def main() -> None:
    """Forward and backward of every case in both dtypes, or those named; the last line is "done"."""
    for name in sys.argv[1:] or ("bfloat16", "float32"):
        dtype = getattr(torch, name)
        for case in CASES:
            measure(kernels, draw(case, dtype))
            torch.cuda.synchronize()
            print(dtype, case, flush=True)
        run_loss(dtype)
        torch.cuda.synchronize()
        print(dtype, "loss", flush=True)
        run_norm(dtype)
        torch.cuda.synchronize()
        print(dtype, "norms", flush=True)
    print("done")


if __name__ == "__main__":
    main()
