"""Does a model learn the same with the kernels? Loss curves with kernels and with the reference, from one start.

python -m benchmarks.convergence [DATASET] --json convergence.json --plot convergence.png

Both see the same batches from the same initial weights, so that curves differ by rounding alone; how much that may
matter is read off runs of the reference from other initial weights on the same batches. It is the attention op that
changes: head and norms run their own kernels on a GPU either way.
"""

import argparse
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from benchmarks.plot import FAINT, GRID, INK
from benchmarks.report import figure_file, results_file, write_results
from flash_model.config import ModelConfig
from flash_model.lm import build_model, decayed_parameters
from pipeline.errors import run_command

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SMOOTHED_STEPS = 10
FINAL_SHARE = 4  # the end of a run is its last quarter
REFERENCE_COLOR, KERNEL_COLOR, BAND_COLOR = "#e08a1e", "#1f5fa8", "#f6dfbd"


@dataclass(frozen=True)
class Setting:
    """Model and batches: FLASH of `n_layers` units, `batch` sequences of `seq_len` tokens a step."""

    n_layers: int
    d_model: int
    qk_dim: int
    chunk_size: int
    seq_len: int
    batch: int
    peak_learning_rate: float = 2e-3


SETTINGS = {
    "small": Setting(n_layers=6, d_model=256, qk_dim=128, chunk_size=256, seq_len=1024, batch=16),
    "tiny": Setting(n_layers=2, d_model=32, qk_dim=16, chunk_size=16, seq_len=64, batch=4, peak_learning_rate=5e-3),
}


@dataclass(frozen=True)
class Run:
    """One training run. losses: nats per token of each step, before its update."""

    dtype: str
    seed: int
    implementation: str
    losses: list[float]


class MarkovText:
    """Made-up text without end: half of the tokens follow from the last one, half from the last two.

    Each context has four continuations, so that a model that learned it all is left with 1.9 nats a token.
    Documents are 300 tokens long on average and share the statistics.
    """

    vocab_size = 64
    _DOCUMENT_ENDS = 1 / 300

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        V = self.vocab_size
        self._after_one = torch.randint(0, V, (V, 4), generator=generator)
        self._after_two = torch.randint(0, V, (V, V, 4), generator=generator)

    def batch(self, step: int, batch: int, seq_len: int) -> dict[str, Tensor]:
        """Return the model's arguments for a step: a function of its number alone."""
        generator = torch.Generator().manual_seed(step + 1)
        choice = torch.multinomial(
            torch.tensor([0.5, 0.25, 0.15, 0.1]), batch * (seq_len + 1), replacement=True, generator=generator
        ).view(batch, seq_len + 1)
        looks_at_two = torch.rand(batch, seq_len + 1, generator=generator) < 0.5
        tokens = torch.randint(0, self.vocab_size, (batch, seq_len + 3), generator=generator)
        for t in range(seq_len + 1):
            two, one, chosen = tokens[:, t], tokens[:, t + 1], choice[:, t]
            tokens[:, t + 2] = torch.where(
                looks_at_two[:, t], self._after_two[two, one, chosen], self._after_one[one, chosen]
            )
        ends = torch.rand(batch, seq_len, generator=generator) < self._DOCUMENT_ENDS
        return {"tokens": tokens[:, 2:-1], "targets": tokens[:, 3:], "doc_ids": ends.long().cumsum(1)}


class Shards:
    """A directory made by pipeline.prepare, in the order of a training run."""

    def __init__(self, path: Path, seq_len: int) -> None:
        from pipeline.batches import TrainingStream
        from pipeline.shards import TokenDataset

        dataset = TokenDataset.open(path, "train")
        self.vocab_size = dataset.vocab_size
        self._stream = TrainingStream(dataset, seq_len=seq_len, seed=0)

    def batch(self, step: int, batch: int, seq_len: int) -> dict[str, Tensor]:
        """Return the model's arguments for a step: a function of its number alone."""
        return vars(self._stream.load(range(step * batch, (step + 1) * batch)))


def train(
    setting: Setting, vocab_size: int, batches: Sequence[dict[str, Tensor]], dtype: torch.dtype, seed: int
) -> list[float]:
    """Train on the device of the batches, one a step, and return the loss of each step, in nats per token.

    The optimizer keeps float32 weights, from which the model's are rounded, as DeepSpeed does.
    """
    config = ModelConfig(
        vocab_size=vocab_size,
        d_model=setting.d_model,
        n_layers=setting.n_layers,
        qk_dim=setting.qk_dim,
        chunk_size=setting.chunk_size,
    )
    model = build_model(config, seed=seed, device=batches[0]["tokens"].device)
    decayed = decayed_parameters(model)
    masters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.to(dtype)
    groups = [
        {"params": [masters[name] for name in masters if name in decayed], "weight_decay": 0.01},
        {"params": [masters[name] for name in masters if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=setting.peak_learning_rate, betas=(0.9, 0.98), eps=1e-6)
    steps = len(batches)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 1.0 - 0.9 * step / steps)
    )
    losses = []
    for batch in batches:
        counted = batch["loss_mask"].sum() if "loss_mask" in batch else batch["targets"].numel()
        model.zero_grad()
        loss = model(**batch) / counted
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            masters[name].grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def compare(
    setting: Setting,
    data: MarkovText | Shards,
    *,
    steps: int,
    dtypes: Sequence[str],
    seeds: int,
    kernels: str,
    device: torch.device,
) -> Iterator[Run]:
    """Train with the reference and with `kernels` (a value of FLASH_OP) for every dtype and seed."""
    batches = [
        {name: x.to(device) for name, x in data.batch(step, setting.batch, setting.seq_len).items()}
        for step in range(steps)
    ]
    before = os.environ.get("FLASH_OP")
    try:
        for dtype in dtypes:
            for seed in range(seeds):
                for implementation in ("reference", "kernels"):
                    os.environ["FLASH_OP"] = kernels if implementation == "kernels" else "reference"
                    losses = train(setting, data.vocab_size, batches, DTYPES[dtype], seed)
                    yield Run(dtype, seed, implementation, losses)
    finally:
        os.environ.pop("FLASH_OP", None)
        if before is not None:
            os.environ["FLASH_OP"] = before


def curves(runs: Sequence[Run], dtype: str, implementation: str) -> list[list[float]]:
    """The loss curves of a dtype and an implementation, smoothed, by seed."""
    chosen = [run for run in runs if (run.dtype, run.implementation) == (dtype, implementation)]
    return [_smooth(run.losses) for run in sorted(chosen, key=lambda run: run.seed)]


def _smooth(values: list[float]) -> list[float]:
    return [statistics.fmean(values[max(0, i + 1 - SMOOTHED_STEPS) : i + 1]) for i in range(len(values))]


def noise(references: Sequence[Sequence[float]]) -> list[float]:
    """Standard deviation of the reference's curves from different initial weights, by step."""
    return [statistics.stdev(losses) for losses in zip(*references, strict=True)]


def summarize(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each dtype: the loss at the end, the difference that kernels make, and that which initial weights make."""
    rows = []
    for dtype in dict.fromkeys(run.dtype for run in runs):
        references, kernels = curves(runs, dtype, "reference"), curves(runs, dtype, "kernels")
        end = -(-len(references[0]) // FINAL_SHARE)
        final_references = [statistics.fmean(curve[-end:]) for curve in references]
        final_kernels = [statistics.fmean(curve[-end:]) for curve in kernels]
        band = noise(references)
        differences = [
            abs(k - r) / s if s else 0.0 if k == r else float("inf")
            for kernel, reference in zip(kernels, references, strict=True)
            for k, r, s in zip(kernel, reference, band, strict=True)
        ]
        rows.append(
            {
                "dtype": dtype,
                "loss_reference": statistics.fmean(final_references),
                "loss_kernels": statistics.fmean(final_kernels),
                "difference": statistics.fmean(final_kernels) - statistics.fmean(final_references),
                "noise": statistics.stdev(final_references),
                "share_within_two_noises": sum(x <= 2 for x in differences) / len(differences),
            }
        )
    return rows


def draw(runs: Sequence[Run], title: str) -> Any:
    """Return a matplotlib figure: for each dtype the curves, below them their difference in the band of noise."""
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(run.dtype for run in runs))
    figure = Figure(figsize=(6.2 * len(dtypes), 6.4), facecolor="white", layout="constrained")
    panels = figure.subplots(2, len(dtypes), squeeze=False, sharex=True, height_ratios=[2, 1])
    for (upper, lower), dtype in zip(panels.T, dtypes, strict=True):
        references, kernels = curves(runs, dtype, "reference"), curves(runs, dtype, "kernels")
        band = noise(references)
        steps = range(1, len(band) + 1)
        for number, (reference, kernel) in enumerate(zip(references, kernels, strict=True)):
            labels = ("reference", "kernels", "kernels − reference") if number == 0 else (None, None, None)
            upper.plot(steps, reference, color=REFERENCE_COLOR, lw=3.2, alpha=0.7, label=labels[0])
            upper.plot(steps, kernel, color=KERNEL_COLOR, lw=1.1, ls="--", label=labels[1])
            difference = [k - r for k, r in zip(kernel, reference, strict=True)]
            lower.plot(steps, difference, color=KERNEL_COLOR, lw=1.1, label=labels[2])
        two = [2 * deviation for deviation in band]
        lower.fill_between(
            steps, [-x for x in two], two, color=BAND_COLOR, lw=0, label="± 2 σ of other initial weights"
        )  # fmt: skip
        upper.set_title(f"{dtype}, {len(references)} seeds", loc="left", color=INK, fontsize=12, fontweight="bold")
        upper.set_ylabel("nats per token", color=INK)
        lower.set_ylabel("difference", color=INK)
        lower.set_xlabel("step", color=INK)
        for axes in (upper, lower):
            axes.grid(color=GRID, lw=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(colors=INK, length=0)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color(FAINT)
            axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    figure.supxlabel(title, color=FAINT, fontsize=9)
    return figure


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__)
    parser.add_argument("dataset", nargs="?", type=Path, help="made by pipeline.prepare; default: made-up text")
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="at least 2: the noise is measured between them")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", type=results_file, metavar="FILE")
    parser.add_argument("--plot", type=figure_file, metavar="FILE", help=".png, .svg or .pdf")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error(f"--seeds: {arguments.seeds} leaves no noise to compare with; take at least 2")
    if arguments.steps < 1:
        parser.error("--steps: give 1 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels = "triton" if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else "reference"
    if kernels == "reference":
        print("no GPU: the reference is compared with itself")
    setting = SETTINGS[arguments.setting]
    data = Shards(arguments.dataset, setting.seq_len) if arguments.dataset else MarkovText()
    runs = []
    for run in compare(
        setting, data, steps=arguments.steps, dtypes=arguments.dtype, seeds=arguments.seeds, kernels=kernels,
        device=device,
    ):  # fmt: skip
        runs.append(run)
        print(f"{run.dtype}  seed {run.seed}  {run.implementation:9}  last loss {run.losses[-1]:.4f}", flush=True)
    summary = summarize(runs)
    for row in summary:
        print(
            f"{row['dtype']}: last quarter {row['loss_reference']:.4f} reference, {row['loss_kernels']:.4f} kernels; "
            f"difference {row['difference']:+.5f}, noise {row['noise']:.5f}; "
            f"{row['share_within_two_noises']:.0%} of steps within two standard deviations"
        )
    machine = describe_machine(device)
    if arguments.json:
        document = {"benchmark": "convergence", "machine": machine, "kernels": kernels, "setting": asdict(setting)}
        write_results(arguments.json, document | {"summary": summary, "runs": [asdict(run) for run in runs]})
    if arguments.plot:
        title = (
            f"FLASH, {setting.n_layers} units of width {setting.d_model}, {setting.batch * setting.seq_len:,} tokens a "
            f"step, mean of {SMOOTHED_STEPS} steps; {machine['device']}, torch {machine['torch']}"
        )
        draw(runs, title).savefig(arguments.plot, dpi=140)
    return 0


if __name__ == "__main__":
    run_command(main)
