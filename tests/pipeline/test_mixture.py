"""Mixtures: exact shares, every window once an epoch of its dataset, resumption, and what is refused."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batches import DataState, TrainingStream, Windows
from pipeline.errors import UserError
from pipeline.mixture import LARGEST_BLOCK, Component, Mixture, whole_quotas
from pipeline.shards import TokenDataset

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
FIRST_TOKENS = {"a": 10, "b": 30, "c": 50}
SIZES = {"a": 41, "b": 13, "c": 26}


@pytest.fixture
def datasets(make_dataset: Any) -> dict[str, TokenDataset]:
    """Three datasets whose tokens tell which one they are of."""
    opened = {}
    for name, first in FIRST_TOKENS.items():
        documents = [[first + n % 20] * (n % 5 + 1) for n in range(SIZES[name])]
        opened[name] = TokenDataset.open(make_dataset(documents, name=name), "train")
    return opened


@pytest.fixture
def mixture(datasets: dict[str, TokenDataset]) -> Mixture:
    return mixed(datasets, WEIGHTS)


def mixed(datasets: dict[str, TokenDataset], weights: dict[str, float]) -> Mixture:
    return Mixture([Component(name, datasets[name], weight) for name, weight in weights.items()])


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [
        ([1.0], [1]),
        ([7.5], [1]),
        ([1, 1, 1], [1, 1, 1]),
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([0.1 + 0.2, 0.7], [19661, 45875]),
        ([1e-5, 1], [1, LARGEST_BLOCK - 1]),
        ([1e-9, 1], [0, LARGEST_BLOCK]),
        ([123456789, 987654321, 5e8], [5022, 40175, 20339]),
    ],
)
def test_quotas_by_hand(weights: list[float], quotas: list[int]) -> None:
    assert whole_quotas(weights) == quotas


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_quotas_are_the_nearest_that_add_up(weights: list[float]) -> None:
    quotas = whole_quotas(weights)
    block = sum(quotas)
    assert block <= LARGEST_BLOCK
    for weight, quota in zip(weights, quotas, strict=True):
        assert abs(quota - block * weight / sum(weights)) < 1 + 1e-6


def test_every_block_has_its_exact_shares(mixture: Mixture) -> None:
    assert mixture.block == 10
    shares = {part.name: quota for part, quota in zip(mixture.components, mixture.quotas, strict=True)}
    assert shares == {"a": 5, "b": 3, "c": 2}
    orders = set()
    taken: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for block in range(50):
        positions = [mixture.position(sample, seed=3) for sample in range(block * 10, block * 10 + 10)]
        assert Counter(number for number, _ in positions) == dict(enumerate(mixture.quotas))
        orders.add(tuple(number for number, _ in positions))
        for number, index in positions:
            taken[number].append(index)
    assert len(orders) > 40, "blocks are not shuffled"
    # Each dataset's own samples are counted without a gap and without a repetition.
    for number, quota in enumerate(mixture.quotas):
        assert sorted(taken[number]) == list(range(50 * quota))
    assert [mixture.position(sample, seed=4) for sample in range(10)] != [
        mixture.position(sample, seed=3) for sample in range(10)
    ]


def test_each_dataset_counts_its_own_epochs(mixture: Mixture) -> None:
    """Every window exactly once in each epoch of its dataset; the 4th has another order than the 1st."""
    stream = TrainingStream(mixture, seq_len=4, seed=5)
    windows: dict[int, dict[int, int]] = {0: {}, 1: {}, 2: {}}
    for sample in stream.take(1200):
        number, index = mixture.position(sample, seed=5)
        windows[number][index] = stream.position(sample)[1]
    for number, part in enumerate(mixture.components):
        size = len(Windows(part.dataset, 4))
        epochs = [[windows[number][epoch * size + i] for i in range(size)] for epoch in range(4)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[3]


def test_in_the_end_every_window_comes_equally_often(datasets: dict[str, TokenDataset]) -> None:
    """Where epochs end with blocks: exactly."""
    sizes = {name: len(Windows(dataset, 4)) for name, dataset in datasets.items()}
    mixture = mixed(datasets, {name: float(size) for name, size in sizes.items()})
    stream = TrainingStream(mixture, seq_len=4, seed=5)
    for _ in range(3):
        batch = stream.load(stream.take(sum(sizes.values())))
        every = [token for dataset in datasets.values() for token in dataset.read(0, dataset.n_tokens).tolist()]
        assert sorted(batch.targets[batch.loss_mask].tolist()) == sorted(every)


def test_a_mixture_of_one_is_the_dataset(datasets: dict[str, TokenDataset]) -> None:
    alone = TrainingStream(datasets["a"], seq_len=4, seed=1)
    mixture = Mixture([Component("another name", datasets["a"], 0.3)])
    of_one = TrainingStream(mixture, seq_len=4, seed=1)
    assert mixture.digest == datasets["a"].digest
    assert [alone.position(sample) for sample in range(500)] == [of_one.position(sample) for sample in range(500)]


def test_names_and_order_of_the_list_change_nothing(datasets: dict[str, TokenDataset], mixture: Mixture) -> None:
    reordered = [Component(name.upper(), datasets[name], 10 * WEIGHTS[name]) for name in ("c", "a", "b")]
    other = TrainingStream(Mixture(reordered), seq_len=4, seed=5)
    stream = TrainingStream(mixture, seq_len=4, seed=5)
    assert other.load(range(40)).tokens.tolist() == stream.load(range(40)).tokens.tolist()
    TrainingStream(Mixture(reordered), seq_len=4, seed=5, state=stream.state)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resuming_a_mixture_at_any_world_size(mixture: Mixture, world_size: int) -> None:
    whole = TrainingStream(mixture, seq_len=4, seed=1)
    expected = whole.load(whole.take(48)).targets.tolist()[24:]
    first = TrainingStream(mixture, seq_len=4, seed=1)
    first.take(24)
    state = DataState.from_dict(first.state.to_dict())
    assert state == first.state
    found = []
    streams = [TrainingStream(mixture, seq_len=4, seed=1, state=state) for _ in range(world_size)]
    for _ in range(3):
        for rank, stream in enumerate(streams):
            share = 8 // world_size
            found += stream.load(stream.take(8)[rank * share : rank * share + share]).targets.tolist()
    assert found == expected


def test_a_changed_mixture_is_refused_with_what_changed(datasets: dict[str, TokenDataset], mixture: Mixture) -> None:
    state = TrainingStream(mixture, seq_len=4, seed=1).state
    b = datasets["b"].digest[:16]
    with pytest.raises(UserError) as caught:
        TrainingStream(mixed(datasets, {"a": 0.5, "b": 0.4, "c": 0.1}), seq_len=4, seed=1, state=state)
    assert f"gone: b: train of {b}, 3/10 of the samples" in str(caught.value)
    assert f"new: b: train of {b}, 4/10 of the samples" in str(caught.value)
    assert "a: train" not in str(caught.value), "what is unchanged is not listed"
    with pytest.raises(UserError, match=f"gone: b: train of {b}"):
        TrainingStream(mixed(datasets, {"a": 0.5, "c": 0.5}), seq_len=4, seed=1, state=state)


def test_what_cannot_be_mixed(datasets: dict[str, TokenDataset], make_dataset: Any) -> None:
    a = datasets["a"]
    with pytest.raises(UserError, match="x and y are the same data"):
        Mixture([Component("x", a), Component("y", a)])
    with pytest.raises(UserError, match=r"b: weight 1e-09 is less than one of 65,536 samples"):
        Mixture([Component("a", a), Component("b", datasets["b"], 1e-9)])
    other = TokenDataset.open(make_dataset([[5]], vocab_size=101, name="other"), "train")
    with pytest.raises(UserError, match=r"have different tokenizers \((101 and 100|100 and 101) pieces"):
        Mixture([Component("a", a), Component("other", other)])
    other.vocab_size, other.tokenizer_sha256 = 100, "f" * 64
    with pytest.raises(UserError, match="have different tokenizers"):
        Mixture([Component("a", a), Component("other", other)])


def test_the_order_of_a_mixture_is_what_it_was(datasets: dict[str, TokenDataset]) -> None:
    """Runs resume under a newer release: these values must never change."""
    for name, dataset in datasets.items():
        dataset.digest = name * 64
    mixture = mixed(datasets, WEIGHTS)
    assert mixture.digest == "370fabb7c6846d1370649cb54e2155abca9bace6f127f210792d610cd8adde45"
    positions = [mixture.position(sample, seed=3) for sample in (0, 1, 9, 10, 123_456_789)]
    assert positions == [(0, 1), (1, 2), (2, 1), (1, 5), (1, 37037036)]
