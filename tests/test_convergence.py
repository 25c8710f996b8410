"""The comparison of loss curves: what it trains on, what it compares with what, what it writes."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import convergence, table
from benchmarks.convergence import SETTINGS, MarkovText, Run, Shards, compare, summarize

CPU = torch.device("cpu")


def test_the_command_writes_curves_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASH_OP", raising=False)
    written = {"--json": tmp_path / "c.json", "--plot": tmp_path / "c.png"}
    arguments = ["--setting", "tiny", "--steps", "30", "--seeds", "2", "--dtype", "fp32"]
    monkeypatch.setattr(sys, "argv", ["convergence", *arguments, *(str(x) for pair in written.items() for x in pair)])
    assert convergence.main() == 0
    document = json.loads(written["--json"].read_text())
    runs = [Run(**run) for run in document["runs"]]
    assert [(run.seed, run.implementation) for run in runs] == [
        (0, "reference"), (0, "kernels"), (1, "reference"), (1, "kernels"),
    ]  # fmt: skip
    assert all(len(run.losses) == 30 and run.losses[-1] < run.losses[0] - 0.1 for run in runs)
    assert runs[0].losses == runs[1].losses  # without a GPU both are the reference
    assert runs[0].losses != runs[2].losses
    assert document["summary"][0]["difference"] == 0
    assert written["--plot"].stat().st_size > 10_000
    assert "| fp32  |" in table.convergence_report(document)
    assert "FLASH_OP" not in os.environ


def test_a_difference_beyond_the_noise_is_reported() -> None:
    def run(seed: int, implementation: str, offset: float) -> Run:
        return Run("bf16", seed, implementation, [3.0 + offset + 0.01 * (-1) ** seed] * 40)

    runs = [run(seed, name, offset) for seed in (0, 1) for name, offset in (("reference", 0.0), ("kernels", 0.1))]
    (row,) = summarize(runs)
    assert row["difference"] == pytest.approx(0.1)
    assert row["noise"] == pytest.approx(0.02 / 2**0.5)
    assert row["share_within_two_noises"] == 0


def test_made_up_text_is_a_chain_of_order_two_with_documents() -> None:
    batch = MarkovText().batch(0, 4, 2000)
    assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    counts = torch.zeros(64, 64)
    counts.index_put_((batch["tokens"].flatten(), batch["targets"].flatten()), torch.ones(8000), accumulate=True)
    assert (counts.topk(4, 1).values.sum() / counts.sum()).item() > 0.5  # half of it follows from one token alone
    assert (batch["doc_ids"].diff() >= 0).all()
    assert batch["doc_ids"].max() > 2
    assert not torch.equal(batch["tokens"], MarkovText().batch(1, 4, 2000)["tokens"])


def test_shards_are_read_in_a_runs_order(prepared_data: Path) -> None:
    data = Shards(prepared_data, 64)
    (run, *_) = compare(SETTINGS["tiny"], data, steps=3, dtypes=["bf16"], seeds=1, kernels="reference", device=CPU)
    assert len(run.losses) == 3
    assert torch.equal(data.batch(1, 2, 64)["tokens"], data.batch(0, 4, 64)["tokens"][2:])
