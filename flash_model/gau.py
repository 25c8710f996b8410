"""The gated attention unit, FLASH's and FLASH-Quad's only layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_model.config import ModelConfig
from flash_model.norms import build_norm
from flash_model.ops import mixed_chunk_attention, quadratic_attention
from flash_model.positions import rotary_bias


class Expansion(nn.Linear):
    """The dense layer before an op. `op_differentiates_bias`: the op has the bias' gradient without another pass."""

    def __init__(self, in_features: int, out_features: int, *, op_differentiates_bias: bool) -> None:
        super().__init__(in_features, out_features)
        self.op_differentiates_bias = op_differentiates_bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Return x Wᵀ + bias and, where the op is to differentiate it, the bias: then no gradient of it goes this way.

        It is a copy: under ZeRO-3 the parameter itself is there only as long as this module runs.
        """
        if not self.op_differentiates_bias:
            return super().forward(x), None
        return F.linear(x, self.weight, self.bias.detach()), self.bias.clone()


class GatedAttentionUnit(nn.Module):
    """x + contract(SiLU(u) ⊙ attention(v, z)) with u, v, z = expand(norm(x)) (paper, sections 1 and 2).

    It owns the op's parameters, because the module that calls an op must: ZeRO-3 gathers parameters module by module.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, E, S = config.d_model, config.expanded_dim, config.qk_dim
        self.norm = build_norm(config.norm, D, config.norm_eps)
        self.expand = Expansion(D, 2 * E + S, op_differentiates_bias=config.architecture == "flash")
        self.gamma = nn.Parameter(torch.empty(config.qk_heads, S))
        self.beta = nn.Parameter(torch.empty(config.qk_heads, S))
        if config.bias_form == "toeplitz":
            self.bias_weight = nn.Parameter(torch.empty(2 * config.bias_extent - 1))
        else:
            self.bias_query = nn.Parameter(torch.empty(S))
            self.bias_key = nn.Parameter(torch.empty(S))
        self.contract = nn.Linear(E, D)

    def position_bias(self) -> Tensor:
        """Return the relative bias (2·extent − 1,): element j − i + extent − 1 is that of query i on key j."""
        if self.config.bias_form == "toeplitz":
            return self.bias_weight
        return rotary_bias(self.bias_query, self.bias_key, self.config.bias_extent, base=self.config.rope_base)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return uvz (B, T, 2E + S) of x (B, T, d_model), and its bias where the op is to differentiate that."""
        projected: tuple[Tensor, Tensor | None] = self.expand(self.norm(x))
        return projected

    def forward(self, x: Tensor, doc_ids: Tensor | None = None) -> Tensor:
        """Map x (B, T, d_model) to the same shape. doc_ids (B, T), not decreasing: nothing is read across documents."""
        config = self.config
        uvz, projection_bias = self.project(x)
        bias = self.position_bias()
        if config.architecture == "flash":
            attended = mixed_chunk_attention(
                uvz,
                self.gamma,
                self.beta,
                bias,
                chunk_size=config.chunk_size,
                causal=config.causal,
                doc_ids=doc_ids,
                projection_bias=projection_bias,
                rope_base=config.rope_base,
            )
        else:
            assert config.norm_length is not None
            attended = quadratic_attention(
                uvz,
                self.gamma,
                self.beta,
                bias,
                norm_length=config.norm_length,
                causal=config.causal,
                doc_ids=doc_ids,
                rope_base=config.rope_base,
            )
        return x + self.contract(attended)
