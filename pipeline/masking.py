"""Masked-LM corruption (BERT: Devlin et al. 2019, section 3.1), as a pure function of a key and a number."""

import numpy as np
from pydantic import Field, model_validator

from pipeline.errors import UserError
from pipeline.order import derive_key
from pipeline.shards import TokenDataset
from pipeline.strict_yaml import StrictModel

_SCALE = 1 << 32


class MaskedLM(StrictModel):
    """What becomes of the tokens that a masked language model has to restore."""

    fraction: float = Field(default=0.15, gt=0, le=1, description="Chance of a token to be chosen: to be predicted.")
    mask: float = Field(default=0.8, ge=0, le=1, description="Of the chosen tokens, how many become the mask piece.")
    random: float = Field(
        default=0.1, ge=0, le=1, description="Of the chosen tokens, how many become a random piece; the rest is kept."
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> "MaskedLM":
        if self.mask + self.random > 1 + 1e-9:
            raise ValueError(f"mask {self.mask} and random {self.random} add up to more than 1")
        return self


class Corruption:
    """Chooses tokens of windows and hides them. What happens to a window depends on (purpose, its number) alone.

    Each token is chosen by itself, `</s>` and padding never; random pieces are drawn evenly from all but the special
    ones.

    Raises:
        UserError: the dataset's tokenizer has no mask piece.
    """

    def __init__(self, settings: MaskedLM, dataset: TokenDataset, *purpose: str | int) -> None:
        if dataset.mask_id < 0:
            raise UserError(
                f"data.masked_lm: {dataset.tokenizer_path} has no <mask> piece; train a tokenizer with pipeline.prepare"
            )
        self._settings, self._purpose = settings, purpose
        self._eos_id, self._mask_id = dataset.eos_id, dataset.mask_id
        special = [dataset.unk_id, dataset.eos_id, dataset.pad_id, dataset.mask_id]
        self._pieces = np.setdiff1d(np.arange(dataset.vocab_size), special)

    def apply(self, number: int, tokens: np.ndarray, targets: np.ndarray, loss_mask: np.ndarray) -> None:
        """Corrupt window `number` in place, given `targets`, its own tokens, and `loss_mask`, False on padding.

        tokens (T,) int64 become the targets (T,) int64 with what is hidden; loss_mask (T,) bool is left True on the
        chosen ones alone.
        """
        key = derive_key("masked language model", *self._purpose, number)
        # Raw words: numpy keeps those the same in every version, its distributions not.
        random = np.random.Philox(key=int.from_bytes(key[:16], "little"))
        tokens[:] = targets
        chances = random.random_raw(-(-len(targets) // 2)).view("<u4")[: len(targets)]
        loss_mask &= chances < self._settings.fraction * _SCALE
        loss_mask &= targets != self._eos_id
        chosen = np.flatnonzero(loss_mask)
        words = random.random_raw(len(chosen))
        action = words & np.uint64(_SCALE - 1)
        masked = action < self._settings.mask * _SCALE
        replaced = ~masked & (action < (self._settings.mask + self._settings.random) * _SCALE)
        draws = (words[replaced] >> np.uint64(32)) * np.uint64(len(self._pieces)) >> np.uint64(32)
        tokens[chosen[masked]] = self._mask_id
        tokens[chosen[replaced]] = self._pieces[draws]
