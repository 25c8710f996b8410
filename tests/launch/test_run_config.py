"""Mistakes in a run's config: all of them at once, each with its key and the way out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.config import accumulation_steps, component_name, load_run_config
from launch.deepspeed_config import deepspeed_config
from pipeline.credentials import redact
from pipeline.errors import UserError
from pipeline.masking import MaskedLM

WriteConfig = Callable[..., Path]


def test_overrides_and_resume(write_config: WriteConfig) -> None:
    config = load_run_config(write_config(), ["optimizer.lr=3e-3", "train.zero_stage=3"], resume=True)
    assert (config.optimizer.lr, config.train.zero_stage, config.run.resume) == (3e-3, 3, "must")
    assert config.run.dir.is_absolute()
    assert config.data.path is not None
    assert config.data.path.is_absolute()
    assert config.steps == 8
    assert config.samples_per_step == 8


def test_two_mistakes_are_reported_at_once(write_config: WriteConfig) -> None:
    path = write_config(train={"zero_stag": 1, "micro_batch": "two"}, model={"d_model": -1})
    with pytest.raises(UserError) as caught:
        load_run_config(path)
    message = str(caught.value)
    for expected in ("train.zero_stag", "zero_stage", "train.micro_batch", "two", "model.d_model", str(path)):
        assert expected in message


def test_what_does_not_fit_together_is_reported_at_once(write_config: WriteConfig) -> None:
    path = write_config(
        train={"tokens_per_step": 1000, "precision": "bf16", "zero_stage": 0},
        schedule={"kind": "wsd", "warmup_tokens": 10**9},
        deepspeed={"zero_optimisation": {"stage": 1}, "elasticity": {}, "gradient_clipping": 1.0},
    )
    with pytest.raises(UserError) as caught:
        load_run_config(path)
    message = str(caught.value)
    assert "train.tokens_per_step: 1,000 is not a multiple of" in message
    assert "896 or 1,024" in message
    assert "stage 1" in message
    assert "schedule.decay_tokens" in message
    assert "warm-up" in message
    assert "deepspeed.zero_optimisation: unknown key; did you mean zero_optimization?" in message
    assert "deepspeed.elasticity: removed" in message
    assert "deepspeed.gradient_clipping: set by this project; use optimizer.gradient_clip" in message


def test_a_batch_that_does_not_divide_lists_what_would(write_config: WriteConfig) -> None:
    config = load_run_config(write_config())
    assert [accumulation_steps(config, world) for world in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(UserError, match=r"384 or 768, or one of 1, 2, 4 processes"):
        accumulation_steps(config, 3)


def test_deepspeed_section_is_merged_last(write_config: WriteConfig) -> None:
    path = write_config(deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}}, optimizer={"gradient_clip": 0.0})
    settings = deepspeed_config(load_run_config(path, ["train.precision=bf16"]), 4)
    assert settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert settings["gradient_clipping"] == 0.0, "absent, DeepSpeed would clip at 1.0"
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["communication_data_type"] == "fp32"


def test_the_models_direction_and_what_it_predicts_must_fit(write_config: WriteConfig) -> None:
    with pytest.raises(UserError, match=r"model\.causal: false cannot .* set it to true, or set data\.masked_lm"):
        load_run_config(write_config(model={"causal": False}))
    with pytest.raises(UserError, match=r"data\.masked_lm: .* set model\.causal to false, or data\.masked_lm to null"):
        load_run_config(write_config(data={"masked_lm": {}}))
    config = load_run_config(write_config(model={"causal": False}, data={"masked_lm": {"fraction": 0.3}}))
    assert config.data.masked_lm == MaskedLM(fraction=0.3, mask=0.8, random=0.1)
    with pytest.raises(UserError, match=r"data\.masked_lm: mask 0\.95 and random 0\.1 add up to more than 1"):
        load_run_config(write_config(model={"causal": False}, data={"masked_lm": {"mask": 0.95}}))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"path": None}, "neither is given: set exactly one of data.path (one dataset) and data.mixture (several)"),
        ({"mixture": [{"path": "a"}]}, "both are given: set exactly one of data.path"),
        ({"path": None, "mixture": [{"path": "a"}], "split": "all"}, "data.split: belongs to data.path"),
        (
            {"path": None, "mixture": [{"path": "x/a"}, {"path": "y/a"}]},
            "two datasets are called a: give each a `name`",
        ),
        ({"path": None, "mixture": [{"path": "a", "weight": 0}]}, "data.mixture.0.weight"),
        ({"path": None, "mixture": [{"path": "a", "name": "b/c"}]}, "data.mixture.0.name"),
        ({"path": None, "mixture": []}, "data.mixture"),
        ({"prefetch": -1}, "data.prefetch"),
    ],
)
def test_what_data_cannot_be(write_config: WriteConfig, data: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_run_config(write_config(data=data))
    assert expected in str(caught.value)


def test_a_mixture_comes_back_from_what_a_run_writes(write_config: WriteConfig, tmp_path: Path) -> None:
    parts = [{"path": "a", "weight": 0.7}, {"path": "b/a", "split": "more", "weight": 0.3}]
    config = load_run_config(write_config(data={"path": None, "mixture": parts}))
    assert [component_name(part) for part in config.data.components] == ["a", "a-more"]
    assert all(part.path.is_absolute() for part in config.data.components)
    (tmp_path / "written.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_run_config(tmp_path / "written.yaml") == config


def test_a_window_longer_than_flash_quad_reads(write_config: WriteConfig) -> None:
    with pytest.raises(UserError, match=r"model\.norm_length: 32 is shorter than data\.seq_len 64"):
        load_run_config(write_config(model={"architecture": "flash_quad", "norm_length": 32}))


def test_passwords_are_refused_and_not_shown(write_config: WriteConfig) -> None:
    path = write_config(
        tracking={"uri": "https://me:s3cret@host:5000/x"},
        checkpoint={"copy_to": "s3://bucket/x?access_key=s3cret"},
        deepspeed={"wall_clock_breakdown": False},
    )
    with pytest.raises(UserError) as caught:
        load_run_config(path)
    message = str(caught.value)
    assert "tracking.uri: https://***@host:5000/x: holds a password or token" in message
    assert "checkpoint.copy_to: s3://bucket/x?access_key=***: holds" in message
    assert "s3cret" not in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.betas=[0.9,1.5]", "optimizer.betas.1 (command line): Input should be less than 1; found 1.5"),
        ("optimizer.betas=[0.9]", "optimizer.betas (command line): too few values; found [0.9]"),
        ("optimizer.lr=.inf", "optimizer.lr (command line): Input should be a finite number; found inf"),
        ("tracking.uri=127.0.0.1:5000", "tracking.uri (command line): no address of an MLflow store: take http://"),
        ("tracking.uri=./mlruns", "no address of an MLflow store"),
        ("tracking.uri=sqlite://mlflow.db", "no address of an MLflow store"),
        ("tracking.uri=sqlite:///", "no address of an MLflow store"),
        ("tracking.experiment=''", "tracking.experiment (command line): String should have at least 1 character"),
        ("run.dir=runs/why?", "runs/why?: MLflow's sqlite file cannot lie there"),
        ("run.dir=runs/5%41", "runs/5%41: MLflow's sqlite file cannot lie there"),
        ("deepspeed.zero_optimization.sub_group_size=.inf", "sub_group_size: inf is not a whole number"),
        ("tracking.uri=htp://me:s3cret@host", "no address of an MLflow store: take http://HOST:PORT or sqlite:////"),
    ],
)
def test_values_that_would_fail_later(write_config: WriteConfig, override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_run_config(write_config(), [override])
    assert said in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_paths_do_not_depend_on_the_working_directory(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write_config().absolute()
    monkeypatch.chdir(tmp_path)
    assert load_run_config(path, ["tracking.uri=sqlite:///m.db"]).tracking.uri == f"sqlite:///{tmp_path / 'm.db'}"
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = ["tracking.uri=sqlite:///~/m.db", "run.dir=~/run", "run.init_from=~/old", "data.path=~/data"]
    config = load_run_config(path, [*paths, "data.validation.valid.path=~/valid"])
    assert config.tracking.uri == f"sqlite:///{tmp_path / 'm.db'}"
    found = (config.run.dir, config.run.init_from, config.data.path, config.data.validation["valid"].path)
    assert found == tuple(tmp_path / name for name in ("run", "old", "data", "valid"))
    assert load_run_config(path, ["run.dir=~nobody-has-it"]).run.dir == tmp_path / "~nobody-has-it"
    for uri in ("sqlite:////data/m.db", "http://host:5000", "postgresql+psycopg://host/mlflow", "databricks"):
        assert load_run_config(path, [f"tracking.uri={uri}"]).tracking.uri == uri


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:s3cret@host/mlflow", "postgresql://***@host/mlflow"),
        ("https://s3cret@host/a", "https://***@host/a"),
        ("see http://a:b@h and s3://k:v@bucket/x", "see http://***@h and s3://***@bucket/x"),
        ("https://host/f?sv=1&sig=s3cret&x=2", "https://host/f?sv=1&sig=***&x=2"),
        ("abfs://container@account.dfs.core.windows.net/a", None),
        ("sftp://me@host/a", None),
        ("http://127.0.0.1:5000", None),
        ("sqlite:////runs/a@b/mlflow.db", None),
    ],
)
def test_what_counts_as_a_password(text: str, shown: str | None) -> None:
    assert redact(text) == (shown or text)
