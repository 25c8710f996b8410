"""FLASH as one writes it in plain torch, for the compiler: the peer that shows what kernels are worth.

The paper's appendix in matrix products, every one in the model's own dtype, differentiated by autograd. It has the
parameters of `FlashLM` and computes the same function of one document per sequence.

Shape letters: B batch, T time, G chunks, C chunk, S query/key, E values, H = 4 heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_model.config import ModelConfig
from flash_model.gau import GatedAttentionUnit
from flash_model.lm import FlashLM
from flash_model.norms import normalize
from flash_model.ops.heads import accumulation_dtype, toeplitz
from flash_model.positions import cos_sin, rotate_heads


class PlainGatedAttentionUnit(GatedAttentionUnit):
    """A causal FLASH layer without the op."""

    def forward(  # type: ignore[override]
        self, x: Tensor, doc_ids: Tensor | None = None, rotation: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Map x (B, T, d_model) to the same shape, with cosine and sine of the rotary angles, (T, S / 2) each.

        ValueError unless T is a multiple of the chunk.
        """
        config = self.config
        T, C, S, E = x.shape[1], config.chunk_size, config.qk_dim, config.expanded_dim
        assert doc_ids is None
        assert rotation is not None
        if T % C:
            raise ValueError(f"FLASH in plain torch reads whole chunks of {C} tokens, not {T} tokens")
        normed = normalize(x, *self.norm(), center=self.norm.center, eps=self.norm.eps)
        projected = F.linear(normed, self.expand.weight, self.expand.bias)
        u_BTE, v_BTE, z_BTS = F.silu(projected).split([E, E, S], -1)
        heads_BTHS = rotate_heads(z_BTS[:, :, None] * self.gamma + self.beta, *rotation)
        quad_q, quad_k, lin_q, lin_k = heads_BTHS.unflatten(1, (-1, C)).unbind(3)
        v_BGCE = v_BTE.unflatten(1, (-1, C))

        scores_BGCC = (quad_q @ quad_k.mT / C + toeplitz(self.position_bias(), 0, C, C)).relu().square().tril()
        states_BGSE = lin_k.mT @ v_BGCE
        tokens_before = C * torch.arange(T // C, device=x.device).clamp(min=1).to(accumulation_dtype(x))
        sums_BGSE = F.pad(states_BGSE.cumsum(1)[:, :-1], (0, 0, 0, 0, 1, 0))
        earlier_BGSE = (sums_BGSE / tokens_before[:, None, None]).to(x.dtype)
        attended_BGCE = scores_BGCC @ v_BGCE + lin_q @ earlier_BGSE
        return x + F.linear(u_BTE * attended_BGCE.flatten(1, 2), self.contract.weight, self.contract.bias)


class PlainFlashLM(FlashLM):
    """`FlashLM` of plain layers: the same parameters under the same names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.architecture == "flash"
        assert config.causal
        self.layers = nn.ModuleList(PlainGatedAttentionUnit(config) for _ in range(config.n_layers))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        loss_mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        """Return logits, or with targets the summed loss, as `FlashLM` does."""
        config, x = self.config, self.embedding(tokens)
        rotation = cos_sin(
            0,
            tokens.shape[1],
            config.qk_dim // 2,
            base=config.rope_base,
            block=config.chunk_size,
            dtype=accumulation_dtype(x),
            device=x.device,
        )
        if self.positions is not None:
            x = self.positions(x)
        for layer in self.layers:
            x = layer(x, doc_ids, rotation)
        return self.head(x, targets, loss_mask)
