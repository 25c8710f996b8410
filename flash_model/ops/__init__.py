"""Attention of FLASH and FLASH-Quad as `torch.library` ops."""

from flash_model.ops.mixed_chunk import mixed_chunk_attention
from flash_model.ops.quadratic import quadratic_attention
from flash_model.ops.state import AttentionState, combine

__all__ = ["AttentionState", "combine", "mixed_chunk_attention", "quadratic_attention"]
