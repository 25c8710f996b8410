"""Scores of a part of a set, norms of layers, progress lines, traces: the numbers are those that they say they are."""

import gzip
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flash_model.config import ModelConfig
from flash_model.lm import build_model
from launch.config import RunConfig, load_run_config
from launch.engine import Processes
from launch.evaluate import evaluate
from launch.layer_metrics import LayerMetrics
from launch.profiling import Profiler
from launch.progress import Pace, _short, progress_line
from launch.samples import read_prompts
from pipeline.batches import Batch
from pipeline.errors import UserError
from pipeline.shards import TokenDataset
from pipeline.tokenizer import Tokenizer

WriteConfig = Callable[..., Path]


@pytest.fixture
def one(alone: Processes) -> Iterator[Processes]:
    """The only process of a process group."""
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    yield alone
    dist.destroy_process_group()


@pytest.fixture
def config(write_config: WriteConfig, tmp_path: Path) -> RunConfig:
    return load_run_config(write_config(run={"dir": str(tmp_path / "run")}))


class Engine:
    """Forward and mode, as DeepSpeed's engine has them."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.seen: list[torch.Tensor] = []

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        assert not self.module.training
        self.seen.append(inputs[1][inputs[2].bool()])
        result: torch.Tensor = self.module(*inputs)
        return result

    def eval(self) -> None:
        self.module.eval()

    def train(self) -> None:
        self.module.train()


class OneNat(torch.nn.Module):
    def forward(self, tokens: Any, targets: Any, loss_mask: torch.Tensor, doc_ids: Any) -> torch.Tensor:
        return loss_mask.sum().float()


def test_a_part_of_a_set_is_scored_with_the_bytes_of_that_part(one: Processes, prepared_data: Path) -> None:
    dataset = TokenDataset.open(prepared_data, "valid")
    lengths = torch.from_numpy(Tokenizer(dataset.tokenizer_path).utf8_lengths())
    wanted = dataset.n_tokens // 3
    found = {}
    for limit in (wanted, wanted, dataset.n_tokens, None):
        engine = Engine(OneNat())
        scores, tokens = evaluate(engine, dataset, one, seq_len=16, micro_batch=3, max_tokens=limit)
        seen = torch.cat(engine.seen)
        found[limit] = seen
        assert tokens == len(seen)
        assert scores["loss"] == 1.0
        assert scores["perplexity"] == pytest.approx(math.e)
        assert scores["bits_per_byte"] == pytest.approx(tokens / math.log(2) / int(lengths[seen].sum()))
    assert wanted - 16 < len(found[wanted]) < wanted + 16
    assert len(found[None]) == len(found[dataset.n_tokens]) == dataset.n_tokens
    assert int(lengths[found[None]].sum()) == dataset.n_utf8_bytes
    assert not torch.equal(found[wanted], found[None][: len(found[wanted])]), "only the beginning was read"


@pytest.mark.parametrize("compiled", [False, True])
def test_activation_norms_are_those_of_the_stream_behind_each_layer(
    one: Processes, write_config: WriteConfig, compiled: bool
) -> None:
    config = load_run_config(write_config(layer_metrics={"every_steps": 3}))
    model = build_model(ModelConfig(vocab_size=384, d_model=32, n_layers=3, qk_dim=16, chunk_size=16), seed=1)
    tokens = torch.randint(384, (2, 40))
    batch = Batch(tokens=tokens, targets=tokens, doc_ids=torch.zeros_like(tokens), loss_mask=torch.ones(2, 40).bool())
    streams: list[torch.Tensor] = []
    with torch.no_grad():
        assert model.positions is not None
        x = model.positions(model.embedding(tokens))
        update: list[torch.Tensor] = []
        for layer in model.layers:
            x, *update = layer(x, batch.doc_ids, *update)
            streams.append(x + sum(update))
    calls = []
    if compiled:

        def backend(graph: Any, inputs: Any) -> Any:
            calls.append(graph)
            return graph.forward

        model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)  # type: ignore[method-assign]
        model(tokens, tokens)
    metrics = LayerMetrics(config, Engine(model.train()), one)
    assert [step for step in range(1, 8) if metrics.due(step)] == [3, 6]
    found = metrics.activations([batch])
    for number, stream in enumerate(streams):
        assert found[f"layers/activation_rms/0{number}"] == pytest.approx(stream.square().mean().sqrt().item())
        assert found[f"layers/activation_max/0{number}"] == stream.abs().max().item()
    assert model.training
    assert not any(layer._forward_hooks for layer in model.layers)
    if compiled:
        model(tokens, tokens)
        assert len(calls) == 1, "the model was compiled again"
    assert metrics.gradients({"embedding": 1.0, "layers.2": 2.0}) == {
        "layers/grad_norm/embedding": 1.0,
        "layers/grad_norm/02": 2.0,
    }


def test_progress_lines_stand_under_each_other(config: RunConfig, alone: Processes) -> None:
    pace = Pace(config, 1e6, alone)

    def line(step: int, loss: float, norm: float, speed: float, **more: float) -> str:
        metrics = {"train/tokens": 512.0 * step, "train/loss": loss, "train/lr": 1e-3, "train/grad_norm": norm}
        metrics |= {"perf/tokens_per_second": speed, "perf/mfu": 0.4, "perf/gpu_memory_gib": 7.0, **more}
        return progress_line(config, step, metrics, pace)

    lines = [line(1, 10.5, 120.25, 999.4), line(8, 2.25, 0.5, 1234567.0, **{"train/skipped_steps": 2})]
    assert lines[0].startswith(
        "step 1/8  tokens   512  loss 10.5000  lr 1.00e-03  grad 120.250    999 tok/s  mfu 40.0%"
    )
    assert lines[0].endswith("left      ?")
    for word in ("tokens", "loss", "lr", "grad", "tok/s", "mfu", "mem", "left"):
        assert lines[0].index(word) == lines[1].index(word), word
    assert lines[1].endswith("skipped 2")
    assert all(character.isprintable() for character in "".join(lines))


def test_the_time_left_does_not_count_the_first_step(
    config: RunConfig, alone: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.0, 60.0, 60.0, 62.0])
    monkeypatch.setattr("launch.progress.time.perf_counter", lambda: next(clock))
    pace = Pace(config, 1e6, alone)
    pace.start_step()
    pace.data_ready()
    pace.end_step()
    assert math.isnan(pace.seconds_left(10)), "the first step warms up: nothing is known yet"
    pace.start_step()
    pace.data_ready()
    pace.end_step()
    assert pace.seconds_left(10) == 20.0


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (65536, "65.5k"),
        (999_600, "1.00M"),
        (9.996e9, "10.0G"),
        (3e14, "300T"),
    ],
)
def test_short_numbers(number: float, text: str) -> None:
    assert _short(number) == text


def test_prompts_that_the_model_cannot_go_on_from(write_config: WriteConfig, prepared_data: Path) -> None:
    tokenizer = TokenDataset.open(prepared_data, "valid").tokenizer_path
    quad = {"architecture": "flash_quad", "norm_length": 64}
    config = load_run_config(write_config(model=quad, samples={"prompts": ["The"], "max_tokens": 64}))
    with pytest.raises(UserError, match=r"samples\.max_tokens: .*norm_length 64 tokens; .* 64 more are 6[5-9]"):
        read_prompts(config, tokenizer)
    bidirectional = {"model": {"causal": False}, "data": {"masked_lm": {}}}
    with pytest.raises(UserError, match=r"samples\.prompts: a bidirectional model"):
        load_run_config(write_config(**bidirectional, samples={"prompts": ["The"]}))


def test_a_step_is_traced_with_its_phases(config: RunConfig, alone: Processes, tmp_path: Path) -> None:
    settings = config.profile.model_copy(update={"steps": (2,)})
    with Profiler(config.model_copy(update={"profile": settings}), alone) as profiler:
        for step in (1, 2, 3):
            profiler.start(step)
            profiler.enter("forward")
            torch.ones(3) + step
            profiler.enter("backward")
            assert profiler.stop() is (step == 2)
    (path,) = (tmp_path / "run/profiles").iterdir()
    assert path.name == "rank0-step2.json.gz"
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    ranges = {event["name"]: event for event in events if event.get("cat") == "user_annotation"}
    assert {"forward", "backward"} <= ranges.keys()
    add = next(event for event in events if event.get("name") == "aten::add")
    assert ranges["forward"]["ts"] <= add["ts"] <= ranges["forward"]["ts"] + ranges["forward"]["dur"]


def test_running_out_of_memory_is_explained_once(
    config: RunConfig, alone: Processes, capsys: pytest.CaptureFixture[str]
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    def fill() -> None:
        with Profiler(config, alone) as profiler:
            profiler.engine = SimpleNamespace(module=torch.nn.Linear(2, 2), optimizer=None)
            profiler.start(7)
            profiler.enter("backward")
            profiler.explain(error)
            raise error

    with pytest.raises(torch.OutOfMemoryError):
        fill()
    said = capsys.readouterr().err
    assert said.count("rank 0 ran out of GPU memory in phase backward of step 7: CUDA out of memory") == 1
    assert "lower train.micro_batch (2)" in said
