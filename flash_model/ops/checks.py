"""What both ops demand of their tensors. Every message names the argument, what it is and what it must be."""

import torch
from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""torch cannot compare wider unsigned ones."""


def check_projection(
    uvz: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bias: Tensor,
    doc_ids: Tensor | None,
    *,
    heads: int,
    bias_length: int,
    bias_rule: str,
    rope_base: float,
    projection_bias: Tensor | None = None,
) -> None:
    """Raise ValueError unless the tensors fit each other in shape, dtype and device, and rope_base makes angles."""
    if gamma.ndim != 2 or gamma.shape[0] != heads or gamma.shape[1] % 2 or gamma.shape[1] == 0:
        raise ValueError(f"gamma must have shape ({heads}, S) with an even S: it has {tuple(gamma.shape)}")
    if beta.shape != gamma.shape:
        raise ValueError(f"beta must have gamma's shape {tuple(gamma.shape)}: it has {tuple(beta.shape)}")
    S = gamma.shape[1]
    if uvz.ndim != 3 or uvz.shape[0] == 0 or uvz.shape[1] == 0:
        raise ValueError(
            f"uvz must have shape (B, T, 2E + S) with at least one sequence and one token: it has {tuple(uvz.shape)}"
        )
    if uvz.shape[2] <= S or (uvz.shape[2] - S) % 2:
        raise ValueError(f"uvz must have 2E + S columns where gamma's S is {S}: it has {uvz.shape[2]}")
    if bias.shape != (bias_length,):
        raise ValueError(f"bias must have shape ({bias_rule},) = ({bias_length},): it has {tuple(bias.shape)}")
    if projection_bias is not None and projection_bias.shape != uvz.shape[2:]:
        raise ValueError(
            f"projection_bias must have shape (2E + S,) = {tuple(uvz.shape[2:])}: it has {tuple(projection_bias.shape)}"
        )
    if not 0 < rope_base < float("inf"):
        raise ValueError(f"rope_base must be a positive number: it is {rope_base}")
    if uvz.dtype not in _DTYPES:
        raise ValueError(f"uvz must be float64, float32 or bfloat16: it is {uvz.dtype}")
    parameters = {"gamma": gamma, "beta": beta, "bias": bias, "projection_bias": projection_bias}
    for name, tensor in parameters.items():
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float64, float32 or bfloat16: it is {tensor.dtype}")
    if doc_ids is not None:
        if doc_ids.shape != uvz.shape[:2]:
            raise ValueError(f"doc_ids must have shape (B, T) = {tuple(uvz.shape[:2])}: it has {tuple(doc_ids.shape)}")
        if doc_ids.dtype not in INTEGERS:
            raise ValueError(f"doc_ids must be signed integers or uint8: they are {doc_ids.dtype}")
    for name, other in (parameters | {"doc_ids": doc_ids}).items():
        if other is not None and other.device != uvz.device:
            raise ValueError(f"{name} is on {other.device}, uvz on {uvz.device}: all must be on one device")


def check_chunk_size(chunk_size: int) -> None:
    """Raise ValueError unless chunk_size is a power of two."""
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two: it is {chunk_size}")


def check_documents(doc_ids: Tensor | None) -> None:
    """Raise ValueError unless doc_ids (B, T) never decrease along T; only on the CPU: a GPU would be waited for."""
    if doc_ids is not None and doc_ids.device.type == "cpu" and bool((doc_ids[:, 1:] < doc_ids[:, :-1]).any()):
        raise ValueError("doc_ids must not decrease along T: number the documents of a sequence in their order")
