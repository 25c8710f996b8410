"""Which implementation an op runs: Triton kernels or the reference."""

import functools
import importlib.util
import logging
import os

import torch

logger = logging.getLogger("flash_model.ops")

CHUNK_SIZES = (128, 256, 512)
KERNEL_DTYPES = (torch.bfloat16, torch.float32)


@torch.compiler.assume_constant_result
def use_kernel(
    op: str, device_type: str, dtype: torch.dtype, value_dim: int, qk_dim: int, chunk_size: int | None = None
) -> bool:
    """Return whether `op` runs its Triton kernels for such tensors, and say so once.

    On CUDA it does wherever kernels exist for the shapes; elsewhere the reference runs, with one warning on CUDA that
    says why (none for float64, which the kernels do not take). The environment variable FLASH_OP, "triton" or
    "reference", forces one; ValueError when it cannot be.
    """
    forced = os.environ.get("FLASH_OP", "")
    if forced not in ("", "triton", "reference"):
        raise ValueError(f'FLASH_OP must be "triton" or "reference" or unset: it is "{forced}"')
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return _decide(op, device_type, dtype, value_dim, qk_dim, chunk_size, forced, interpreted)


@functools.cache
def _decide(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    value_dim: int,
    qk_dim: int,
    chunk_size: int | None,
    forced: str,
    interpreted: bool,
) -> bool:
    problems = []
    if device_type != "cuda" and not (forced and interpreted):
        problems.append(f"tensors are on {device_type}, kernels need CUDA")
    if importlib.util.find_spec("triton") is None:
        problems.append("triton is not installed")
    if dtype not in KERNEL_DTYPES:
        problems.append(f"dtype is {dtype}, kernels take bfloat16 and float32")
    for name, width in (("E", value_dim), ("S", qk_dim)):
        if width % 64:
            problems.append(f"{name} = {width} is no multiple of 64")
    if qk_dim > 256:
        problems.append(f"S = {qk_dim} is more than 256")
    if chunk_size is not None and chunk_size not in CHUNK_SIZES:
        problems.append(f"chunk_size = {chunk_size} is none of 128, 256, 512")
    reason = "; ".join(problems)
    if forced == "reference":
        logger.info("%s: reference, as FLASH_OP says", op)
        return False
    if not problems:
        logger.info("%s: Triton kernels%s", op, ", as FLASH_OP says" if forced else "")
        return True
    if forced:
        raise ValueError(f"FLASH_OP=triton: {op} has no kernel for this call: {reason}")
    # Double precision is asked for where exactness matters more than speed, and the CPU has no kernels: no surprise.
    expected = device_type != "cuda" or dtype == torch.float64
    logger.log(logging.INFO if expected else logging.WARNING, "%s: reference, because %s", op, reason)
    return False
