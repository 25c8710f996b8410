"""Windows, separators and document ids; the training stream and the evaluation pass."""

from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.batches import Batch, DataState, TrainingStream, Windows, evaluation_batches
from pipeline.errors import UserError
from pipeline.shards import TokenDataset

DOCUMENTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34, 35], [40, 41], [50, 51, 52, 53]]
STREAM = [10, 11, 12, 1, 20, 1, 30, 31, 32, 33, 34, 35, 1, 40, 41, 1, 50, 51, 52, 53, 1]


@pytest.fixture
def dataset(make_dataset: Any) -> TokenDataset:
    return TokenDataset.open(make_dataset(DOCUMENTS, per_shard=2), "train")


def test_windows_by_hand(dataset: TokenDataset) -> None:
    batch = Windows(dataset, 8).load([0, 2, 1])
    assert batch.tokens.tolist() == [
        [1, 10, 11, 12, 1, 20, 1, 30],
        [1, 50, 51, 52, 53, 2, 2, 2],
        [31, 32, 33, 34, 35, 1, 40, 41],
    ]
    assert batch.targets.tolist() == [
        [10, 11, 12, 1, 20, 1, 30, 31],
        [50, 51, 52, 53, 1, 2, 2, 2],
        [32, 33, 34, 35, 1, 40, 41, 1],
    ]
    assert batch.doc_ids.tolist() == [
        [0, 0, 0, 0, 1, 1, 2, 2],
        [0, 0, 0, 0, 0, 1, 1, 1],
        [0, 0, 0, 0, 0, 1, 1, 1],
    ]
    assert batch.loss_mask.tolist() == [[True] * 8, [True] * 5 + [False] * 3, [True] * 8]
    assert {batch.tokens.dtype, batch.targets.dtype, batch.doc_ids.dtype} == {torch.int64}
    assert batch.loss_mask.dtype == torch.bool


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12), per_shard=st.integers(1, 5), L=st.integers(1, 30))
def test_windows_of_any_data(
    make_dataset: Any, tmp_path_factory: Any, lengths: list[int], per_shard: int, L: int
) -> None:
    documents = [[4 + number] * length for number, length in enumerate(lengths)]
    name = str(tmp_path_factory.mktemp("windows") / "data")
    dataset = TokenDataset.open(make_dataset(documents, per_shard, name=name), "train")
    windows = Windows(dataset, L)
    batch = windows.load(range(len(windows)))
    stream = list(chain.from_iterable([*document, 1] for document in documents))
    # Every token is a target exactly once, in order, after its predecessor in the stream.
    assert batch.targets[batch.loss_mask].tolist() == stream
    assert batch.tokens[batch.loss_mask].tolist() == [1, *stream][:-1]
    assert set(batch.targets[~batch.loss_mask].tolist()) <= {dataset.pad_id}
    assert batch.doc_ids[:, 0].tolist() == [0] * len(windows)
    for row in range(len(windows)):
        steps = batch.doc_ids[row].diff()
        assert set(steps.tolist()) <= {0, 1}
        # Inside a document's part its targets are its own tokens; a document opens on the separator.
        for position in range(1, L):
            if batch.loss_mask[row, position]:
                assert bool(steps[position - 1]) == (batch.tokens[row, position].item() == 1)
            elif batch.loss_mask[row, position - 1]:
                assert steps[position - 1] == 1


def test_windows_outside_are_refused(dataset: TokenDataset) -> None:
    with pytest.raises(IndexError):
        Windows(dataset, 8).load([3])
    with pytest.raises(UserError, match="seq_len"):
        Windows(dataset, 0)


def targets(batch: Batch) -> list[int]:
    return batch.targets[batch.loss_mask].tolist()


def test_an_epoch_of_training_predicts_every_token_once(dataset: TokenDataset) -> None:
    stream = TrainingStream(dataset, seq_len=4, seed=1)
    assert len(Windows(dataset, 4)) == 6
    orders = []
    for _ in range(3):
        batch = stream.load(stream.take(6))
        assert sorted(targets(batch)) == sorted(STREAM)
        orders.append(batch.targets.tolist())
    assert orders[0] != orders[1]
    # However the samples are cut into steps and ranks, each is the same window.
    again = TrainingStream(dataset, seq_len=4, seed=1)
    rows = [again.load([sample]).targets[0].tolist() for sample in again.take(18)]
    assert rows == list(chain.from_iterable(orders))


def test_resuming_takes_what_would_have_come(dataset: TokenDataset) -> None:
    whole = TrainingStream(dataset, seq_len=4, seed=1)
    samples = whole.take(5) + whole.take(9)
    first = TrainingStream(dataset, seq_len=4, seed=1)
    assert first.take(5) == samples[:5]
    state = DataState.from_dict(first.state.to_dict())
    assert state == first.state
    second = TrainingStream(dataset, seq_len=4, seed=1, state=state)
    assert second.take(9) == samples[5:]
    assert second.state == whole.state


def test_skipped_samples_are_never_taken(dataset: TokenDataset) -> None:
    skipped = ((8, 9), (3, 6), (5, 7))
    state = DataState(next_sample=2, skipped=skipped, seed=1, digest=dataset.digest, seq_len=4)
    stream = TrainingStream(dataset, seq_len=4, seed=1, state=state)
    assert stream.take(2) == [2, 7]
    assert stream.take(3) == [9, 10, 11]
    assert stream.state.skipped == skipped
    assert stream.state.next_sample == 12


def test_a_state_of_something_else_is_refused(dataset: TokenDataset) -> None:
    state = DataState(next_sample=2, skipped=(), seed=1, digest="f" * 64, seq_len=8)
    with pytest.raises(UserError) as caught:
        TrainingStream(dataset, seq_len=4, seed=2, state=state)
    for part in (f"digest was {'f' * 64}, now {dataset.digest}", "seq_len was 8, now 4", "seed was 1, now 2"):
        assert part in str(caught.value)


@pytest.mark.parametrize("seq_len", [1, 4, 8, 100])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 1), (2, 2), (3, 1), (4, 2)])
def test_evaluation_scores_every_token_once(
    dataset: TokenDataset, seq_len: int, world_size: int, batch_size: int
) -> None:
    by_rank = [
        list(evaluation_batches(dataset, seq_len=seq_len, batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(items) for items in by_rank}) == 1
    batches = [batch for items in by_rank for batch in items if batch is not None]
    assert sorted(chain.from_iterable(map(targets, batches))) == sorted(STREAM)
    assert all(1 <= len(batch.tokens) <= batch_size for batch in batches)
    if world_size == 1:
        assert list(chain.from_iterable(map(targets, batches))) == STREAM
