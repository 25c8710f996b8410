"""Which sample is where: pure functions of a key and an index, in O(1) memory."""

import hashlib
import json
from functools import lru_cache

_ROUNDS = 8
_MASK64 = (1 << 64) - 1


def derive_key(*parts: str | int) -> bytes:
    """A 32-byte key from a purpose and whatever else it depends on; different parts, different key."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=32).digest()


def keyed_hash(key: bytes, name: str) -> int:
    """A 64-bit keyed hash of a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), key=key, digest_size=8).digest(), "big")


@lru_cache(maxsize=256)
def _round_keys(key: bytes) -> tuple[int, ...]:
    material = hashlib.blake2b(key, digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(material[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def permute(index: int, size: int, key: bytes) -> int:
    """Where `index` goes under a keyed permutation of `range(size)`.

    A Feistel network on the smallest power of two that holds `size` (its two halves differ by one bit when the number
    of bits is odd), walked until it lands inside: fewer than two walks on average.

    Raises:
        IndexError: `index` is not in `range(size)`.
    """
    if not 0 <= index < size:
        raise IndexError(f"index {index} is not in range({size})")
    bits = (size - 1).bit_length()
    low_bits = bits - bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << bits // 2) - 1
    keys = _round_keys(key)
    while True:
        high, low = index >> low_bits, index & low_mask
        for number, round_key in enumerate(keys):
            mixed = ((high if number & 1 else low) + round_key) * 0x9E3779B97F4A7C15 & _MASK64
            mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & _MASK64
            if number & 1:
                low ^= mixed >> 31 & low_mask
            else:
                high ^= mixed >> 31 & high_mask
        index = high << low_bits | low
        if index < size:
            return index


@lru_cache(maxsize=256)
def _epoch_key(seed: int, epoch: int, digest: str) -> bytes:
    return derive_key("epoch order", seed, epoch, digest)


def sample_position(sample: int, windows: int, *, seed: int, digest: str) -> tuple[int, int]:
    """(epoch, window) of sample `sample` of a run over a dataset of `windows` windows.

    Every window comes exactly once in each epoch; each epoch has its own order, keyed by (seed, epoch, digest).
    """
    epoch, index = divmod(sample, windows)
    return epoch, permute(index, windows, _epoch_key(seed, epoch, digest))
