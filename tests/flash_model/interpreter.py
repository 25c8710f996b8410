"""Triton's interpreter, faster: it reduces with a function of one's own element by element, in Python."""

from typing import Any

import numpy as np
from triton.runtime.interpreter import ReduceOps


def reduce_in_rows(self: Any, arguments: tuple[Any, ...]) -> list[Any]:
    """Combine what lies along the axis one after the other, as the interpreter does, but whole rows at a time."""
    assert self.axis is not None
    assert not self.keep_dims
    rows = [np.moveaxis(argument.handle.data, self.axis, 0) for argument in arguments]
    dtypes = [argument.dtype for argument in arguments]

    def at(i: int) -> list[Any]:
        return [self.to_tensor(row[i], dtype) for row, dtype in zip(rows, dtypes, strict=True)]

    total = at(0)
    for i in range(1, len(rows[0])):
        combined = self.combine_fn.fn(*total, *at(i))
        total = list(combined) if isinstance(combined, tuple) else [combined]
    return total


def hasten_interpreter() -> None:
    """Let kernels that are interpreted from now on reduce so."""
    ReduceOps.generic_reduce = reduce_in_rows
