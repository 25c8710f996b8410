"""Language models: embedding, stack of layers, final norm, head tied to the embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_model.config import ModelConfig
from flash_model.embedding import embed
from flash_model.gau import GatedAttentionUnit
from flash_model.init import build_initialized
from flash_model.loss import linear_cross_entropy
from flash_model.norms import Norm, normalize
from flash_model.positions import sinusoids


class TiedEmbedding(nn.Module):
    """One (V, d_model) matrix that embeds tokens and projects to logits.

    The head goes through this module's forward as well: ZeRO-3 gathers a parameter only where its own module runs.
    """

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(
        self, x: Tensor, *, project: bool = False, targets: Tensor | None = None, loss_mask: Tensor | None = None
    ) -> Tensor:
        """Embed tokens x (…); with `project` map hidden x (…, d_model) to logits, with `targets` too to summed nats."""
        if not project:
            return embed(x, self.weight)
        if targets is None:
            return F.linear(x, self.weight)
        return linear_cross_entropy(x, self.weight, targets, loss_mask)


class ScaledSin(nn.Module):
    """Sinusoids of the positions 0 … T − 1 times one learned scalar (paper, section 3)."""

    def __init__(self, base: float) -> None:
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.empty(1))  # DeepSpeed cannot broadcast a 0-dimensional parameter

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Add to x (B, T, d_model) the scaled sinusoids of positions start …"""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        table = sinusoids(start, x.shape[1], x.shape[2], base=self.base, dtype=dtype, device=x.device)
        return x + (table * self.scale).to(x.dtype)


def check_tokens(tokens: Tensor) -> None:
    """Raise ValueError unless tokens are (B, T), and there are some."""
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens must have shape (B, T) with at least one token: they have {tuple(tokens.shape)}")


class FlashLM(nn.Module):
    """FLASH or FLASH-Quad as a language model, causal or masked. `config` holds what it is.

    `recomputed`: numbers of the layers that keep nothing but their input for backward, which runs them again.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TiedEmbedding(config.vocab_size, config.d_model)
        self.positions = ScaledSin(config.rope_base) if config.scaled_sin else None
        self.layers = nn.ModuleList(GatedAttentionUnit(config) for _ in range(config.n_layers))
        self.norm = Norm(config.norm, config.d_model, config.norm_eps)
        self.recomputed: frozenset[int] = frozenset()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        loss_mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        """Return logits, or with targets the summed loss.

        Args:
            tokens: (B, T) integers below vocab_size. Positions count from 0 at the start of the window.
            targets: (B, T) integers: what each position is to predict.
            loss_mask: (B, T), zero or False where a target does not count (and may be any number). None: all count.
            doc_ids: (B, T) integers that do not decrease along T: nothing is read across documents. None: one document.

        Returns:
            Without targets logits (B, T, V) in the parameters' dtype; with targets the sum of nats over those that
            count, a float32 scalar (float64 for a float64 model); its logits exist for a part of the tokens at a time.

        Raises:
            ValueError: an argument's shape or dtype does not fit, or there are more tokens than flash_quad can read.
        """
        check_tokens(tokens)
        x = self.embedding(tokens)
        if self.positions is not None:
            x = self.positions(x)
        update: tuple[Tensor, ...] = ()
        for number, layer in enumerate(self.layers):
            if number in self.recomputed:
                # Added up first there is one tensor to keep instead of two: the plain layer's bits, where its kernel
                # rounds once. Nothing is random.
                x = x + sum(update[1:], update[0]) if update else x
                x, *update = checkpoint(layer, x, doc_ids, use_reentrant=False, preserve_rng_state=False)
            else:
                x, *update = layer(x, doc_ids, *update)
        return self.head(sum(update, x), targets, loss_mask)

    def head(self, x: Tensor, targets: Tensor | None = None, loss_mask: Tensor | None = None) -> Tensor:
        """Norm, scale and project what leaves the last layer, (B, T, d_model): logits, with targets summed nats."""
        hidden = normalize(x, *self.norm(), center=self.norm.center, eps=self.norm.eps) * self.config.logit_scale
        return self.embedding(hidden, project=True, targets=targets, loss_mask=loss_mask)


def build_model(
    config: ModelConfig,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> FlashLM:
    """Build and initialise the model of `config`.

    Every initial value is a function of (seed, the parameter's name) alone, drawn on the CPU in float32: of no global
    random state, device or order. On the device "meta" nothing is allocated nor drawn.
    """
    return build_initialized(FlashLM, config, seed=seed, device=device, dtype=dtype)


def decayed_parameters(model: nn.Module) -> set[str]:
    """Return the names of the true matrices, dense kernels and the embedding: those that weight decay applies to.

    Norms, biases, gamma, beta, position biases and scalars are not among them, whatever their shape.
    """
    matrices = (nn.Linear, TiedEmbedding)
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, matrices)}
