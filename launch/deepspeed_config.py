"""DeepSpeed's settings: derived from the run's config, with its `deepspeed:` section merged last and checked.

DeepSpeed 0.19.8 ignores unknown top-level keys in silence, so they are checked here. It checks nested ones itself.
"""

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.config import RunConfig

ACCEPTED = {
    "activation_checkpointing",
    "aio",
    "checkpoint",
    "comms_logger",
    "communication_data_type",
    "data_types",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "timers",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
}
OWNED = {
    "train_batch_size": "train.tokens_per_step",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.tokens_per_step",
    "managed_gradient_accumulation": "train.tokens_per_step",
    "gradient_clipping": "optimizer.gradient_clip",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "monitor_config": "tracking",
    "tensorboard": "tracking",
    "wandb": "tracking",
    "csv_monitor": "tracking",
}
REMOVED = {
    "amp",
    "compression_training",
    "curriculum_learning",
    "eigenvalue",
    "elasticity",
    "graph_harvesting",
    "nebula",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
    "sparse_gradients",
}


def lint_deepspeed(section: Mapping[str, Any]) -> list[str]:
    """Problems of a `deepspeed:` section, one line each: keys that are unknown, removed, or set elsewhere."""
    problems = []
    for key in section:
        if key in OWNED:
            problems.append(f"deepspeed.{key}: set by this project; use {OWNED[key]} instead")
        elif key in REMOVED:
            problems.append(f"deepspeed.{key}: removed from DeepSpeed 0.19.8; delete it")
        elif key not in ACCEPTED:
            close = difflib.get_close_matches(key, [*ACCEPTED, *OWNED], n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(ACCEPTED))}"
            problems.append(f"deepspeed.{key}: unknown key; {hint}")
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        problems.append(f"deepspeed.zero_optimization: {zero!r} is not a mapping of settings")
    elif "stage" in zero:
        problems.append("deepspeed.zero_optimization.stage: set by this project; use train.zero_stage instead")
    return problems


def deepspeed_config(config: "RunConfig", accumulation: int) -> dict[str, Any]:
    """DeepSpeed's settings for a run whose processes accumulate `accumulation` micro batches a step."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed clips at 1.0 when the key is absent.
        "gradient_clipping": config.optimizer.gradient_clip,
        "zero_optimization": _zero_optimization(config),
        "steps_per_print": None,
        # Without this, offload insists on DeepSpeed's own CPU Adam, a build of minutes.
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.train.precision == "bf16":
        # Left alone, DeepSpeed accumulates and reduces bf16 gradients in bf16.
        settings |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return _merged(settings, config.deepspeed)


def _zero_optimization(config: "RunConfig") -> dict[str, Any]:
    # DeepSpeed's default, five times that, takes 2 GB all the time and up to 4 GB while gradients are reduced.
    settings: dict[str, Any] = {"stage": config.train.zero_stage, "reduce_bucket_size": 100_000_000}
    if config.train.offload != "none":
        settings["offload_optimizer"] = {"device": "cpu"}
    if config.train.offload == "all":
        # Brought in again for backward: kept from forward, as by default, models of half a billion stay there whole.
        settings |= {"offload_param": {"device": "cpu"}, "stage3_max_reuse_distance": 0}
    return settings


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
