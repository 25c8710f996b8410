"""What every test here starts from, and memory that is full of NaN where nobody wrote."""

import os
from collections.abc import Callable, Generator

import pytest
import torch

from tests.gpu.comparison import DEVICE

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, before the first product


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Kernels run where the ops choose them; `comparison.kernels` makes sure of it."""
    monkeypatch.delenv("FLASH_OP", raising=False)
    yield
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def poison() -> Generator[Callable[[], None]]:
    """A function that fills free GPU memory with NaN; while the test runs, new tensors are full of it too."""

    def fill_free_memory() -> None:
        if DEVICE.type == "cuda":
            # Blocks of up to 1 MiB come from a pool of their own.
            blocks = [torch.full((size,), 255, dtype=torch.uint8, device=DEVICE) for size in [2**20] * 64 + [2**31]]
            del blocks

    torch.use_deterministic_algorithms(True, warn_only=True)  # with it, torch.empty fills with NaN
    yield fill_free_memory
    torch.use_deterministic_algorithms(False)
