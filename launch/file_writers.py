"""Files of a checkpoint: their content copied to host memory, then written and hashed by threads."""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

WRITERS = 4
"""Files that a process writes at once."""
COPIERS = 4
COPY_BLOCK = 1 << 24
BLOCK = 1 << 26

Files = dict[str, dict[str, Any]]
"""Size and SHA-256 of files by their names, relative to the checkpoint."""


class HostCopy:
    """Copies nested dicts, lists and tuples; their tensors lie in host memory afterwards, each on its own.

    Several threads copy blocks, from a GPU through pinned memory of their own: a plain copy into fresh pages is bound
    by one processor core.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(COPIERS, thread_name_prefix="host-copy")

    def __call__(self, state: Any) -> Any:
        """The copy, of what `state` is now."""
        blocks: list[tuple[Tensor, Tensor]] = []

        def copied(tensor: Tensor) -> Tensor:
            source = tensor.detach().contiguous()
            target = torch.empty(source.shape, dtype=source.dtype)
            if source.numel():
                parts = (x.flatten().view(torch.uint8).split(COPY_BLOCK) for x in (source, target))
                blocks.extend(zip(*parts, strict=True))
            return target

        copy = torch.utils._pytree.tree_map_only(Tensor, copied, state)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the threads copy on streams of their own
        for _ in self._pool.map(self._copy_block, blocks):
            pass
        return copy

    def _copy_block(self, block: tuple[Tensor, Tensor]) -> None:
        source, target = block
        if source.device.type == "cuda":
            if not hasattr(self._local, "pinned"):
                self._local.pinned = torch.empty(COPY_BLOCK, dtype=torch.uint8, pin_memory=True)
                self._local.stream = torch.cuda.Stream(self._device)
            pinned = self._local.pinned[: source.numel()]
            with torch.cuda.stream(self._local.stream):
                pinned.copy_(source, non_blocking=True)
            self._local.stream.synchronize()
            source = pinned
        # Unlike torch's, numpy's copy starts no threads beside these.
        target.numpy()[:] = source.numpy()


class FileWriters:
    """Writes this process's files of one checkpoint below `folder`: with `copy` in threads, else at once."""

    def __init__(self, folder: Path, copy: "HostCopy | None") -> None:
        self._folder, self._copy = folder, copy
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="checkpoint") if copy else None
        self._hashers = ThreadPoolExecutor(WRITERS, thread_name_prefix="checkpoint-hash")
        self._tasks: list[Future[None]] = []
        self._files: Files = {}
        self._lock = threading.Lock()
        self._given_up = False
        self._began = time.perf_counter()
        self.seconds = dict.fromkeys(("write", "hash", "sync", "written"), 0.0)

    @property
    def done(self) -> bool:
        """Whether nothing is left to write, or writing has failed."""
        return all(task.done() for task in self._tasks)

    def save(self, state: Any, path: Path) -> None:
        """Write `state` as torch.save does: as it is now, even if it is written later."""
        if self._copy:
            state = self._copy(state)
        self._start(path, lambda file: torch.save(state, cast(IO[bytes], file)))

    def write(self, path: Path, content: Iterable[bytes | memoryview]) -> None:
        """Write `content`, which does not change any more."""

        def write(file: "HashedFile") -> None:
            for part in content:
                file.write(part)

        self._start(path, write)

    def wait(self) -> tuple[Files, str | None]:
        """Wait until all is written: the files, and what went wrong."""
        problems = [error for task in self._tasks if (error := task.exception())]
        self._close()
        return self._files, f"{type(problems[0]).__name__}: {problems[0]}" if problems else None

    def give_up(self) -> None:
        """Stop in the middle of it."""
        self._given_up = True
        self._close()

    def _close(self) -> None:
        for pool in (self._pool, self._hashers):
            if pool:
                pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, path: Path, write: Callable[["HashedFile"], object]) -> None:
        if self._pool:
            self._tasks.append(self._pool.submit(self._write_file, path, write))
        else:
            self._write_file(path, write)

    def _write_file(self, path: Path, write: Callable[["HashedFile"], object]) -> None:
        with open(path, "xb", buffering=0) as raw:
            file = HashedFile(raw, self._hashers, lambda: self._given_up)
            try:
                write(file)
            except RuntimeError as error:  # torch.save's, which says nothing of the disk
                raise file.failure or error from error
            began = time.perf_counter()
            os.fsync(raw.fileno())
            now = time.perf_counter()
        with self._lock:
            self._files[str(path.relative_to(self._folder))] = file.entry
            for part, seconds in {**file.seconds, "sync": now - began}.items():
                self.seconds[part] += seconds
            self.seconds["written"] = now - self._began


class HashedFile:
    """A file that is hashed while it is written, so that nobody has to read it again."""

    def __init__(self, raw: Any, hashers: ThreadPoolExecutor, given_up: Callable[[], bool]) -> None:
        self._raw, self._hashers, self._given_up = raw, hashers, given_up
        self._digest, self._size = hashlib.sha256(), 0
        self.seconds = {"write": 0.0, "hash": 0.0}
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`; hashing goes on beside it. Neither holds the interpreter's lock."""
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), BLOCK):
            if self._given_up():
                raise InterruptedError("given up")
            block = whole[start : start + BLOCK]
            hashed = self._hashers.submit(self._hash, block)
            began = time.perf_counter()
            try:
                position = 0
                while position < len(block):
                    position += self._raw.write(block[position:])
            except OSError as error:
                self.failure = error
                raise
            self.seconds["write"] += time.perf_counter() - began
            hashed.result()
        self._size += len(whole)
        return len(whole)

    def flush(self) -> None:
        """Nothing is held back."""

    @property
    def entry(self) -> dict[str, Any]:
        """Size and SHA-256 of what was written."""
        return {"size": self._size, "sha256": self._digest.hexdigest()}

    def _hash(self, block: memoryview) -> None:
        began = time.perf_counter()
        self._digest.update(block)
        self.seconds["hash"] += time.perf_counter() - began
