"""What a model is: its configuration, its number of parameters, its FLOPs."""

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flash_model.flops import mixed_chunk_flops, quadratic_flops

TOEPLITZ_POSITIONS = 512  # fewer positions than this learn one bias weight for each distance (paper, section 3)


def decided_head_scale(head_scale: float | Literal["auto"], d_model: int) -> float:
    """The factor on the logits; "auto" is min(1, 256 / d_model)."""
    return min(1.0, 256 / d_model) if head_scale == "auto" else head_scale


class ModelConfig(BaseModel):
    """A FLASH model. Frozen; unknown keys are errors. A default that is not the paper's is said to be ours."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    architecture: Literal["flash", "flash_quad"] = "flash"
    """flash: mixed chunk attention, linear in the length. flash_quad: the same unit with attention over all tokens."""
    vocab_size: int = Field(gt=0)
    """V, the pieces of the tokenizer; embedding and head share one (V, d_model) matrix (sharing: ours)."""
    d_model: int = Field(gt=0)
    """Width of the residual stream."""
    n_layers: int = Field(gt=0)
    """Number of gated attention units. Two of them replace one attention and feed-forward layer of a Transformer."""
    expansion: int = Field(default=2, gt=0)
    """Width of u and v is expansion × d_model (paper: 2)."""
    qk_dim: int = Field(default=128, gt=0)
    """Width of the shared queries and keys (paper: 128)."""
    chunk_size: int = Field(default=256, gt=0)
    """C in tokens, a power of two (paper: 256). flash_quad has no chunks and does not read it."""
    causal: bool = True
    """True for language models; False for masked language models: every token reads all of its document."""
    norm: Literal["layernorm", "scalenorm"] = "layernorm"
    """The pre-norm. layernorm for language models, scalenorm for masked ones (which for which: ours)."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the variance (layernorm) or the mean square (scalenorm)."""
    position_bias: Literal["auto", "toeplitz", "rotary"] = "auto"
    """Relative bias on the scores. toeplitz: a weight for each distance. rotary: two learned vectors. auto: by the
    number of positions it spans (chunk_size; norm_length for flash_quad), toeplitz below 512, else rotary (paper)."""
    norm_length: int | None = Field(default=None, gt=0)
    """n of flash_quad in tokens: its scores are divided by it, and no longer sequence can be read. Set it to the
    training length. flash divides by chunk_size and does not read it."""
    rope_base: float = Field(default=10000.0, gt=1)
    """Base of the rotary angles and of the sinusoids (paper: 10000)."""
    head_scale: float | Literal["auto"] = "auto"
    """Factor on the logits (ours). The head shares the embedding, so the logit of the token just read grows with
    d_model and the first loss leaves ln V. auto: min(1, 256 / d_model), which keeps it within 2 % (measured)."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial dense kernels, gamma and bias weights (paper: 0.02), and embedding (ours)."""
    scaled_sin: bool = True
    """Add sinusoids times one learned scalar to the embeddings (paper)."""

    @model_validator(mode="after")
    def _report_impossible_combinations(self) -> Self:
        problems = []
        if self.scaled_sin and self.d_model % 2:
            problems.append(f"d_model: {self.d_model} is odd; sinusoids are half sines, half cosines: make it even")
        if self.qk_dim % 2:
            problems.append(f"qk_dim: {self.qk_dim} is odd; rotary positions turn pairs: make it even")
        if self.architecture == "flash" and self.chunk_size & (self.chunk_size - 1):
            problems.append(f"chunk_size: {self.chunk_size} is not a power of two; take 128, 256 or 512")
        if self.architecture == "flash_quad" and self.norm_length is None:
            problems.append("norm_length: flash_quad needs it; set it to the training length in tokens")
        if self.head_scale != "auto" and self.head_scale <= 0:
            problems.append(f'head_scale: {self.head_scale} is not positive; take "auto" or a positive number')
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def expanded_dim(self) -> int:
        """E, the width of u and v."""
        return self.expansion * self.d_model

    @property
    def bias_extent(self) -> int:
        """The number of positions that the relative bias spans."""
        if self.architecture == "flash_quad":
            assert self.norm_length is not None
            return self.norm_length
        return self.chunk_size

    @property
    def bias_form(self) -> Literal["toeplitz", "rotary"]:
        """`position_bias` with "auto" decided."""
        if self.position_bias != "auto":
            return self.position_bias
        return "toeplitz" if self.bias_extent < TOEPLITZ_POSITIONS else "rotary"

    @property
    def logit_scale(self) -> float:
        """`head_scale` with "auto" decided."""
        return decided_head_scale(self.head_scale, self.d_model)

    @property
    def qk_heads(self) -> int:
        """How many queries and keys are made of the shared z: two for each of the quadratic and the linear part."""
        return 4 if self.architecture == "flash" else 2


def count_parameters(config: ModelConfig) -> int:
    """Return the number of learned parameters, by formula."""
    D, E, S = config.d_model, config.expanded_dim, config.qk_dim
    norm = 2 * D if config.norm == "layernorm" else 1
    bias = 2 * config.bias_extent - 1 if config.bias_form == "toeplitz" else 2 * S
    layer = norm + (D + 1) * (2 * E + S) + 2 * config.qk_heads * S + bias + (E + 1) * D
    return config.vocab_size * D + int(config.scaled_sin) + config.n_layers * layer + norm


@dataclass(frozen=True)
class ModelFlops:
    """Forward model FLOPs per token, by part, over all layers; a multiplication and an addition count two.

    Model FLOPs: the head counts, the embedding, norms and recomputation do not, causal blocks count half.
    """

    projections: float
    local: float
    linear: float
    head: float

    @property
    def forward(self) -> float:
        """The sum of the parts."""
        return self.projections + self.local + self.linear + self.head

    @property
    def training(self) -> float:
        """Forward and backward: three times forward."""
        return 3 * self.forward


def flops_per_token(config: ModelConfig, seq_len: int) -> ModelFlops:
    """Return the forward model FLOPs per token in sequences of seq_len. flash_quad's attention counts as local."""
    D, E, S = config.d_model, config.expanded_dim, config.qk_dim
    if config.architecture == "flash":
        linear = 4 * S * E
        local = mixed_chunk_flops(1, seq_len, S, E, config.chunk_size, config.causal) - linear
    else:
        linear = 0
        local = quadratic_flops(1, seq_len, S, E, config.causal)
    return ModelFlops(
        projections=config.n_layers * (2 * D * (2 * E + S) + 2 * E * D),
        local=config.n_layers * local,
        linear=config.n_layers * linear,
        head=2 * D * config.vocab_size,
    )
