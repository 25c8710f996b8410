"""State copied off the GPU, snapshots of its memory, and what is said when it is full."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch.config import RunConfig
from launch.engine import Processes
from launch.file_writers import COPY_BLOCK, HostCopy
from launch.profiling import Profiler
from tests.gpu.comparison import DEVICE

pytestmark = pytest.mark.gpu

GIB = 2**30


def profiler(folder: Path, **settings: object) -> Profiler:
    config = RunConfig.model_validate(
        {
            "run": {"dir": folder},
            "model": {"vocab_size": 384, "d_model": 64, "n_layers": 2, "qk_dim": 64},
            "data": {"path": "nowhere", "seq_len": 64},
            "train": {"tokens": 512, "tokens_per_step": 512, "micro_batch": 2},
            "profile": settings,
        }
    )
    return Profiler(config, Processes(0, 1, DEVICE, None))


def test_a_copy_is_what_the_state_was() -> None:
    large = torch.randn(3 * COPY_BLOCK // 4 + 5, device=DEVICE)
    state = {
        "large": large,
        "view": large[7:9],
        "turned": torch.randn(300, 500, device=DEVICE).T,
        "half": [torch.randn(5, device=DEVICE).bfloat16(), torch.tensor(3, device=DEVICE), torch.ones(2)],
    }
    expected = torch.utils._pytree.tree_map(lambda x: x.cpu().clone(), state)
    found = HostCopy(DEVICE)(state)
    large.zero_()
    for one, other in zip(
        torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True
    ):
        assert one.device.type == "cpu"
        assert torch.equal(one, other)


def test_a_step_of_which_memory_is_recorded(tmp_path: Path) -> None:
    with profiler(tmp_path, memory_steps=[2]) as chosen:
        for step in (1, 2, 3):
            chosen.start(step)
            chosen.enter("forward")
            held = torch.empty(step * 1_000_003, dtype=torch.uint8, device=DEVICE)
            assert chosen.stop() is (step == 2)
            del held
    (path,) = (tmp_path / "profiles").iterdir()
    assert path.name == "rank0-step2-memory.pickle"
    snapshot = pickle.loads(path.read_bytes())
    assert snapshot["segments"]
    traced = [entry for trace in snapshot["device_traces"] for entry in trace if entry["action"] == "alloc"]
    assert [entry["frames"] != [] for entry in traced] == [True]
    assert 2_000_006 <= traced[0]["size"] < 2_100_000


def test_what_is_said_when_memory_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = torch.nn.Linear(8192, 8192, bias=False, device=DEVICE)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 8192, device=DEVICE)).sum().backward()
    optimizer.step()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2 * GIB) / total)

    def fill() -> None:
        with profiler(tmp_path) as chosen:
            chosen.engine = SimpleNamespace(module=module, optimizer=optimizer)
            chosen.start(5)
            chosen.enter("backward")
            held = [torch.empty(GIB // 2, dtype=torch.uint8, device=DEVICE) for _ in range(100)]
            del held

    try:
        with pytest.raises(torch.OutOfMemoryError):
            fill()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = capsys.readouterr().err
    assert "rank 0 ran out of GPU memory in phase backward of step 5: CUDA out of memory" in said
    assert "weights 0.25 GiB, float32 weights and moments 0.50 GiB" in said
    assert "lower train.micro_batch (2)" in said
    path = tmp_path / "profiles/rank0-step5-out-of-memory.pickle"
    assert str(path) in said
    assert pickle.loads(path.read_bytes())["segments"]
