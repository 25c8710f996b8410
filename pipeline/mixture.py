"""Mixtures: which of several datasets a sample comes from, in exact shares and by arithmetic."""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, combinations

from pipeline.errors import UserError
from pipeline.order import derive_key, permute
from pipeline.shards import TokenDataset

LARGEST_BLOCK = 1 << 16
"""Shares are exact where a block of this many samples can hold them; else they are rounded to it."""


@dataclass(frozen=True)
class Component:
    """A dataset of a mixture; `weight` is its share of the samples, relative to the other weights."""

    name: str
    dataset: TokenDataset
    weight: float = 1.0


class Mixture:
    """Datasets read side by side: of the samples of each block, in an order of its own, each gives its quota.

    What it is depends neither on the names of the components nor on the order in which they are given.

    Attributes:
        components: ordered by (digest, split).
        quotas: samples of a block from each component; they add up to `block`.
        digest: 64 hex digits over the datasets and their shares; of a single dataset, its own.

    Raises:
        UserError: tokenizers differ, a dataset comes twice, or a weight is too small for one sample of a block.
    """

    def __init__(self, components: Sequence[Component]) -> None:
        self.components = tuple(sorted(components, key=lambda item: (item.dataset.digest, item.dataset.split)))
        for one, other in combinations(self.components, 2):
            _check_pair(one, other)
        self.quotas = whole_quotas([item.weight for item in self.components])
        self.block = sum(self.quotas)
        for item, quota in zip(self.components, self.quotas, strict=True):
            if not quota:
                raise UserError(
                    f"data.mixture: {item.name}: weight {item.weight:g} is less than one of {self.block:,} samples; "
                    "raise it, or leave the dataset out"
                )
        self._ends = list(accumulate(self.quotas))
        if len(self.components) == 1:
            self.digest = self.components[0].dataset.digest
        else:
            parts = [
                (item.dataset.digest, item.dataset.split, quota)
                for item, quota in zip(self.components, self.quotas, strict=True)
            ]
            self.digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def position(self, sample: int, *, seed: int) -> tuple[int, int]:
        """(component, index): which sample of that component's own order sample `sample` of the run is."""
        if len(self.quotas) == 1:
            return 0, sample
        block, index = divmod(sample, self.block)
        place = permute(index, self.block, _block_key(seed, block, self.digest))
        number = bisect_right(self._ends, place)
        return number, block * self.quotas[number] + place - self._ends[number] + self.quotas[number]

    def describe(self) -> tuple[str, ...]:
        """A line for each component: name, split, start of the digest and share of the samples."""
        return tuple(
            f"{item.name}: {item.dataset.split} of {item.dataset.digest[:16]}, {quota}/{self.block} of the samples"
            for item, quota in zip(self.components, self.quotas, strict=True)
        )


def whole_quotas(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of the weights, read as the decimals they print as; as small as can be.

    Where exact ones would add up to more than LARGEST_BLOCK, they add up to it, rounded by largest remainders.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    block = min(math.lcm(*(share.denominator for share in shares)), LARGEST_BLOCK)
    quotas = [math.floor(share * block) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: quotas[i] - shares[i] * block)
    for i in by_remainder[: block - sum(quotas)]:
        quotas[i] += 1
    return quotas


def _check_pair(one: Component, other: Component) -> None:
    a, b = one.dataset, other.dataset
    if (a.digest, a.split) == (b.digest, b.split):
        raise UserError(
            f"data.mixture: {one.name} and {other.name} are the same data ({a.path}, {a.split}): give it once, with "
            "the sum of the weights"
        )
    if (a.tokenizer_sha256, a.vocab_size, a.eos_id) != (b.tokenizer_sha256, b.vocab_size, b.eos_id):
        raise UserError(
            f"data.mixture: {a.path} and {b.path} have different tokenizers ({a.vocab_size:,} and {b.vocab_size:,} "
            f"pieces, SHA-256 {a.tokenizer_sha256[:16]}… and {b.tokenizer_sha256[:16]}…): prepare one of them again "
            "with content.tokenizer.path set to the tokenizer.model of the other"
        )


@lru_cache(maxsize=256)
def _block_key(seed: int, block: int, digest: str) -> bytes:
    return derive_key("mixture block", seed, block, digest)
