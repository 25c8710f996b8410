"""The steps of a run, one process's share of them, prepared in the background while the last one is trained on."""

import queue
import threading
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.batches import Batch, DataState, TrainingStream


@dataclass(frozen=True)
class Step:
    """What a process needs for one step.

    Attributes:
        samples: the step's sample numbers, over all processes.
        batches: this process's micro batches. Their memory is used again once the next step is asked for.
        targets: how many targets of `batches` count.
        state: what a checkpoint has to keep once the step is done.
    """

    samples: list[int]
    batches: list[Batch]
    targets: int
    state: DataState


class StepLoader:
    """Cuts each step's samples over processes and micro batches, and loads this process's share.

    A thread keeps up to `ahead` steps ready (0: no thread; each is loaded when it is asked for). Nothing but time
    depends on `ahead`: `Step.state` counts what was handed out, never what was prepared. The memory, ahead + 1 steps of
    it, is allocated once, pinned where there is a GPU.
    """

    def __init__(
        self,
        stream: TrainingStream,
        *,
        samples_per_step: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        ahead: int = 0,
    ) -> None:
        self._stream, self._samples_per_step, self._micro_batch = stream, samples_per_step, micro_batch
        accumulation = samples_per_step // (micro_batch * world_size)
        self._starts = [(position * world_size + rank) * micro_batch for position in range(accumulation)]
        pinned = torch.cuda.is_available()
        self._memory = [
            [stream.allocate(micro_batch, pinned=pinned) for _ in range(accumulation)] for _ in range(ahead + 1)
        ]
        self._in_use: int | None = None
        self._spent: int | None = None
        self._closing = False
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[int, Step | BaseException]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True) if ahead else None
        if self._thread:
            for slot in range(ahead):
                self._free.put(slot)
            self._in_use = ahead
            self._thread.start()

    def next(self) -> Step:
        """The next step; the one before must be done with. Raises what went wrong when it was prepared."""
        if self._thread is None:
            return self._prepare(0)
        self.refill()
        self._spent, self._in_use = self._in_use, None
        if self._ready.empty():
            self.refill()
        slot, step = self._ready.get()
        if isinstance(step, BaseException):
            self._ready.put((slot, step))
            raise step
        self._in_use = slot
        return step

    def refill(self) -> None:
        """Let the thread prepare a step in place of the last one but the current, if it is not at it already.

        To be called when the process has nothing to do but to wait: until then the thread, which would compete with it
        for the interpreter, is left asleep as long as a step is ready.
        """
        if self._spent is not None:
            self._free.put(self._spent)
            self._spent = None

    def close(self) -> None:
        """End the thread, after the step that it is at."""
        if self._thread:
            self._closing = True
            self._free.put(0)
            self._thread.join()

    def _work(self) -> None:
        slot = 0
        try:
            while True:
                slot = self._free.get()
                if self._closing:
                    return
                self._ready.put((slot, self._prepare(slot)))
        except BaseException as error:
            self._ready.put((slot, error))

    def _prepare(self, slot: int) -> Step:
        samples = self._stream.take(self._samples_per_step)
        batches = self._memory[slot]
        for start, batch in zip(self._starts, batches, strict=True):
            self._stream.load(samples[start : start + self._micro_batch], batch)
        targets = sum(int(np.count_nonzero(batch.loss_mask.numpy())) for batch in batches)
        return Step(samples, batches, targets, self._stream.state)
