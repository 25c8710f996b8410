"""Tables of positions: exact far out, and opaque to the compiler."""

import math

import pytest
import torch

from flash_model.baselines import TransformerConfig, build_baseline
from flash_model.positions import cos_sin


@pytest.mark.parametrize("start", [0, 131_000])
def test_tables_are_the_sines_of_exact_angles(start: int) -> None:
    cos, sin = cos_sin(start, 70, 8, base=10000.0, block=64, dtype=torch.float32)
    for offset in (0, 1, 63, 64, 69):
        angles = [(start + offset) * 10000.0 ** (-k / 8) for k in range(8)]
        for table, function in ((cos, math.cos), (sin, math.sin)):
            expected = torch.tensor([function(angle) for angle in angles], dtype=torch.float64)
            assert (table[offset] - expected).abs().max() < 3e-7


def test_the_tables_are_an_op_that_torch_accepts() -> None:
    torch.library.opcheck(torch.ops.flash_model.cos_sin, (256, 70, 8, 10000.0, 64, torch.float32, torch.device("cpu")))


def test_a_compiled_model_makes_its_tables_once() -> None:
    """Left to the compiler, every layer would evaluate float64 powers and sines for each element that it rotates."""
    config = TransformerConfig(vocab_size=16, d_model=16, n_layers=3, head_dim=8)
    model, tokens = build_baseline(config), torch.zeros(1, 12, dtype=torch.int64)
    calls: list[str] = []

    def record(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph

    torch.compile(model, backend=record, fullgraph=True)(tokens)
    torch._dynamo.reset()
    assert sum("cos_sin" in call for call in calls) == 1
    assert not {"cos", "sin", "pow"} & {call.rpartition(".")[2] for call in calls}
