"""The gated attention unit, FLASH's and FLASH-Quad's only layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_model.add_norm_linear import add_norm_linear
from flash_model.config import ModelConfig
from flash_model.norms import Norm
from flash_model.ops import mixed_chunk_attention, quadratic_attention
from flash_model.positions import rotary_bias


class Expansion(nn.Linear):
    """The dense layer before an op, with the norm in front of it.

    `op_differentiates_bias`: the op has the bias' gradient without another pass.
    """

    def __init__(self, in_features: int, out_features: int, *, op_differentiates_bias: bool) -> None:
        super().__init__(in_features, out_features)
        self.op_differentiates_bias = op_differentiates_bias

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        update: Tensor | None,
        update_bias: Tensor | None,
        gain: Tensor,
        shift: Tensor,
        *,
        eps: float,
        center: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return x + update + update_bias, its norm's projection, and the bias where the op is to differentiate it.

        Then no gradient of the bias goes this way. It is a copy: under ZeRO-3 the parameter itself is there only as
        long as this module runs.
        """
        apart = self.op_differentiates_bias
        bias = self.bias.detach() if apart else self.bias
        total, projected = add_norm_linear(
            x, update, update_bias, gain, shift, self.weight, bias, eps=eps, center=center
        )
        return total, projected, self.bias.clone() if apart else None


class Contraction(nn.Linear):
    """The dense layer behind an op, without its bias: who adds the update to x adds that too, in the same pass."""

    def forward(self, attended: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the product and, as a copy (see `Expansion`), the bias that is still to be added to it."""
        return F.linear(attended, self.weight), self.bias.clone()


class GatedAttentionUnit(nn.Module):
    """contract(SiLU(u) ⊙ attention(v, z)), to be added to x, with u, v, z = expand(norm(x)) (paper, sections 1 and 2).

    Units hand on their input and what is to be added to it, a product and its bias: the next one adds and normalises in
    one pass. A unit owns
    the op's parameters, because the module that calls an op must: ZeRO-3 gathers parameters module by module.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, E, S = config.d_model, config.expanded_dim, config.qk_dim
        self.norm = Norm(config.norm, D, config.norm_eps)
        self.expand = Expansion(D, 2 * E + S, op_differentiates_bias=config.architecture == "flash")
        self.gamma = nn.Parameter(torch.empty(config.qk_heads, S))
        self.beta = nn.Parameter(torch.empty(config.qk_heads, S))
        if config.bias_form == "toeplitz":
            self.bias_weight = nn.Parameter(torch.empty(2 * config.bias_extent - 1))
        else:
            self.bias_query = nn.Parameter(torch.empty(S))
            self.bias_key = nn.Parameter(torch.empty(S))
        self.contract = Contraction(E, D)

    def position_bias(self) -> Tensor:
        """Return the relative bias (2·extent − 1,): element j − i + extent − 1 is that of query i on key j."""
        if self.config.bias_form == "toeplitz":
            return self.bias_weight
        return rotary_bias(self.bias_query, self.bias_key, self.config.bias_extent, base=self.config.rope_base)

    def project(
        self, x: Tensor, update: Tensor | None = None, update_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return x + update + update_bias, its uvz (B, T, 2E + S), and uvz's bias where the op differentiates that."""
        projected: tuple[Tensor, Tensor, Tensor | None] = self.expand(
            x, update, update_bias, *self.norm(), eps=self.norm.eps, center=self.norm.center
        )
        return projected

    def forward(
        self,
        x: Tensor,
        doc_ids: Tensor | None = None,
        update: Tensor | None = None,
        update_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return x + update + update_bias, this unit's own update of it, both (B, T, d_model), and that one's bias.

        doc_ids (B, T), not decreasing: nothing is read across documents. None: there is nothing to add.
        """
        config = self.config
        x, uvz, projection_bias = self.project(x, update, update_bias)
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
        return x, *self.contract(attended)
