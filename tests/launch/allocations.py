"""What torch allocates, operation by operation, on any device. As a program: a few training steps of each kind.

Started with the name of a JSON file to write: by kind the peak in bytes beside the plan's, and how many graphs were
compiled by a mock step and by the steps after it.
"""

import gc
import json
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

KINDS = [("fp32", 0), ("fp32", 2), ("bf16", 1), ("bf16", 2), ("bf16", 3)]


class Allocations(TorchDispatchMode):
    """Counts the bytes of all storages that operations return, while they live. What an op's own code allocates for
    itself is not seen, nor are `known` tensors.
    """

    def __init__(self, known: Any = ()) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._live = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live:
            self._live[key] = storage.nbytes()
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.current -= self._live.pop(key, 0)


def config_of(precision: str, stage: int, **train: Any) -> Any:
    from launch.config import RunConfig

    # Few tokens: what is to be seen does not depend on them, and on CPUs layers keep other things than on GPUs.
    zero = {"reduce_bucket_size": 400_000, "stage3_param_persistence_threshold": 0} if stage else {}
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"vocab_size": 1024, "d_model": 128, "n_layers": 6, "qk_dim": 64, "chunk_size": 64},
            "data": {"path": "unused", "seq_len": 64},
            "train": {"tokens": 1280, "tokens_per_step": 128, "precision": precision, "zero_stage": stage, **train},
            "deepspeed": {"zero_optimization": zero},
        }
    )


def train(config: Any, engine: Any, processes: Any) -> None:
    from launch.engine import update
    from launch.evaluate import to_device
    from launch.first_step import _made_up
    from launch.gradients import GradientNorms

    norms = GradientNorms(engine, processes)
    for _ in range(2):
        nats = torch.zeros((), dtype=torch.float64)
        for position in range(2):
            summed = engine(*to_device(_made_up(config), processes.device))
            nats += summed.detach().double()
            engine.backward(summed / 64)
            if position == 0:
                engine.step()
        norms.reduce(nats)
        update(engine)


def main() -> None:
    from launch import engine as engines
    from launch.first_step import take_mock_step
    from launch.memory import CUBLAS_WORKSPACES, estimate_memory

    processes = engines.start_processes()
    found: dict[str, Any] = {}
    for precision, stage in KINDS:
        config = config_of(precision, stage)
        with Allocations() as allocations:
            engine = engines.build_engine(config, processes)
            for group in engine.optimizer.param_groups:
                group["fused"] = True  # as on GPUs: without copies
            gc.collect()
            train(config, engine, processes)
        planned = estimate_memory(config, 1).total - CUBLAS_WORKSPACES
        found[f"{precision}-{stage}"] = [allocations.peak, planned]
        del engine
        gc.collect()
    config = config_of("fp32", 1, compile=True)
    graphs = torch._dynamo.utils.counters["stats"]
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        engine = engines.build_engine(config, processes)
    take_mock_step(config, engine, processes)
    after_mock_step = graphs["unique_graphs"]
    train(config, engine, processes)
    found["graphs"] = [after_mock_step, graphs["unique_graphs"]]
    Path(sys.argv[1]).write_text(json.dumps(found))
    processes.leave()


if __name__ == "__main__":
    main()
