"""`launch/train.py` by one process: what a user does wrong, checkpoints, and continuing."""

import fcntl
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flash_model.config import ModelConfig
from launch.checkpoint import read_manifest
from launch.config import load_run_config
from launch.conversion import Records
from launch.engine import start_processes
from launch.initial_weights import _check_fits
from launch.run_directory import RunDirectory
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
WriteConfig = Callable[..., Path]


def train(config: Path, *arguments: str, largest_file: int | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "launch/train.py", str(config), "tracking.enabled=false", *arguments]
    if largest_file is not None:
        command = ["prlimit", f"--fsize={largest_file}", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def config(write_config: WriteConfig, prepared_data: Path, tmp_path: Path) -> Path:
    return write_config(run={"dir": str(tmp_path / "run")}, data={"path": str(prepared_data)})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["optimzer.lr=1", "train.micro_batch=two"], ["optimzer", "optimizer", "train.micro_batch", "two"]),
        (["train.tokens_per_step=500"], ["train.tokens_per_step: 500", "384 or 512"]),
        (["data.path=does/not/exist"], ["does/not/exist", "manifest.json", "pipeline.prepare"]),
        (["data.split=test"], ["no split 'test'", "train, valid"]),
        (["model.vocab_size=100"], ["model.vocab_size: 100", "384"]),
        (["--resume"], ["nothing to resume from", "--resume"]),
        (["deepspeed.zero_optimisation.stage=1"], ["deepspeed.zero_optimisation", "did you mean zero_optimization"]),
        (["checkpoint.copy_to=nosuch://there"], ["checkpoint.copy_to: nosuch://there", "nosuch"]),
        (["=3"], ["=3"]),
    ],
)
def test_user_errors(config: Path, tmp_path: Path, arguments: list[str], expected: list[str]) -> None:
    done = train(config, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    for part in expected:
        assert part in done.stderr
    assert not (tmp_path / "run").exists(), "something was left behind"


def test_a_missing_config_file(tmp_path: Path) -> None:
    done = train(tmp_path / "none.yaml")
    assert done.returncode == 2
    assert str(tmp_path / "none.yaml") in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("rank", "local_rank", "begins"), [(0, 0, "error: "), (1, 1, ""), (8, 0, "error on ")])
def test_each_node_says_what_is_wrong_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int, local_rank: int, begins: str
) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())  # which importing it changes
    command = importlib.import_module("launch.train")
    monkeypatch.setattr(command, "SILENT_EXIT_SECONDS", 0.0)
    monkeypatch.setattr(sys, "argv", ["train.py", "only/on/the/other/node.yaml"])
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert command.main() == 2
    said = capsys.readouterr().err
    assert said.startswith(begins)
    assert said.count("only/on/the/other/node.yaml") == bool(begins)


def test_settings_that_deepspeed_refuses(config: Path) -> None:
    done = train(config, "deepspeed.zero_optimization.reduce_bucket_sizes=5")
    assert done.returncode == 2, done.stderr
    assert "reduce_bucket_sizes" in done.stderr.split("error: ")[-1]


def test_a_run_without_any_gradient_stops(config: Path, tmp_path: Path) -> None:
    """Logits times 1e-50 are all 0 in float32, and so is what comes back."""
    done = train(config, "model.head_scale=1e-50")
    assert done.returncode == 70, done.stderr
    assert "step 1 has 512 targets and a gradient of exactly 0" in done.stdout
    assert not (tmp_path / "run/DONE").exists()
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_budget_0_stops_at_the_first_bad_step_and_a_rollback_says_where_it_goes(config: Path, tmp_path: Path) -> None:
    """The first update at this rate makes every later loss nan."""
    spoilt = ["optimizer.lr=1e30", "bad_steps.budget=0", "checkpoint.every_tokens=512"]
    done = train(config, *spoilt)
    assert done.returncode == 70, done.stderr
    assert "step 2/8  BAD, not learnt from: loss nan" in done.stdout
    assert "over bad_steps.budget 0: step 2 (samples 8–15)" in done.stdout
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000001"]
    back = train(config, *spoilt, "--rollback")
    assert back.returncode == 70, back.stderr
    assert "going back to step-00000001, before the bad steps 2; passing over samples 8–15" in back.stdout
    assert "over bad_steps.budget 0: step 2 (samples 16–23)" in back.stdout


def test_a_rollback_needs_a_run_that_is_over_its_budget(copied: Path) -> None:
    done = train(copied / "run.yaml", "--rollback", "train.tokens=4096")
    assert done.returncode == 2
    assert "did not stop over its budget of bad steps; --resume continues it" in done.stderr


@pytest.fixture(scope="module")
def finished(prepared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with a checkpoint after 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    values = {
        "run": {"dir": str(folder / "run")},
        "model": {"vocab_size": 384, "d_model": 32, "n_layers": 2, "qk_dim": 16, "chunk_size": 16},
        "data": {"path": str(prepared_data), "seq_len": 64},
        "train": {"tokens": 2048, "tokens_per_step": 512, "micro_batch": 2, "precision": "fp32", "zero_stage": 2},
        "checkpoint": {"every_tokens": 1024},
    }
    (folder / "run.yaml").write_text(json.dumps(values))
    done = train(folder / "run.yaml")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoilt."""
    shutil.copytree(finished, tmp_path / "copy")
    (tmp_path / "copy" / "run.yaml").write_text(
        (finished / "run.yaml").read_text().replace(str(finished), str(tmp_path / "copy"))
    )
    return tmp_path / "copy"


def test_a_finished_run_says_so(finished: Path) -> None:
    assert json.loads((finished / "run/DONE").read_text()) == {"step": 4, "tokens": 2048}
    done = train(finished / "run.yaml", "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing to do" in done.stdout


def test_a_run_is_not_overwritten(finished: Path) -> None:
    before = sorted(str(path) for path in finished.rglob("*"))
    done = train(finished / "run.yaml")
    assert done.returncode == 2
    assert "already holds a run" in done.stderr
    assert "--resume" in done.stderr
    assert sorted(str(path) for path in finished.rglob("*")) == before


def test_a_checkpoint_of_another_model(finished: Path) -> None:
    done = train(finished / "run.yaml", "--resume", "train.tokens=4096", "model.d_model=64", "data.seq_len=128")
    assert done.returncode == 2
    message = done.stderr.split("error: ")[-1]
    assert "model.d_model: 32 in the checkpoint, 64 now" in message
    assert "data.seq_len: 64 in the checkpoint, 128 now" in message
    assert (finished / "run/DONE").exists()


def test_other_data_is_refused_with_what_changed(finished: Path, prepared_data: Path) -> None:
    before = sorted(str(path) for path in finished.rglob("*"))
    parts = f"[{{path: {prepared_data}, weight: 9}}, {{path: {prepared_data}, split: valid}}]"
    done = train(finished / "run.yaml", "--resume", "train.tokens=4096", "data.path=null", f"data.mixture={parts}")
    assert done.returncode == 2
    message = done.stderr.split("error: ")[-1]
    digest = json.loads((prepared_data / "manifest.json").read_text())["digest"]
    assert f"digest was {digest}, now " in message
    assert f"gone: data: train of {digest[:16]}, 1/1 of the samples" in message
    assert f"new: data-valid: valid of {digest[:16]}, 1/10 of the samples" in message
    done = train(finished / "run.yaml", "--resume", "train.tokens=4096", "data.split=valid")
    assert done.returncode == 2
    assert "data.split: train in the checkpoint, valid now" in done.stderr
    assert sorted(str(path) for path in finished.rglob("*")) == before


def test_damage_that_shows_while_reading_ends_the_run(config: Path, prepared_data: Path, tmp_path: Path) -> None:
    """It is met in the thread that prepares batches: the step that waits for them says it, and nothing hangs."""
    shutil.copytree(prepared_data, tmp_path / "data")
    index = tmp_path / "data/train/shard-00000.idx"
    index.write_bytes(b"X" + index.read_bytes()[1:])
    done = train(config, f"data.path={tmp_path / 'data'}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.split("error: ")[-1] == f"{index}: not an index of Megatron's version 1\n"
    last = (tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["status"] == "FAILED"


def test_a_manifest_holds_what_conversion_needs(finished: Path) -> None:
    manifest = json.loads((finished / "run/checkpoints/step-00000004/manifest.json").read_text())
    assert (manifest["step"], manifest["tokens"], manifest["world_size"], manifest["zero_stage"]) == (4, 2048, 1, 2)
    assert manifest["data"]["next_sample"] == 32
    (decayed, others) = manifest["layout"]["groups"]
    names = {p["name"]: p["shape"] for group in (decayed, others) for p in group["parameters"]}
    assert names["layers.0.contract.weight"] == [32, 64]
    assert sum(decayed["parameters"][0]["shape"]) > 0
    for group in (decayed, others):
        sizes = [prod(p["shape"]) for p in group["parameters"]]
        assert group["partition_numel"] >= sum(sizes)
    assert {"model/model.safetensors", "rng/rank-0.pt"} <= manifest["files"].keys()
    assert any(name.endswith("optim_states.pt") for name in manifest["files"])


def prod(numbers: list[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(copied: Path, damage: str) -> None:
    newest = copied / "run/checkpoints/step-00000004"
    (victim,) = (newest / "deepspeed").glob("*optim_states.pt")
    if damage == "flip":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        os.truncate(victim, 100)
    elif damage == "remove":
        victim.unlink()
    else:
        victim = newest / "manifest.json"
        text = victim.read_text()
        victim.unlink()
        if damage == "manifest":
            victim.write_text(text.replace('"tokens": 2048', '"tokens": 2049'))
    done = train(copied / "run.yaml", "--resume", "train.tokens=2560")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step-00000004 passed over") == done.stdout.count("passed over") == 1
    assert victim.name in done.stdout
    assert "continuing from step-00000002" in done.stdout
    assert json.loads((copied / "run/DONE").read_text())["step"] == 5


def test_a_checkpoint_that_cannot_be_written_costs_nothing(copied: Path) -> None:
    settings = ["--resume", "train.tokens=3072", "checkpoint.every_tokens=512"]
    done = train(copied / "run.yaml", *settings, largest_file=100_000)
    assert done.returncode not in (0, 2, 75), done.stdout
    assert "OSError: rank 0 could not write" in done.stderr
    assert "File too large" in done.stderr
    checkpoints = copied / "run/checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000002", "step-00000004"]
    assert (checkpoints / "latest").read_text() == "step-00000004\n"
    done = train(copied / "run.yaml", *settings)
    assert done.returncode == 0, done.stderr
    assert "continuing from step-00000004" in done.stdout
    assert "training stood still for" in done.stdout
    assert (checkpoints / "latest").read_text() == "step-00000006\n"
    assert not list(checkpoints.glob(".*"))


def test_a_resumed_run_obeys_its_settings_and_keeps_what_it_was_resumed_from(copied: Path, prepared_data: Path) -> None:
    checkpoints = copied / "run/checkpoints"
    for left in (".deleting-step-00000001", ".writing-step-00000003"):
        shutil.copytree(checkpoints / "step-00000002", checkpoints / left)
    rules = ["keep=1", "keep_every_steps=5", "keep_best=valid", "every_tokens=512"]
    validation = f"data.validation.valid={{path: {prepared_data}, split: valid}}"
    settings = [*(f"checkpoint.{rule}" for rule in rules), "evaluate.every_tokens=512", validation, "train.tokens=4608"]
    settings += ["optimizer.betas=[0.5, 0.6]", "optimizer.eps=1e-4", "optimizer.weight_decay=0.3"]
    done = train(copied / "run.yaml", "--resume", *settings)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (copied / "run/metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["metrics"]["valid/loss"] for r in records if "valid/loss" in r.get("metrics", {})}
    assert list(losses) == [5, 6, 7, 8, 9]
    expected = {4, 5, 9, min(losses, key=lambda step: losses[step])}
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "latest",
        *(f"step-{step:08d}" for step in sorted(expected)),
    ]
    assert (checkpoints / "latest").read_text() == "step-00000009\n"
    # DeepSpeed's files have the settings of the run that wrote them; those of this start count.
    (states,) = (checkpoints / "step-00000009/deepspeed").glob("*optim_states.pt")
    saved = torch.load(states, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]
    found = [(tuple(group["betas"]), group["eps"], group["weight_decay"]) for group in saved]
    assert found == [((0.5, 0.6), 1e-4, 0.3), ((0.5, 0.6), 1e-4, 0.0)]


def test_copies_are_made_and_a_failing_place_does_not_end_the_run(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = ["train.tokens=3072", "checkpoint.every_tokens=512", f"checkpoint.copy_to={tmp_path}/file/below"]
    done = train(copied / "run.yaml", "--resume", *settings)
    assert done.returncode == 0, done.stderr
    assert "warning: step-00000005 was not copied" in done.stdout
    (last,) = [line for line in done.stdout.splitlines() if "not copied to" in line and "next start" in line]
    assert last.startswith(f"warning: not copied to {tmp_path}/file/below: step-00000004, step-00000005, step-00000006")
    place = tmp_path / "place"
    settings = ["train.tokens=3584", f"checkpoint.copy_to={place}"]
    done = train(copied / "run.yaml", "--resume", *settings)
    assert done.returncode == 0, done.stderr
    assert "not copied" not in done.stdout
    checkpoints = copied / "run/checkpoints"
    assert {"step-00000007", "step-00000006"} <= {path.name for path in place.iterdir()}
    for checkpoint in checkpoints.glob("step-*"):
        for path in [path for path in checkpoint.rglob("*") if path.is_file()]:
            assert (place / path.relative_to(checkpoints)).read_bytes() == path.read_bytes()


def test_without_a_usable_checkpoint_nothing_is_started(copied: Path) -> None:
    for checkpoint in (copied / "run/checkpoints").glob("step-*"):
        (checkpoint / "manifest.json").unlink()
    done = train(copied / "run.yaml", "--resume", "train.tokens=2560")
    assert done.returncode == 2
    assert "nothing to resume from" in done.stderr


STILL = ["optimizer.lr=1e-30", "train.tokens=512"]
"""One step that leaves weights as they are."""


def test_a_run_starts_from_anothers_weights(finished: Path, tmp_path: Path) -> None:
    origin, run = finished / "run/checkpoints/step-00000002", tmp_path / "run"
    settings = [f"run.dir={run}", "data.seq_len=128", "train.zero_stage=3", *STILL]
    done = train(finished / "run.yaml", *settings, f"run.init_from={origin}")
    assert done.returncode == 0, done.stderr
    assert f"starting from the weights of {origin}, 1,024 tokens old" in done.stdout
    checkpoint = run / "checkpoints/step-00000001"
    weights, expected = (load_file(path / "model/model.safetensors") for path in (checkpoint, origin))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    manifest = read_manifest(checkpoint)
    assert manifest["data"]["next_sample"] == 4
    assert {record.step for record in Records(checkpoint, manifest)} == {1}, "the optimizer is not a fresh one"
    # Resumed, it does not ask for the checkpoint that it was started from.
    done = train(
        finished / "run.yaml", *settings, "train.tokens=1024", f"run.init_from={tmp_path / 'gone'}", "--resume"
    )
    assert done.returncode == 0, done.stderr
    assert "continuing from step-00000001" in done.stdout


def test_weights_that_do_not_fit(finished: Path, tmp_path: Path) -> None:
    settings = [f"run.dir={tmp_path / 'new'}", f"run.init_from={finished / 'run'}", *STILL]
    done = train(finished / "run.yaml", *settings, "model.d_model=64", "model.n_layers=1", "model.rope_base=500.0")
    assert done.returncode == 2
    message = done.stderr.split("error: ")[-1]
    assert f"run.init_from: the weights of {finished / 'run/checkpoints/step-00000004'} do not fit:" in message
    assert "embedding.weight: [384, 32] in the checkpoint, [384, 64] in this run" in message
    assert "set model.d_model: 64 to the checkpoint's: 32" in message
    assert "set model.n_layers: 1 to the checkpoint's: 2" in message
    assert "rope_base" not in message
    assert not (tmp_path / "new").exists()


def test_an_origin_that_is_none(finished: Path, copied: Path, tmp_path: Path) -> None:
    for path in (copied / "run/checkpoints").glob("step-*/model/model.safetensors"):
        os.truncate(path, 100)
    for origin, expected in [
        (tmp_path / "none", "manifest.json is missing"),
        (copied / "run", "holds no usable checkpoint; name another run"),
        (copied / "run/checkpoints/step-00000002", "model.safetensors has 100 bytes instead of"),
    ]:
        done = train(finished / "run.yaml", f"run.dir={tmp_path / 'new'}", f"run.init_from={origin}", *STILL)
        assert done.returncode == 2
        assert "run.init_from: " in done.stderr
        assert expected in done.stderr
        assert not (tmp_path / "new").exists()


def test_weights_of_another_tokenizer_are_refused(finished: Path) -> None:
    checkpoint = finished / "run/checkpoints/step-00000004"
    manifest = read_manifest(checkpoint)
    model = ModelConfig(**manifest["config"]["model"])
    _check_fits(checkpoint, model, manifest["tokenizer_sha256"])
    with pytest.raises(UserError, match=r"run\.init_from: .* another tokenizer .* content\.tokenizer\.path"):
        _check_fits(checkpoint, model, "0" * 64)


def test_a_second_trainer_is_kept_out(copied: Path) -> None:
    shutil.rmtree(copied / "run/checkpoints")  # a run that is not there yet must not be taken for a lost one
    config = load_run_config(copied / "run.yaml")
    with open(copied / "run/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = train(copied / "run.yaml", "--resume", "train.tokens=2560")
        with pytest.raises(UserError, match="in use by another trainer"):
            RunDirectory(copied / "run").open(config, {})
    assert done.returncode == 2
    assert "in use by another trainer" in done.stderr
    assert "delete" not in done.stderr
    assert (copied / "run/DONE").exists()


def test_a_port_that_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"MASTER_PORT: port {port} is in use .*--master_port"):
            start_processes()
