"""The dry run, and every configuration that is shipped."""

import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flash_model.lm import build_model
from launch.config import load_run_config
from launch.plan import main, plan_lines
from launch.trainer import open_datasets
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RUNS = [path for path in sorted(ROOT.glob("configs/**/*.yaml")) if "run:" in path.read_text().splitlines()]


def test_runs_are_found() -> None:
    assert {"quickstart.yaml", "flash-8k.yaml"} <= {path.name for path in RUNS}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(ROOT)))
def test_first_loss_of_a_shipped_run_is_that_of_guessing(path: Path) -> None:
    config = load_run_config(path)
    model = build_model(config.model, seed=config.run.seed, dtype=torch.float32)
    # The first loss does not depend on the length: a short window keeps the largest model affordable here.
    tokens = torch.randint(4, config.model.vocab_size, (1, 257), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        nats = model(tokens[:, :-1], tokens[:, 1:])
    assert nats.item() / 256 == pytest.approx(math.log(config.model.vocab_size), rel=0.02)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_run_can_be_planned(path: Path) -> None:
    lines = list(plan_lines(load_run_config(path), devices=2, memory_gib=80.0, peak_tflops=989.0))
    assert any("parameters" in line for line in lines)
    assert any("← configured" in line for line in lines)


def test_the_plan_says_what_training_needs(prepared_data: Path, write_config: Callable[..., Path]) -> None:
    path = write_config(data={"path": str(prepared_data)})
    command = [sys.executable, "-m", "launch.plan", str(path), "--devices", "2", "--memory", "0.0001"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((prepared_data / "manifest.json").read_text())
    tokens = manifest["splits"]["train"]["tokens"]
    windows = -(-tokens // 64)
    for expected in (
        "512 tokens = 2 devices × 2 accumulated × micro batch 2 × seq_len 64",
        "8 steps, 4,096 tokens",
        f"{tokens:,} tokens, {64 / windows:.2f} epochs; digest {manifest['digest'][:16]}",
        "does not fit 0.0001 GiB",
    ):
        assert expected in done.stdout
    parameters = sum(p.numel() for p in build_model(load_run_config(path).model, device="meta").parameters())
    assert f"{parameters:,} parameters" in done.stdout


@pytest.mark.parametrize("option", ["--devices=0", "--memory=-1", "--peak=0", "--memory=nan"])
def test_a_device_that_there_cannot_be(
    option: str, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", str(write_config()), option])
    with pytest.raises(UserError, match=option.partition("=")[0]):
        main()


def test_the_plan_of_a_mixture(prepared_data: Path, write_config: Callable[..., Path]) -> None:
    parts = [{"path": str(prepared_data), "weight": 3}, {"path": str(prepared_data), "split": "valid", "name": "v"}]
    config = load_run_config(write_config(data={"path": None, "mixture": parts}))
    lines = list(plan_lines(config, devices=1, memory_gib=None, peak_tflops=None))
    splits = json.loads((prepared_data / "manifest.json").read_text())["splits"]
    assert any(line.startswith("data        mixture of 2; digest ") for line in lines)
    for name, split, share in (("data", "train", 0.75), ("v", "valid", 0.25)):
        tokens = splits[split]["tokens"]
        epochs = 64 * share / -(-tokens // 64)
        expected = f"{name}, {share} of it: {prepared_data}: {tokens:,} tokens, {epochs:.2f} epochs"
        assert any(expected in line for line in lines)


def test_a_validation_set_of_another_tokenizer(
    prepared_data: Path, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(prepared_data, tmp_path / "other"))
    (other / "tokenizer.model").write_bytes(b"another")
    manifest = (other / "manifest.json").read_text()
    old = json.loads(manifest)["tokenizer"]["sha256"]
    (other / "manifest.json").write_text(manifest.replace(old, hashlib.sha256(b"another").hexdigest()))
    data = {"path": str(prepared_data), "validation": {"held-out": {"path": str(other)}}}
    with pytest.raises(
        UserError, match=r"data\.validation\.held-out: .*other has another tokenizer than .*data: prepare"
    ):
        open_datasets(load_run_config(write_config(data=data)))


def test_windows_longer_than_all_of_the_text(prepared_data: Path, write_config: Callable[..., Path]) -> None:
    config = load_run_config(
        write_config(data={"path": str(prepared_data)}), ["data.seq_len=1048576", "train.tokens_per_step=8388608"]
    )
    with pytest.raises(UserError, match=r"data\.seq_len: 1,048,576 tokens are more than all of .*data, which has"):
        open_datasets(config)


def test_a_plan_for_devices_that_do_not_divide_is_refused(write_config: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="3 processes"):
        list(plan_lines(load_run_config(write_config()), devices=3, memory_gib=None, peak_tflops=None))


def test_the_plan_says_what_would_fit(write_config: Callable[..., Path]) -> None:
    config = load_run_config(write_config(), ["train.precision=bf16", "train.offload=optimizer"])
    lines = list(plan_lines(config, devices=2, memory_gib=1.1, peak_tflops=None))
    (configured,) = [line for line in lines if "← configured" in line]
    assert configured.endswith("does not fit 1.1 GiB")
    assert any("GiB of the host's memory" in line for line in lines)
    advice = lines[next(number for number, line in enumerate(lines) if "to fit 1.1 GiB" in line) + 1]
    assert advice.strip() == "nothing: a smaller model or data.seq_len"
    tight = load_run_config(ROOT / "configs/pg19/flash-8k.yaml", ["train.micro_batch=8"])
    lines = list(plan_lines(tight, devices=4, memory_gib=76.0, peak_tflops=None))
    after = lines[next(number for number, line in enumerate(lines) if "to fit 76 GiB" in line) + 1 :]
    assert after[0].strip().startswith("train.activation_checkpointing=4 (")
    assert after[1].strip().startswith("train.micro_batch=4 (")


def test_the_plan_checks_where_weights_come_from_and_copies_go(
    write_config: Callable[..., Path], write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    def plan(*overrides: str) -> None:
        list(plan_lines(load_run_config(write_config(), overrides), devices=1, memory_gib=None, peak_tflops=None))

    with pytest.raises(UserError, match=r"run\.init_from: .*manifest\.json is missing or damaged"):
        plan(f"run.init_from={tmp_path / 'nothing'}")
    checkpoint = write_checkpoint(tmp_path, 1)
    (checkpoint / "latest").write_bytes(b"other")
    with pytest.raises(UserError, match=r"run\.init_from: .*latest has"):
        plan(f"run.init_from={checkpoint}")
    with pytest.raises(UserError, match=r"checkpoint\.copy_to: .* is where the run keeps its checkpoints"):
        plan(f"checkpoint.copy_to={Path.cwd() / 'runs/test/checkpoints'}")
