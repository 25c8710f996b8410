"""The `deepspeed:` section: what is refused before a device is used, and that the table is the installed version's."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from launch.config import load_run_config
from launch.deepspeed_config import deepspeed_config, lint_deepspeed
from launch.deepspeed_keys import ACCEPTED, REFUSED, REMOVED, SHORT_NAMES
from pipeline.errors import UserError

ZERO = ACCEPTED["zero_optimization"]


def keys_of(section: str) -> set[str]:
    """Keys that the table has in a section, refused ones included."""
    accepted = ACCEPTED
    for name in section.split("."):
        accepted = accepted[name]
    refused = {name.removeprefix(f"{section}.") for name in REFUSED if name.startswith(f"{section}.")}
    return set(accepted) | {name for name in refused if "." not in name}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"zero_optimization": {"reduce_buckt_size": 1}}, "reduce_buckt_size: unknown key; did you mean reduce_bucket"),
        ({"zero_optimization": {"offload_optimizer": {"pin_memry": True}}}, "offload_optimizer.pin_memry: unknown key"),
        ({"zero_optimization": {"offload_param": {"max_in_cp": 1}}}, "did you mean max_in_cpu?"),
        ({"zero_optimization": {"prefetch_bucket_size": 1}}, "did you mean stage3_prefetch_bucket_size?"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage: set by this project; use train.zero_stage"),
        (
            {"zero_optimization": {"cpu_offload": True}},
            "cpu_offload: deprecated; set by this project; use train.offload",
        ),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "device: cpu: only nvme is set here"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "mics_shard_size: removed from DeepSpeed 0.19.8"),
        ({"zero_optimization": {"overlap_comm": "yes"}}, "overlap_comm: 'yes' is not true or false"),
        ({"zero_optimization": {"sub_group_size": 1.5}}, "sub_group_size: 1.5 is not a whole number"),
        ({"zero_optimization": {"sub_group_size": "1e9"}}, "sub_group_size: '1e9' is not a whole number"),
        ({"zero_optimization": True}, "zero_optimization: True is not a mapping of settings"),
        ({"aio": {"thread_count": 2}}, "aio.thread_count: removed"),
        ({"aio": {"block_sise": 2}}, "aio.block_sise: unknown key; did you mean block_size?"),
        ({"comms_logger": {"enable": True}}, "comms_logger.enable: unknown key; did you mean enabled?"),
        ({"flops_profiler": {"profile_steps": 1}}, "did you mean profile_step?"),
        ({"timers": {"throughput": {"enabled": 1}}}, "timers.throughput.enabled: 1 is not true or false"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal: set by this project; use run.resume"),
        ({"activation_checkpointing": {}}, "without effect"),
        ({"data_types": {"param_dtype": "fp16"}}, "data_types.param_dtype: set by this project; use train.precision"),
    ],
)
def test_nested_mistakes_are_named(section: dict[str, Any], expected: str) -> None:
    (problem,) = lint_deepspeed(section)
    assert problem.startswith("deepspeed.")
    assert expected in problem


def test_what_is_right_passes() -> None:
    zero = {"reduce_bucket_size": 5e8, "overlap_comm": None, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}
    assert lint_deepspeed({"zero_optimization": zero, "flops_profiler": {"recompute_fwd_factor": 1}}) == []


def test_several_nested_mistakes_are_reported_at_once(write_config: Callable[..., Path]) -> None:
    section = {"zero_optimization": {"offload_param": {"pin": 1}, "stage": 1}, "aio": {"depth": 1}}
    with pytest.raises(UserError) as caught:
        load_run_config(write_config(deepspeed=section))
    for expected in ("offload_param.pin: unknown", "zero_optimization.stage: set by", "aio.depth: unknown"):
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"offload": "optimizer", "zero_stage": 0}, "train.offload: optimizer needs ZeRO"),
        ({"offload": "all", "zero_stage": 2}, r"train\.offload: all needs train\.zero_stage 3 \(it is 2\)"),
        ({"activation_checkpointing": [0, 2]}, "there is no layer 2; the 2 layers of the model are 0 to 1"),
        ({"activation_checkpointing": "some"}, r"train\.activation_checkpointing"),
        ({"activation_checkpointing": 0}, r"train\.activation_checkpointing"),
    ],
)
def test_memory_settings_that_cannot_be(
    write_config: Callable[..., Path], train: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        load_run_config(write_config(train=train))


@pytest.mark.parametrize(
    ("chosen", "layers"),
    [("none", []), ("all", [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (1, [0, 1, 2, 3, 4]), ([3, 1], [1, 3])],
)
def test_recomputed_layers(write_config: Callable[..., Path], chosen: Any, layers: list[int]) -> None:
    config = load_run_config(write_config(model={"n_layers": 5}, train={"activation_checkpointing": chosen}))
    assert sorted(config.recomputed_layers) == layers


def test_offload_becomes_deepspeeds(write_config: Callable[..., Path]) -> None:
    pinned = {"zero_optimization": {"offload_optimizer": {"pin_memory": False}}}
    config = load_run_config(write_config(train={"offload": "all", "zero_stage": 3}, deepspeed=pinned))
    zero = deepspeed_config(config, 1)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert zero["offload_param"] == {"device": "cpu"}


def test_the_table_is_of_the_installed_version() -> None:
    assert version("deepspeed").startswith("0.19.8"), "compare launch/deepspeed_keys.py with the new version"


def test_the_table_has_the_keys_and_types_of_the_installed_models() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    sections = {
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    }
    for section, model in sections.items():
        fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
        assert keys_of(section) == set(fields), section
        accepted = ACCEPTED
        for name in section.split("."):
            accepted = accepted[name]
        for key, kind in accepted.items():
            if kind in (bool, int, float, list):
                written = str(fields[key]).lower()
                assert kind.__name__ in written, f"{section}.{key}"
    short = {name for name, field in DeepSpeedZeroConfig.model_fields.items() if field.alias and field.alias != name}
    assert short == SHORT_NAMES


def test_the_table_has_the_keys_of_the_installed_sections_without_models() -> None:
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime import constants
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    assert keys_of("aio") == set(AIO_DEFAULT_DICT)
    assert keys_of("flops_profiler") == set(vars(DeepSpeedFlopsProfilerConfig({})))
    names = [constants.GRAD_ACCUM_DTYPE, constants.PARAM_DTYPE, constants.BUFFER_DTYPE, constants.KEEP_IN_FP32_MODULES]
    assert keys_of("data_types") == set(names)
    checkpoint = [constants.CHECKPOINT_TAG_VALIDATION, constants.LOAD_UNIVERSAL_CHECKPOINT]
    checkpoint += [constants.USE_NODE_LOCAL_STORAGE_CHECKPOINT, constants.CHECKPOINT_PARALLEL_WRITE]
    assert keys_of("checkpoint") == set(checkpoint)
    for key in ("wall_clock_breakdown", "memory_breakdown", "prescale_gradients", "steps_per_print", "dump_state"):
        assert key in ACCEPTED
        assert getattr(constants, key.upper()) == key
    assert not REMOVED & set(REFUSED)
