"""Writing checkpoints: training stands still while the state is copied to host memory; threads write and hash it.

A checkpoint counts once all processes have written their files: then, between two steps, the first process adds the
manifest and renames the directory. Whatever ends the run before that costs nothing but the work.
"""

import os
import platform
import random
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flash_model.export import model_files
from launch.checkpoint import FORMAT_VERSION, Progress, saved_checkpoints, seal_manifest
from launch.config import RunConfig
from launch.conversion import parameter_layout
from launch.engine import Processes
from launch.file_writers import Files, FileWriters, HostCopy
from launch.retention import hide, kept, remove, remove_leftovers
from pipeline.atomic import hash_file, sync_directory, write_aside, write_json


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that counts.

    Attributes:
        size: bytes of its files, over all processes.
        seconds: of this process. `stall`: how long training stood still in all, of which `copy` went into copying
            DeepSpeed's state to host memory, `export` into gathering whole weights, `wait` into waiting for writers,
            `commit` into manifest and rename. `write`, `hash`, `sync`: the writers' work, summed over their threads;
            `written`: from the start until the last of them was done.
    """

    path: Path
    step: int
    size: int
    seconds: dict[str, float]

    def __str__(self) -> str:
        stall, written = self.seconds["stall"], self.seconds["written"]
        return f"saved {self.path} ({_readable(self.size)} in {written:.1f} s; training stood still for {stall:.1f} s)"


class CheckpointSaver:
    """Saves a run's checkpoints, one at a time.

    With `checkpoint.background: false` files are written by `begin`, straight from where the state lies.
    """

    def __init__(
        self,
        directory: Path,
        engine: Any,
        processes: Processes,
        config: RunConfig,
        *,
        tokenizer: Path,
        run_uid: str | None = None,
        protected: Callable[[], Collection[Path]] = tuple,
        announce: Callable[[SavedCheckpoint], None] = lambda saved: None,
    ) -> None:
        """protected: asked in the first process for checkpoints that are not to be deleted, whatever the rules say.
        announce: told of each checkpoint that counts.
        """
        self._directory, self._engine, self._processes, self._config = directory, engine, processes, config
        self._tokenizer, self._uid, self._protected, self._announce = tokenizer, run_uid, protected, announce
        self._copy = HostCopy(processes.device)
        self._pending: _Pending | None = None
        self._removal: threading.Thread | None = None
        # The manifest has SHA-256 of every file; torch's own checksums take four times as long as that.
        torch.serialization.set_crc32_options(False)

    @property
    def written(self) -> bool:
        """Whether this process has written its part of a checkpoint that does not count yet."""
        return self._pending is not None and self._pending.writers.done

    def begin(
        self, progress: Progress, *, mlflow_run_id: str | None = None, scores: Mapping[str, float] | None = None
    ) -> None:
        """Take the state of the run as it is now, once the checkpoint before counts. Called by all processes.

        scores: validation results of this very step.
        """
        self.finish()
        began = time.perf_counter()
        name = f"step-{progress.step:08d}"
        aside = self._directory / f".writing-{name}"
        processes = self._processes
        if processes.rank == 0:
            self._join_removal()
            remove_leftovers(self._directory)
            (aside / "rng").mkdir(parents=True)
        processes.barrier()
        writers = FileWriters(aside, self._copy if self._config.checkpoint.background else None)
        self._pending = pending = _Pending(name, aside, writers)
        own, self._engine.checkpoint_engine = self._engine.checkpoint_engine, _copying_engine(writers)
        try:
            self._engine.save_checkpoint(str(aside), tag="deepspeed", save_latest=True)
        finally:
            self._engine.checkpoint_engine = own
        writers.save(_random_states(), aside / "rng" / f"rank-{processes.rank}.pt")
        copied = time.perf_counter()
        if self._config.checkpoint.export_model:
            weights = dict(_full_weights(self._engine, self._copy if processes.rank == 0 else None))
            if processes.rank == 0:
                (aside / "model").mkdir()
                for file, content in model_files(self._config.model, weights, self._tokenizer).items():
                    writers.write(aside / "model" / file, content)
        pending.manifest = self._manifest(progress, mlflow_run_id, scores)
        now = time.perf_counter()
        pending.seconds |= {"copy": copied - began, "export": now - copied, "stall": now - began}

    def finish(self) -> None:
        """Wait until the checkpoint that was begun, if any, is written, and make it count. Called by all processes.

        Raises `OSError` in all of them if one could not write its files, `UserError` if the disk is too full for the
        manifest.
        """
        pending, processes = self._pending, self._processes
        if pending is None:
            return
        began = time.perf_counter()
        files = self._written_files(pending)
        waited = time.perf_counter()
        final = processes.once(lambda: self._commit(pending, files))
        self._pending = None
        seconds, ended = pending.seconds | pending.writers.seconds, time.perf_counter()
        seconds |= {"wait": waited - began, "commit": ended - waited, "stall": seconds["stall"] + ended - began}
        size = sum(entry["size"] for entry in files.values())
        self._announce(SavedCheckpoint(final, pending.manifest["step"], size, seconds))

    def _commit(self, pending: "_Pending", files: Files) -> Path:
        """Make a checkpoint count whose files are all on disk."""
        final = self._directory / pending.name
        write_json(pending.aside / "manifest.json", seal_manifest(pending.manifest | {"files": files}))
        if final.exists():
            remove(final)
        os.replace(pending.aside, final)
        sync_directory(self._directory)
        with write_aside(self._directory / "latest") as file:
            file.write(f"{pending.name}\n".encode())
        saved = saved_checkpoints(self._directory)
        doomed = {checkpoint.path for checkpoint in saved} - kept(saved, self._config.checkpoint)
        self._remove(doomed - {*self._protected(), final})
        return final

    def close(self) -> None:
        """Give up what is not complete."""
        if self._pending:
            self._pending.writers.give_up()
            self._pending = None
        self._join_removal()

    def _written_files(self, pending: "_Pending") -> Files:
        """All files of the checkpoint, on disk; what DeepSpeed wrote by itself is flushed and hashed here."""
        processes, aside = self._processes, pending.aside
        mine, problem = pending.writers.wait()
        files: Files = {}
        for rank, (part, failure) in enumerate(processes.gather((mine, problem))):
            if failure:
                raise OSError(f"rank {rank} could not write {aside}: {failure}")
            files |= part
        names = sorted(str(p.relative_to(aside)) for p in aside.rglob("*") if p.is_file())
        others = [name for name in names if name not in files]
        for part in processes.gather(_hash_files(aside, others[processes.rank :: processes.world_size])):
            files |= part
        return dict(sorted(files.items()))

    def _manifest(
        self, progress: Progress, mlflow_run_id: str | None, scores: Mapping[str, float] | None
    ) -> dict[str, Any]:
        return {
            "format": "flash-pretrain checkpoint",
            "format_version": FORMAT_VERSION,
            "step": progress.step,
            "tokens": progress.tokens,
            "attempt": progress.attempt,
            "data": progress.data.to_dict(),
            "scores": dict(scores or {}),
            "tokenizer_sha256": hash_file(self._tokenizer),
            "history": progress.history.to_dict(),
            "world_size": self._processes.world_size,
            "zero_stage": self._config.train.zero_stage,
            "precision": self._config.train.precision,
            "run_uid": self._uid,
            "mlflow_run_id": mlflow_run_id,
            "config": self._config.model_dump(mode="json"),
            "versions": _versions(),
            "layout": parameter_layout(self._engine),
        }

    def _remove(self, checkpoints: Collection[Path]) -> None:
        """Delete in the background: large directories take seconds."""

        hidden = [hide(checkpoint) for checkpoint in checkpoints]

        def work() -> None:
            for directory in hidden:
                shutil.rmtree(directory, ignore_errors=True)

        self._join_removal()
        self._removal = threading.Thread(target=work, name="retention")
        self._removal.start()

    def _join_removal(self) -> None:
        if self._removal:
            self._removal.join()
            self._removal = None


@dataclass
class _Pending:
    """A checkpoint between `begin` and `finish`."""

    name: str
    aside: Path
    writers: "FileWriters"
    seconds: dict[str, float] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)


def _copying_engine(writers: FileWriters) -> Any:
    """What DeepSpeed hands the content of its files to."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class CopyingEngine(TorchCheckpointEngine):
        def save(self, state_dict: Any, path: str) -> None:
            writers.save(state_dict, Path(path))

    return CopyingEngine()


def _full_weights(engine: Any, copy: HostCopy | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole float32 weight of each parameter, in host memory; without `copy` nothing is kept.

    Every process has to walk through it.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    partitioned = engine.zero_optimization_stage() > 0
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter) if partitioned else parameter.detach()
        if copy:
            yield name, copy(full.float())


def _hash_files(directory: Path, names: Iterable[str]) -> Files:
    found = {}
    for name in names:
        with open(directory / name, "rb") as file:
            os.fsync(file.fileno())
        found[name] = {"size": (directory / name).stat().st_size, "sha256": hash_file(directory / name)}
    return found


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _versions() -> dict[str, str]:
    import deepspeed

    return {"python": platform.python_version(), "torch": torch.__version__, "deepspeed": deepspeed.__version__}


def _readable(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
