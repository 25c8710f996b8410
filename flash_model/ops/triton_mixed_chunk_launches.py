"""How the kernels of mixed chunk attention are launched."""

from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """How a kernel is launched: its block sizes, warps and pipeline stages."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int = 1
    registers: int | None = None  # the most that a thread may have: fewer registers, more programs at a time

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


# Chosen once, by timing on an H100, never at run time: the bits of a run do not depend on a race between candidates.
# Blocks of E, L and S are upper bounds: halved until they divide it. Kernels over whole heads: warps for S ≤ 128.
# NAME_two, where there is one, is NAME's for bidirectional calls with documents, NAME_wide its for E > 2,048.
LAUNCHES: dict[torch.dtype, dict[str, Launch]] = {
    torch.bfloat16: {
        "heads": Launch({"ROWS": 32}, 4),
        "scores": Launch({"ROWS": 128}, 4),
        "scores_two": Launch({"ROWS": 64}, 4),
        "forward": Launch(
            {
                "SLICE": 5, "BLOCK": 4096, "BLOCK_L": 128, "SUMS_E": 128, "SUMS_STEP": 64,
                "ROWS": 128, "BLOCK_E": 128, "STEP": 64, "STAGES": 3,
            },
            8, 3, 128,
        ),
        "forward_wide": Launch(
            {
                "SLICE": 2, "BLOCK": 8192, "BLOCK_L": 128, "SUMS_E": 128, "SUMS_STEP": 64,
                "ROWS": 128, "BLOCK_E": 128, "STEP": 64, "STAGES": 3,
            },
            8, 3, 128,
        ),
        "backward": Launch(
            {
                "SLICE": 5, "BLOCK": 4096, "BLOCK_L": 128, "GATE_E": 64, "GATE_STEP": 64,
                "ROWS": 128, "BLOCK_E": 128, "STEP": 64, "STAGES": 3,
            },
            8, 3, 128,
        ),
        "chunk_sums": Launch({"BLOCK_L": 128, "BLOCK_E": 128, "STEP": 64, "STAGES": 3}, 8, 3),
        "route": Launch({"BLOCK": 1024, "AHEAD": 16}, 4),
        "output": Launch({"ROWS": 128, "BLOCK_E": 128, "STEP": 64, "STAGES": 3}, 8, 3),
        "gate_backward": Launch({"BLOCK_L": 128, "BLOCK_E": 64, "STEP": 64, "STAGES": 2}, 4, 2),
        "products_backward": Launch(
            {"ROWS": 128, "BLOCK_L": 128, "BLOCK_E": 128, "STEP": 64, "STAGES": 3}, 8, 3, 128
        ),
        "quad_backward": Launch({"ROWS": 128, "BLOCK_S": 128, "STEP": 64, "STAGES": 3}, 8, 3),
        "heads_backward": Launch({"ROWS": 8}, 1),
    },
    torch.float32: {
        "heads": Launch({"ROWS": 32}, 4),
        "scores": Launch({"ROWS": 64}, 8),
        "forward": Launch(
            {
                "SLICE": 8, "BLOCK": 1024, "BLOCK_L": 64, "SUMS_E": 64, "SUMS_STEP": 32,
                "ROWS": 64, "BLOCK_E": 64, "STEP": 32, "STAGES": 1,
            },
            4,
        ),
        "backward": Launch(
            {
                "SLICE": 8, "BLOCK": 1024, "BLOCK_L": 64, "GATE_E": 64, "GATE_STEP": 32,
                "ROWS": 64, "BLOCK_E": 64, "STEP": 32, "STAGES": 1,
            },
            4,
        ),
        "chunk_sums": Launch({"BLOCK_L": 64, "BLOCK_E": 64, "STEP": 32, "STAGES": 1}, 4),
        "route": Launch({"BLOCK": 1024, "AHEAD": 8}, 4),
        "output": Launch({"ROWS": 64, "BLOCK_E": 64, "STEP": 32, "STAGES": 1}, 4),
        "gate_backward": Launch({"BLOCK_L": 64, "BLOCK_E": 64, "STEP": 32, "STAGES": 1}, 4),
        "products_backward": Launch({"ROWS": 64, "BLOCK_L": 64, "BLOCK_E": 64, "STEP": 32, "STAGES": 1}, 4),
        "quad_backward": Launch({"ROWS": 64, "BLOCK_S": 64, "STEP": 32, "STAGES": 1}, 4),
        "heads_backward": Launch({"ROWS": 32}, 4),
    },
}  # fmt: skip
