"""The benchmarks: honest peers, rows that say what happened, results that can be read again."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import convergence, machine, memory, models, op, plot, step, table
from benchmarks.models import ENTRANTS, SIZES
from benchmarks.plain_flash import PlainFlashLM
from benchmarks.report import markdown_table
from benchmarks.step_profile import floor_milliseconds, group_events
from flash_model.config import ModelConfig
from flash_model.init import initialize
from flash_model.lm import FlashLM, build_model
from launch.config import accumulation_steps
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TINY = SIZES["tiny"]


@pytest.fixture(autouse=True)
def _clean_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("chunk_size", [8, 512], ids=["toeplitz bias", "rotary bias"])
def test_plain_flash_is_flash(chunk_size: int) -> None:
    """In float64 the plain-torch peer has the loss and every gradient of the model with the op."""
    config = ModelConfig(vocab_size=40, d_model=16, n_layers=2, qk_dim=6, chunk_size=chunk_size, init_std=0.4)
    flash = build_model(config, dtype=torch.float64)
    with torch.device("meta"):
        plain = PlainFlashLM(config).to(torch.float64)
    initialize(plain.to_empty(device="cpu"), config, seed=0)
    tokens = torch.randint(0, 40, (2, 3 * chunk_size), generator=torch.Generator().manual_seed(0))
    losses = []
    for model in (flash, plain):
        losses.append(model(tokens, tokens.roll(-1, 1)))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    for (name, expected), (other, found) in zip(flash.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other
        assert expected.grad is not None
        assert found.grad is not None
        assert (found.grad - expected.grad).norm() <= 1e-10 * expected.grad.norm(), name


@pytest.mark.parametrize("name", ["flash", "flash-plain", "t++-fa2"])
def test_all_layers_share_one_compiled_graph(name: str) -> None:
    """FLASH's first layer, to whose input nothing is added, has its own; positions (FLASH) and head are others."""
    model = models.build(ENTRANTS[name], models.Size(64, 3, 256, (128,), 512, 32, 16, 64), 128, CPU, torch.float32)
    tokens = torch.randint(0, 512, (2, 128), generator=torch.Generator().manual_seed(0))
    expected = model(tokens, tokens)
    torch._dynamo.utils.counters.clear()
    step.compile_model(model, "layer", backend="eager")
    torch.testing.assert_close(model(tokens, tokens), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == {"flash": 4, "flash-plain": 3, "t++-fa2": 2}[name]
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_model_on_a_device_starts_from_the_distribution_of_training() -> None:
    size = models.Size(256, 1, 256, (128,), 2048)
    model = models.build(ENTRANTS["flash"], size, 128, CPU, torch.float32)
    assert isinstance(model, FlashLM)
    trained = build_model(model.config, seed=3)
    for (name, found), (_, expected) in zip(model.named_parameters(), trained.named_parameters(), strict=True):
        assert found.std(correction=0).item() == pytest.approx(expected.std(correction=0).item(), rel=0.15), name
        assert found.mean().item() == pytest.approx(expected.mean().item(), abs=5e-3), name


def run(main: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    assert main() == 0


def test_steps_from_the_command_to_table_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "new" / "step.json"
    run(step.main, monkeypatch, "--size", "tiny", "--compile", "none", "--steps", "3", "--json", str(results))
    document = json.loads(results.read_text())
    assert {row["context"] for row in document["rows"]} == set(TINY.contexts)
    by_title = {(row["title"], row["context"]): row for row in document["rows"]}
    for (title, context), row in by_title.items():
        if "cuDNN" in title:
            assert row["status"] == "no cuDNN here"
            continue
        assert row["status"] == "ok", row
        assert row["tokens_per_step"] == TINY.tokens_per_step
        assert len(row["step_ms"]) == 3
        assert row["ms"] == sorted(row["step_ms"])[1]
        assert row["tokens_per_second"] == pytest.approx(512 / row["ms"] * 1e3)
        assert row["loss"] == pytest.approx(6.24, abs=0.1), f"{title} at {context} does not start at ln 512"
    assert by_title["FLASH", 128]["parameters"] == by_title["FLASH in plain torch", 128]["parameters"]
    assert document["machine"]["commit"]
    assert document["machine"]["copy_gb_per_s"] > 0
    assert any("mixed_chunk_attention: reference" in line for line in document["dispatch"])

    printed = capsys.readouterr().out
    run(table.main, monkeypatch, str(results))
    again = capsys.readouterr().out
    assert again.strip() in printed
    ratio = by_title["FLASH", 256]["tokens_per_second"] / by_title["Transformer++, FA2", 256]["tokens_per_second"]
    assert f"256: FLASH is {ratio:.2f}× Transformer++, FA2" in again

    picture = tmp_path / "speed.svg"
    run(plot.main, monkeypatch, str(results), "--out", str(picture))
    assert "</svg>" in picture.read_text()


WRONG: list[tuple[Any, str, list[str]]] = [
    (step, "--context", ["--context", "0"]),
    (step, "--profile: t++-fa2 has no stages", ["--profile", "--model", "t++-fa2"]),
    (step, "--json", ["--json", "/dev/null/step.json"]),
    (op, "--json", ["--json", "/"]),
    (op, "they are: mixed_chunk_attention", ["--only", "nothing"]),
    (convergence, "--steps", ["--steps", "0"]),
    (plot, "curve.txt is no .png", ["step.json", "--out", "curve.txt"]),
]


@pytest.mark.parametrize(("command", "named", "arguments"), WRONG)
def test_what_is_wrong_with_a_command_is_said_before_anything_is_measured(
    command: Any,
    named: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "describe_machine", None, raising=False)
    with pytest.raises(SystemExit) as left:
        run(command.main, monkeypatch, *arguments)
    assert left.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "holds results of None"),
        ('{"benchmark": "sleep"}', "holds results of sleep"),
        ('{"benchmark": "step", "rows": [{"status": "out of memory"}]}', "no row that was measured"),
    ],
)
def test_files_that_hold_nothing_to_draw_are_named(
    content: str | None, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, figure = tmp_path / "some.json", tmp_path / "figure.png"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=rf"some\.json .*{named}"):
        run(plot.main, monkeypatch, str(file), "--out", str(figure))
    assert not figure.exists()
    if "no row" not in named:
        with pytest.raises(UserError, match=rf"some\.json .*{named}"):
            run(table.main, monkeypatch, str(file))


def test_the_ops_from_the_command_to_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "REPETITION_SECONDS", 0.1)  # enough runs for a median that a busy machine leaves alone
    monkeypatch.delenv("FLASH_OP", raising=False)
    results = tmp_path / "op.json"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other on a busy machine, longer than these cases take
    try:
        run(op.main, monkeypatch, "--size", "tiny", "--json", str(results))
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(results.read_text())["rows"]
    measured = [row for row in rows if row["status"] == "ok"]
    failed = {row["case"]: row["status"] for row in rows if row["status"] != "ok"}
    assert all("cuDNN" in case or "fla" in case for case in failed), failed
    assert len(measured) == 13
    for row in measured:
        assert row["both"]["ms"] > row["forward"]["ms"] > 0
    one, other = (row for row in measured if row["section"] == measured[0]["section"])
    assert one["both"]["ratio"] == 1
    assert other["both"]["ratio"] == pytest.approx(other["both"]["ms"] / one["both"]["ms"])
    (quad,) = (row for row in measured if row["case"] == "quadratic_attention")
    softmax = next(row for row in measured if row["section"] == quad["section"])
    assert quad["forward"]["ratio"] == pytest.approx(quad["forward"]["tflops"] / softmax["forward"]["tflops"])
    assert "FLASH_OP" not in os.environ
    assert "bidirectional, documents" in capsys.readouterr().out


def test_necessary_traffic_and_flops_of_the_op() -> None:
    """65,536 tokens, E = 1536, S = 128: 3,200 columns of two bytes are read and 1,536 written; backward twice that."""
    case = op.mixed_chunk_case(op.SIZES["110m"], "causal", 8, 8192, "")
    assert case.forward_bytes == 65_536 * (3200 + 1536) * 2
    assert case.backward_bytes == 65_536 * (3200 + 1536 + 3200) * 2
    assert case.flops == 65_536 * (256 * (128 + 1536) + 4 * 128 * 1536)


def test_a_row_that_runs_out_of_memory_is_tried_with_half_the_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def measure(entrant: Any, size: Any, context: int, batch: int, **_: Any) -> dict[str, Any]:
        tried.append(batch)
        if batch > 2:
            raise torch.OutOfMemoryError
        return {"tokens_per_second": 1.0}

    monkeypatch.setattr(step, "measure", measure)
    options: dict[str, Any] = {"steps": 1, "compiled": "none", "device": CPU}
    assert step.measure_or_say_why(ENTRANTS["flash"], TINY, 128, **options)["status"] == "ok"
    assert tried == [4, 2]
    wide = models.Size(64, 1, 2048, (128,))
    assert step.measure_or_say_why(ENTRANTS["flash"], wide, 128, **options)["status"] == "out of memory"
    assert tried == [4, 2, 16, 8]


def test_a_context_that_a_model_cannot_read_is_said_in_its_row() -> None:
    row = step.measure_or_say_why(ENTRANTS["flash-plain"], TINY, 100, steps=1, compiled="none", device=CPU)
    assert row["status"] == "ValueError: FLASH in plain torch reads whole chunks of 64 tokens, not 100 tokens"


def test_a_row_whose_parameters_do_not_learn_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled loss without gradients would be fast: such a row must not count."""
    real = models.build

    def without_gradient(*arguments: Any) -> nn.Module:
        model = real(*arguments)
        model.get_submodule("norm").register_forward_hook(lambda _module, _inputs, out: _detached(out))
        return model

    def _detached(out: Tensor) -> Tensor:
        return out.detach().requires_grad_()

    monkeypatch.setattr(models, "build", without_gradient)
    row = step.measure_or_say_why(ENTRANTS["t++-fa2"], TINY, 128, steps=1, compiled="none", device=CPU)
    assert "got no gradient" in row["status"]
    assert "tokens_per_second" not in row


def test_what_no_longer_fits_the_time_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    limit = machine.TimeLimit(10)
    allowed = []
    for seconds in (3, 4, 0, 0):
        allowed.append(limit.allows_another())
        clock += seconds
    assert allowed == [True, True, False, False]
    assert machine.TimeLimit(None).allows_another()


def test_kernels_are_told_apart_by_stage() -> None:
    """Dense products by their shapes, the rest by name; launches inside products are not counted twice."""
    config = ModelConfig(vocab_size=1000, d_model=64, n_layers=1, qk_dim=16)

    def device(name: str, microseconds: float, annotation: bool = False) -> Any:
        time_range = SimpleNamespace(elapsed_us=lambda: microseconds)
        kind = SimpleNamespace(name="CUDA")
        return SimpleNamespace(name=name, device_type=kind, time_range=time_range, is_user_annotation=annotation)

    def product(name: str, shapes: list[list[int]], kernels: dict[str, float]) -> Any:
        launched = [SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels.items()]
        kind = SimpleNamespace(name="CPU")
        return SimpleNamespace(
            name=name, device_type=kind, input_shapes=shapes, kernels=launched, is_user_annotation=False
        )

    events = [
        product("aten::addmm", [[272], [512, 64], [64, 272]], {"gemm": 30}),
        product("aten::mm", [[64, 512], [512, 272]], {"gemm": 40, "splitk": 2}),
        product("aten::mm", [[512, 1000], [1000, 64]], {"gemm": 50}),
        *(device("gemm", time) for time in (30, 40, 50, 7)),
        device("splitk", 2),
        device("Optimizer.step#AdamW.step", 100, annotation=True),
        device("_scores_kernel", 5),
        device("triton_poi_fused_add_0", 3),
        device("triton_poi_fused_add_12", 4),
        device("void at::native::multi_tensor_apply_kernel<Adam>(int)", 9),
    ]
    stages = group_events(events, config, {"_scores_kernel": "op"})
    found = {name: (round(1e3 * stage.milliseconds, 6), stage.calls) for name, stage in stages.items()}
    assert found == {
        "projections, expand forward": (30, 1),
        "projections, expand weight gradient": (42, 1),
        "head, input gradient": (50, 1),
        "other, gemm": (7, 1),
        "op, _scores_kernel": (5, 1),
        "compiled, triton_poi_fused_add": (7, 2),
        "optimizer": (9, 1),
    }
    assert stages["projections, expand forward"].flops == 2 * 512 * 64 * 272


def test_floors_of_a_step() -> None:
    """The base model's, by hand: 112 M parameters, 24 layers, 65,536 tokens, at 700 TFLOP/s and 3 TB/s."""
    config = ModelConfig(vocab_size=32_000, d_model=768, n_layers=24)
    floors = floor_milliseconds(config, 65_536, 112_000_000, {"matmul_tflops": 700, "copy_gb_per_s": 3000})
    assert floors["projections"] == pytest.approx(24 * 3 * 65_536 * 2 * (768 * 3200 + 1536 * 768) / 700e12 * 1e3)
    assert floors["head"] == pytest.approx(13.8, abs=0.05)
    assert floors["op"] == pytest.approx(24 * 0.553, abs=0.05)
    assert floors["optimizer"] == pytest.approx(112e6 * 14 / 3e12 * 1e3)


def test_profile_of_a_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(step.main, monkeypatch, "--size", "tiny", "--compile", "none", "--context", "128", "--profile")
    assert "A step of FLASH at 128, 512 tokens" in capsys.readouterr().out


def test_markdown_tables_are_aligned() -> None:
    text = markdown_table(["what", "ms"], [["a long name", "1"], ["b", "22.5"]])
    assert text.splitlines() == [
        "| what        |   ms |",
        "|-------------|-----:|",
        "| a long name |    1 |",
        "| b           | 22.5 |",
    ]


@pytest.mark.parametrize("size", memory.SIZES)
@pytest.mark.parametrize("setting", memory.SETTINGS)
def test_every_cell_of_the_memory_benchmark_is_a_run_that_can_be(size: str, setting: str) -> None:
    config = memory.cell_config(size, setting, compiled=False)
    assert accumulation_steps(config, 1) == memory.ACCUMULATION


def test_memory_is_measured_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    written = tmp_path / "memory.json"
    arguments = ["memory", "--sizes", "tiny", "--settings", "zero1-recompute-2", "--steps", "1", "--json", str(written)]
    monkeypatch.setattr("sys.argv", arguments)
    assert memory.main() == 0
    document = json.loads(written.read_text())
    (row,) = document["rows"]
    assert row["status"] == "ok", row
    assert 5 < row["loss"] < 7
    assert row["peak_gib"] is None
    assert row["planned_gib"] == pytest.approx(sum(row["planned_gib_by_part"].values()))
    assert "tiny, zero1-recompute-2" in capsys.readouterr().out
    rows = [{**row, "peak_gib": 2.0, "planned_gib": 1.9}, {**row, "status": "out of memory"}]
    report = table.memory_report({**document, "rows": rows})
    assert "0.95" in report
    assert "out of memory" in report


@pytest.mark.parametrize("options", [["--blocks", "2", "--block", "2"], ["--checkpoint", "--saves", "1"]])
def test_the_loop_from_the_command_to_the_table(options: list[str], tmp_path: Path) -> None:
    results = tmp_path / "loop.json"
    command = [sys.executable, "-m", "benchmarks.loop", "--size", "tiny", *options, "--json", str(results)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(results.read_text())
    if "--checkpoint" in options:
        waiting, background = document["checkpoints"]
        assert [waiting["background"], background["background"]] == [False, True]
        assert min(waiting["bytes"], background["bytes"]) > 12 * waiting["parameters"]  # weights, two moments, fp32
        assert "training waits" in done.stdout
    else:
        loop = document["loop"]
        assert len(loop["trainer_ms"]) == len(loop["bare_ms"]) == 2
        assert "overhead of the trainer" in done.stdout
