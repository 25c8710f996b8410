"""Training steps of FLASH and its peers: `python -m benchmarks.step [--size 110m] [--json FILE] …`.

A step is forward, backward and fused AdamW update, in bfloat16 throughout, compiled, on random tokens that are drawn
anew, without activation checkpointing. Tokens per second are those of the median step.
"""

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.machine import TimeLimit, describe_machine, synchronize
from benchmarks.models import ENTRANTS, SIZES, Entrant, Size
from benchmarks.report import DispatchLog, results_file, write_results
from benchmarks.table import step_report
from flash_model.baselines import TransformerLM
from flash_model.lm import FlashLM, decayed_parameters

WARM_UP_STEPS = 2


class TrainingStep:
    """One model with its optimizer; calling it takes a training step and returns the summed nats."""

    def __init__(self, model: nn.Module, batch: int, context: int, device: torch.device, compiled: str) -> None:
        self.model, self.shape, self.device = model, (batch, context + 1), device
        decayed = decayed_parameters(model)
        parameters = dict(model.named_parameters())
        groups = [
            {"params": [parameters[name] for name in parameters if name in decayed], "weight_decay": 0.01},
            {"params": [parameters[name] for name in parameters if name not in decayed], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        compile_model(model, compiled)

    def __call__(self) -> Tensor:
        tokens = torch.randint(models.model_config(self.model).vocab_size, self.shape, device=self.device)
        nats = self.model(tokens[:, :-1], tokens[:, 1:])
        self.optimizer.zero_grad(set_to_none=True)
        (nats / tokens[:, 1:].numel()).backward()
        self.optimizer.step()
        return nats.detach()

    def parameters_without_gradient(self) -> list[str]:
        """Names of the parameters that the last step gave no gradient, or one of zeros alone."""
        named = self.model.named_parameters()
        return [name for name, parameter in named if parameter.grad is None or not bool(parameter.grad.any())]


def compile_model(model: nn.Module, what: str, backend: str = "inductor") -> None:
    """Compile in place: "model" as one graph; "layer": one graph that all layers share, and the ends; "none": not."""
    if what == "model":
        model.compile(dynamic=False, backend=backend)
    elif what == "layer":
        assert isinstance(model, FlashLM | TransformerLM)
        for layer in model.layers:
            layer.compile(dynamic=False, fullgraph=True, backend=backend)
        if model.positions is not None:
            model.positions.compile(dynamic=False, backend=backend)
        head = "head"
        setattr(model, head, torch.compile(model.head, dynamic=False, backend=backend))


def step_milliseconds(step: TrainingStep, steps: int) -> list[float]:
    """Return the time of each of `steps` steps after the warm-up: on a GPU from one's last kernel to the next's."""
    if step.device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        synchronize(step.device)
        return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
    moments = [time.perf_counter()]
    for _ in range(steps):
        step()
        moments.append(time.perf_counter())
    return [1e3 * (end - start) for start, end in itertools.pairwise(moments)]


def measure(
    entrant: Entrant, size: Size, context: int, batch: int, *, steps: int, compiled: str, device: torch.device
) -> dict[str, Any]:
    """Train the model for a few steps and return what was measured."""
    model = models.build(entrant, size, context, device, torch.bfloat16)
    parameters, flops = models.model_size(model, context)
    with entrant.chosen_attention():
        step = TrainingStep(model, batch, context, device, compiled)
        for _ in range(WARM_UP_STEPS):
            nats = step()
        loss = float(nats) / (batch * context)
        if without := step.parameters_without_gradient():
            raise RuntimeError(f"{len(without)} parameters got no gradient: {', '.join(without[:3])} …")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        milliseconds = step_milliseconds(step, steps)
    median = statistics.median(milliseconds)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        "parameters": parameters,
        "tokens_per_step": batch * context,
        "step_ms": milliseconds,
        "ms": median,
        "tokens_per_second": 1e3 * batch * context / median,
        "model_tflops": 1e-9 * flops.training * batch * context / median,
        "peak_gib": peak,
        "loss": loss,
    }


def clean_up(device: torch.device) -> None:
    """Forget compiled code and give all memory back."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_or_say_why(
    entrant: Entrant, size: Size, context: int, *, steps: int, compiled: str, device: torch.device
) -> dict[str, Any]:
    """Measure; where memory ends, once more with half the sequences. Whatever fails becomes the row's status."""
    batch = size.batch(context)
    row: dict[str, Any] = {"context": context, "title": entrant.title, "group": entrant.group}
    if entrant.attention == models.CUDNN and device.type != "cuda":
        return row | {"status": "no cuDNN here"}
    began = time.monotonic()
    for tried in dict.fromkeys((batch, max(1, batch // 2))):
        try:
            measured = measure(entrant, size, context, tried, steps=steps, compiled=compiled, device=device)
            row |= {"status": "ok", **measured}
            break
        except torch.OutOfMemoryError:
            row["status"] = "out of memory"
        except Exception as error:
            row["status"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            break
        finally:
            clean_up(device)
    return row | {"seconds": time.monotonic() - began}


def chosen_rows(size: Size, contexts: list[int] | None, names: list[str] | None) -> Iterator[tuple[str, int]]:
    """Yield name and context of every row, context by context."""
    for context in contexts or size.contexts:
        for name, entrant in ENTRANTS.items():
            if name in names if names else entrant.by_default(context):
                yield name, context


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="110m" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--context", type=int, nargs="+", metavar="T", help="tokens of a sequence; default by size")
    parser.add_argument(
        "--model", nargs="+", choices=ENTRANTS, help="default: those that the size and context call for"
    )
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each row (default 10)")
    parser.add_argument(
        "--compile",
        choices=("model", "layer", "none"),
        default="layer",
        help="the whole model as one graph; one graph for all layers, compiled once (default); nothing",
    )
    parser.add_argument("--seconds", type=float, help="leave out rows that would take longer than this in all")
    parser.add_argument("--json", type=results_file, metavar="FILE", help="write all results, after each row")
    parser.add_argument("--profile", action="store_true", help="a step by stages, of the first model and context")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps: give 1 or more")
    if min(arguments.context or [1]) < 1:
        parser.error("--context: give 1 or more")
    if arguments.profile:
        name, _ = next(chosen_rows(SIZES[arguments.size], arguments.context, arguments.model))
        if not ENTRANTS[name].group.startswith("FLASH"):
            parser.error(f"--profile: {name} has no stages here; take a FLASH model")
    return arguments


def main() -> int:
    """Command line."""
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = SIZES[arguments.size]
    limit = TimeLimit(arguments.seconds)
    document: dict[str, Any] = {
        "benchmark": "step",
        "size": arguments.size,
        "compile": arguments.compile,
        "machine": describe_machine(device),
        "dispatch": DispatchLog().lines,
        "rows": [],
    }
    chosen = list(chosen_rows(size, arguments.context, arguments.model))
    if arguments.profile:
        from benchmarks.step_profile import profile_step

        name, context = chosen[0]
        profile = profile_step(
            ENTRANTS[name], size, context, compiled=arguments.compile, device=device, machine=document["machine"]
        )
        document["profile"] = profile
        clean_up(device)
    for name, context in [] if arguments.profile else chosen:
        entrant = ENTRANTS[name]
        if limit.allows_another():
            row = measure_or_say_why(
                entrant, size, context, steps=arguments.steps, compiled=arguments.compile, device=device
            )
        else:
            row = {"context": context, "title": entrant.title, "group": entrant.group, "status": "left out: no time"}
        document["rows"].append(row)
        speed = f"{row['tokens_per_second']:,.0f} tokens/s" if row["status"] == "ok" else row["status"]
        print(f"{context:>7,} {entrant.title}: {speed} ({row.get('seconds', 0):.0f} s)", flush=True)
        if arguments.json:
            write_results(arguments.json, document)
    if arguments.json:
        write_results(arguments.json, document)
    print(step_report(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
