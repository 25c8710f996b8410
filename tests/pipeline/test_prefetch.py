"""Steps prepared ahead: the same steps, errors where they are waited for, and no thread left."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.batches import Batch, TrainingStream
from pipeline.errors import UserError
from pipeline.masking import MaskedLM
from pipeline.prefetch import Step, StepLoader
from pipeline.shards import TokenDataset


@pytest.fixture
def dataset(make_dataset: Any) -> TokenDataset:
    return TokenDataset.open(make_dataset([[4 + n % 90] * (n % 7 + 1) for n in range(80)], per_shard=9), "train")


def taken_in_the_end(stream: TrainingStream, expected: int) -> int:
    """How many samples have been taken once there are as many as expected, and time for more has passed."""
    deadline = time.monotonic() + 10
    while stream.state.next_sample < expected and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    return stream.state.next_sample


def contents(step: Step) -> Any:
    return [[tensor.tolist() for tensor in vars(batch).values()] for batch in step.batches]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("masked_lm", [None, MaskedLM()], ids=["next token", "masked"])
@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_steps_do_not_depend_on_how_far_ahead_they_are_prepared(
    dataset: TokenDataset, ahead: int, masked_lm: MaskedLM | None
) -> None:
    plain = TrainingStream(dataset, seq_len=8, seed=1, masked_lm=masked_lm)
    stream = TrainingStream(dataset, seq_len=8, seed=1, masked_lm=masked_lm)
    loader = StepLoader(stream, samples_per_step=6, micro_batch=2, ahead=ahead)
    try:
        for number in range(30):
            step = loader.next()
            samples = plain.take(6)
            assert step.samples == samples == list(range(6 * number, 6 * number + 6))
            expected = [plain.load(samples[start : start + 2]) for start in (0, 2, 4)]
            assert contents(step) == [[tensor.tolist() for tensor in vars(batch).values()] for batch in expected]
            assert step.targets == sum(int(batch.loss_mask.sum()) for batch in expected)
            # What was prepared further ahead is not in it.
            assert step.state == plain.state
            assert len(threads()) == (ahead > 0)
    finally:
        loader.close()
    assert threads() == []


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (1, 8), (2, 2), (4, 2)])
def test_a_step_is_the_same_however_it_is_cut(dataset: TokenDataset, world_size: int, micro_batch: int) -> None:
    whole = TrainingStream(dataset, seq_len=8, seed=1)
    sizes: dict[str, Any] = {"samples_per_step": 8, "micro_batch": micro_batch, "world_size": world_size, "ahead": 2}
    streams = [TrainingStream(dataset, seq_len=8, seed=1) for _ in range(world_size)]
    loaders = [StepLoader(stream, rank=rank, **sizes) for rank, stream in enumerate(streams)]
    for _ in range(4):
        steps = [loader.next() for loader in loaders]
        positions = range(8 // (micro_batch * world_size))
        rows = [row for i in positions for step in steps for row in step.batches[i].targets.tolist()]
        assert rows == whole.load(whole.take(8)).targets.tolist()
    for loader in loaders:
        loader.close()


def test_memory_in_use_is_not_written_to(dataset: TokenDataset) -> None:
    loader = StepLoader(TrainingStream(dataset, seq_len=8, seed=1), samples_per_step=4, micro_batch=4, ahead=3)
    for _ in range(20):
        step = loader.next()
        loader.refill()
        before = contents(step)
        time.sleep(0.005)  # the thread fills what it has
        assert contents(step) == before
    loader.close()


def test_the_thread_sleeps_while_a_step_is_ready_until_it_may_go_on(dataset: TokenDataset) -> None:
    stream = TrainingStream(dataset, seq_len=8, seed=1)
    loader = StepLoader(stream, samples_per_step=4, micro_batch=4, ahead=2)
    assert taken_in_the_end(stream, 8) == 8
    loader.next()
    assert taken_in_the_end(stream, 8) == 8
    loader.refill()
    assert taken_in_the_end(stream, 12) == 12
    loader.refill()
    assert taken_in_the_end(stream, 12) == 12
    for number in range(2, 5):  # nobody lets it: it goes on nonetheless
        assert loader.next().samples == list(range(4 * number - 4, 4 * number))
    loader.close()


class Failing(TrainingStream):
    """Fails at the third step."""

    def load(self, samples: Sequence[int], out: Batch | None = None) -> Batch:
        if samples[0] >= 8:
            raise UserError("shard-00001.bin: gone")
        return super().load(samples, out)


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_an_error_surfaces_in_its_step_with_its_message(dataset: TokenDataset, ahead: int) -> None:
    loader = StepLoader(Failing(dataset, seq_len=8, seed=1), samples_per_step=4, micro_batch=4, ahead=ahead)
    assert [loader.next().samples[0] for _ in range(2)] == [0, 4]
    for _ in range(2):  # asked again it does not hang
        with pytest.raises(UserError, match=r"^shard-00001\.bin: gone$"):
            loader.next()
    loader.close()
    assert threads() == []


def test_at_most_so_many_steps_are_prepared(dataset: TokenDataset) -> None:
    stream = TrainingStream(dataset, seq_len=8, seed=1)
    loader = StepLoader(stream, samples_per_step=4, micro_batch=4, ahead=2)
    try:
        for number in range(5):
            loader.next()
            loader.refill()
            expected = 4 * (number + 3)
            assert taken_in_the_end(stream, expected) == expected, "one in use, two ahead"
    finally:
        loader.close()
