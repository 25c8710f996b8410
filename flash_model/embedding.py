"""Embedding lookup with a gradient that is summed in a fixed order, compiled or not.

Left to torch.compile, the gradient of a lookup is atomic additions, whose order changes from run to run, unless all of
torch is told to be deterministic; then it is a slow scatter. As an op of its own it stays the sorted sum of eager mode.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """Return the rows of weight (V, D) that tokens (...) name: (..., D). Differentiable in weight, once."""
    embedded: Tensor = torch.ops.flash_model.embed(tokens, weight)
    return embedded


@torch.library.custom_op("flash_model::embed", mutates_args=())
def _embed(tokens: Tensor, weight_VD: Tensor) -> Tensor:
    return F.embedding(tokens, weight_VD)


@_embed.register_fake
def _(tokens: Tensor, weight_VD: Tensor) -> Tensor:
    return weight_VD.new_empty(*tokens.shape, weight_VD.shape[1])


@torch.library.custom_op("flash_model::embed_backward", mutates_args=())
def _embed_backward(grad: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    # So few torch adds up in bfloat16.
    few = grad.dtype == torch.bfloat16 and tokens.numel() <= 3072
    summed = torch.ops.aten.embedding_dense_backward(grad.float() if few else grad, tokens, vocab_size, -1, False)
    return summed.to(grad.dtype)


@_embed_backward.register_fake
def _(grad: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    return grad.new_empty(vocab_size, grad.shape[-1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    tokens, weight_VD = inputs
    ctx.save_for_backward(tokens)
    ctx.vocab_size = len(weight_VD)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
    (tokens,) = ctx.saved_tensors
    return None, torch.ops.flash_model.embed_backward(grad, tokens, ctx.vocab_size)


_embed.register_autograd(_differentiate, setup_context=_setup_context)
