"""Records of a checkpoint: what reading them costs in memory."""

from pathlib import Path
from typing import Any

import torch

from launch.conversion import MOMENTS, Records

PARAMETERS, NUMEL, PROCESSES = 32, 1 << 18, 2


def write_stage_2(checkpoint: Path) -> dict[str, Any]:
    """DeepSpeed's files of a group of equal parameters, cut over two processes, and the manifest's part about them."""
    (checkpoint / "deepspeed").mkdir(parents=True)
    size = PARAMETERS * NUMEL // PROCESSES
    files = []
    for rank in range(PROCESSES):
        values = torch.arange(rank * size, (rank + 1) * size) // NUMEL + 1.0
        state = {"step": torch.tensor(5.0), **{key: values * 10 ** (i + 1) for i, key in enumerate(MOMENTS)}}
        zero = {"single_partition_of_fp32_groups": [values], "base_optimizer_state": {"state": {0: state}}}
        files.append(f"deepspeed/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        torch.save({"optimizer_state_dict": zero}, checkpoint / files[-1])
    parameters = [{"name": f"p{i}", "shape": [NUMEL], "offset": i * NUMEL} for i in range(PARAMETERS)]
    layout = {"stage": 2, "groups": [{"parameters": parameters, "partition_numel": size}]}
    return {"world_size": PROCESSES, "layout": layout, "files": dict.fromkeys(files)}


def anonymous_bytes() -> int:
    """Memory of this process that is no page of a file."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def test_memory_is_bounded_by_the_largest_parameter(tmp_path: Path) -> None:
    manifest = write_stage_2(tmp_path)
    largest = 4 * NUMEL
    before, peak = anonymous_bytes(), 0
    for number, record in enumerate(Records(tmp_path, manifest)):
        for factor, what in enumerate(("weight", *MOMENTS)):
            values = record.read(what)
            assert values.numel() == NUMEL
            assert (values == (number + 1) * 10**factor).all()
            peak = max(peak, anonymous_bytes() - before)
        assert record.step == 5
    assert peak < 6 * largest, f"{peak / largest:.1f} times a parameter, of {3 * PARAMETERS}"
