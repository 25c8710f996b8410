"""The Transformers that FLASH is compared with (paper, section 4), on torch's fused softmax attention.

As strong as they are usually built: no dense biases, one projection for queries, keys and values and one for both
halves of the gated feed-forward, and the embedding, head, loss and initial values of `FlashLM`.

Shape letters: B batch, T time, D model, H heads, K head width, F feed-forward.
"""

from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from flash_model.config import ModelFlops, decided_head_scale
from flash_model.init import build_initialized
from flash_model.lm import ScaledSin, TiedEmbedding
from flash_model.ops.heads import accumulation_dtype
from flash_model.positions import cos_sin, rotate_heads

FEED_FORWARD_MULTIPLE = 64  # the gated feed-forward's width is rounded up to it: 8/3 of d_model is no tile size


class TransformerConfig(BaseModel):
    """A baseline. Frozen; unknown keys are errors. What the paper does not name is marked as ours."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    architecture: Literal["transformer", "transformer+", "transformer++"] = "transformer++"
    """transformer: sinusoidal positions, GELU feed-forward. transformer+: rotary positions instead. transformer++: and
    a SwiGLU feed-forward with as many parameters."""
    vocab_size: int = Field(gt=0)
    """V, the pieces of the tokenizer; embedding and head share one (V, d_model) matrix (sharing: ours)."""
    d_model: int = Field(gt=0)
    """Width of the residual stream."""
    n_layers: int = Field(gt=0)
    """Number of layers of attention and feed-forward. One stands for two gated attention units."""
    head_dim: int = Field(default=64, gt=0)
    """Width of an attention head (paper: 64); d_model / head_dim heads."""
    causal: bool = True
    """True for language models; False for masked language models: every token reads all of its document."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the variance in every LayerNorm."""
    rope_base: float = Field(default=10000.0, gt=1)
    """Base of the rotary angles and of the sinusoids."""
    head_scale: float | Literal["auto"] = "auto"
    """Factor on the logits (ours), by FLASH's rule: auto is min(1, 256 / d_model)."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial dense kernels and embedding (ours: FLASH's)."""

    @model_validator(mode="after")
    def _report_impossible_combinations(self) -> Self:
        problems = []
        if self.d_model % self.head_dim:
            problems.append(f"d_model: {self.d_model} is not a multiple of head_dim {self.head_dim}")
        if self.rotary and self.head_dim % 2:
            problems.append(f"head_dim: {self.head_dim} is odd; rotary positions turn pairs: make it even")
        if not self.rotary and self.d_model % 2:
            problems.append(f"d_model: {self.d_model} is odd; sinusoids are half sines, half cosines: make it even")
        if self.head_scale != "auto" and self.head_scale <= 0:
            problems.append(f'head_scale: {self.head_scale} is not positive; take "auto" or a positive number')
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def rotary(self) -> bool:
        """Whether positions are rotations of queries and keys; else sinusoids are added to the embeddings."""
        return self.architecture != "transformer"

    @property
    def gated(self) -> bool:
        """Whether the feed-forward is SwiGLU; else it has one GELU."""
        return self.architecture == "transformer++"

    @property
    def n_heads(self) -> int:
        """H, the number of attention heads."""
        return self.d_model // self.head_dim

    @property
    def feed_forward_dim(self) -> int:
        """F: 4 · d_model, or for SwiGLU's three matrices 8/3 of it, so that a layer keeps 12 · d_model² parameters."""
        if not self.gated:
            return 4 * self.d_model
        return -(-8 * self.d_model // (3 * FEED_FORWARD_MULTIPLE)) * FEED_FORWARD_MULTIPLE

    @property
    def logit_scale(self) -> float:
        """`head_scale` with "auto" decided."""
        return decided_head_scale(self.head_scale, self.d_model)


class TransformerLayer(nn.Module):
    """Pre-norm attention and pre-norm feed-forward, each added to what it reads."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        D, F_ = config.d_model, config.feed_forward_dim
        self.attention_norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.project_qkv = nn.Linear(D, 3 * D, bias=False)
        self.project_attended = nn.Linear(D, D, bias=False)
        self.feed_forward_norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.expand = nn.Linear(D, 2 * F_ if config.gated else F_, bias=False)
        self.contract = nn.Linear(F_, D, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        """Map x (B, T, D) to the same shape.

        rotation: cosine and sine of the rotary angles, (T, head_dim / 2) each; None for sinusoidal positions.
        mask: (B, 1, T, T) bool, which query may read which key; None: `config.causal` decides alone.
        """
        x = x + self.project_attended(self._attend(self.project_qkv(self.attention_norm(x)), rotation, mask))
        expanded = self.expand(self.feed_forward_norm(x))
        if self.config.gated:
            gate, value = expanded.chunk(2, -1)
            return x + self.contract(F.silu(gate) * value)
        return x + self.contract(F.gelu(expanded))

    def _attend(self, qkv: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        q_BTHK, k_BTHK, v_BTHK = qkv.unflatten(-1, (3, self.config.n_heads, self.config.head_dim)).unbind(2)
        if rotation is not None:
            q_BTHK, k_BTHK = rotate_heads(q_BTHK, *rotation), rotate_heads(k_BTHK, *rotation)
        attended_BHTK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2),
            k_BTHK.transpose(1, 2),
            v_BTHK.transpose(1, 2),
            attn_mask=mask,
            is_causal=self.config.causal and mask is None,
        )
        return attended_BHTK.transpose(1, 2).flatten(2)


class TransformerLM(nn.Module):
    """Transformer, Transformer+ or Transformer++ as a language model, causal or masked. `config` holds what it is."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TiedEmbedding(config.vocab_size, config.d_model)
        self.positions = None if config.rotary else ScaledSin(config.rope_base)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        loss_mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, T, V), or with targets the summed nats; arguments and result are those of `FlashLM`.

        doc_ids makes a (B, 1, T, T) mask, which fused attention reads whole: time and memory are quadratic in T.
        """
        x = self.embedding(tokens)
        if self.positions is not None:
            x = self.positions(x)
        rotation, mask = self._rotation(x), self._mask(doc_ids)
        for layer in self.layers:
            x = layer(x, rotation, mask)
        return self.head(x, targets, loss_mask)

    def head(self, x: Tensor, targets: Tensor | None = None, loss_mask: Tensor | None = None) -> Tensor:
        """Norm, scale and project what leaves the last layer, (B, T, D): logits, with targets summed nats."""
        hidden = self.norm(x) * self.config.logit_scale
        return self.embedding(hidden, project=True, targets=targets, loss_mask=loss_mask)

    def _rotation(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.config.rotary:
            return None
        length, half = x.shape[1], self.config.head_dim // 2
        dtype = accumulation_dtype(x)
        return cos_sin(0, length, half, base=self.config.rope_base, block=256, dtype=dtype, device=x.device)

    def _mask(self, doc_ids: Tensor | None) -> Tensor | None:
        if doc_ids is None:
            return None
        mask = doc_ids[:, None, :, None] == doc_ids[:, None, None, :]
        return mask.tril() if self.config.causal else mask


def build_baseline(
    config: TransformerConfig,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> TransformerLM:
    """Build and initialise the baseline of `config`, as `flash_model.lm.build_model` does FLASH."""
    return build_initialized(TransformerLM, config, seed=seed, device=device, dtype=dtype)


def count_parameters(config: TransformerConfig) -> int:
    """Return the number of learned parameters, by formula."""
    D = config.d_model
    norm = 2 * D
    return config.vocab_size * D + int(not config.rotary) + config.n_layers * (_layer_weights(config) + 2 * norm) + norm


def flops_per_token(config: TransformerConfig, seq_len: int) -> ModelFlops:
    """Return the forward model FLOPs per token in sequences of seq_len; softmax attention counts as local.

    By FLASH's rule: head included, embedding, norms and recomputation not, causal attention at half.
    """
    attention = 4 * seq_len * config.d_model
    return ModelFlops(
        projections=config.n_layers * 2 * _layer_weights(config),
        local=config.n_layers * (attention // 2 if config.causal else attention),
        linear=0,
        head=2 * config.d_model * config.vocab_size,
    )


def _layer_weights(config: TransformerConfig) -> int:
    """The elements of a layer's dense kernels."""
    return 4 * config.d_model**2 + (3 if config.gated else 2) * config.d_model * config.feed_forward_dim
