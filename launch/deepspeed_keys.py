"""The keys of DeepSpeed 0.19.8's configuration: those that a `deepspeed:` section may set, with their types, and those
that it may not, with the reason.

Frozen here so that a config is checked without importing DeepSpeed; a test compares it with the installed one.
"""

from typing import Any

ANY = object
"""A value that is not checked here."""

OFFLOAD = {
    "buffer_count": int,
    "nvme_path": str,
    "pin_memory": bool,
}
ACCEPTED: dict[str, Any] = {
    "aio": {
        "block_size": int,
        "intra_op_parallelism": int,
        "overlap_events": bool,
        "queue_depth": int,
        "single_submit": bool,
        "use_gds": bool,
    },
    "checkpoint": {
        "parallel_write": {"pipeline_stage": bool},
        "tag_validation": str,
        "use_node_local_storage": bool,
    },
    "comms_logger": {"debug": bool, "enabled": bool, "prof_all": bool, "prof_ops": list, "verbose": bool},
    "communication_data_type": str,
    "data_types": {"buffer_dtype": str, "grad_accum_dtype": str, "keep_in_fp32_modules": ANY},
    "disable_allgather": bool,
    "dump_state": bool,
    "flops_profiler": {
        "detailed": bool,
        "enabled": bool,
        "module_depth": int,
        "output_file": str,
        "profile_step": int,
        "recompute_fwd_factor": float,
        "top_modules": int,
    },
    "gradient_predivide_factor": float,
    "log_level": str,
    "memory_breakdown": bool,
    "prescale_gradients": bool,
    "steps_per_print": int,
    "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    "wall_clock_breakdown": bool,
    "zero_allow_untested_optimizer": bool,
    "zero_optimization": {
        "allgather_bucket_size": int,
        "allgather_partitions": bool,
        "contiguous_gradients": bool,
        "enable_sanity_checks": bool,
        "ignore_unused_parameters": bool,
        "leaf_module": {"classes": list, "name_suffixes": list, "names": list},
        "load_from_fp32_weights": bool,
        "log_trace_cache_warnings": bool,
        "memory_efficient_linear": bool,
        "offload_optimizer": {
            **OFFLOAD,
            "device": str,
            "fast_init": bool,
            "pipeline_read": bool,
            "pipeline_write": bool,
        },
        "offload_param": {**OFFLOAD, "buffer_size": int, "device": str, "max_in_cpu": int},
        "overlap_comm": bool,
        "override_module_apply": bool,
        "parameter_alignment": bool,
        "reduce_bucket_size": int,
        "reduce_scatter": bool,
        "round_robin_gradients": bool,
        "stage3_allgather_sequential": bool,
        "stage3_max_live_parameters": int,
        "stage3_max_reuse_distance": int,
        "stage3_model_persistence_threshold": int,
        "stage3_module_granularity_threshold": int,
        "stage3_param_persistence_threshold": int,
        "stage3_prefetch_bucket_size": int,
        "stage3_use_all_reduce_for_fetch_params": bool,
        "sub_group_size": int,
        "use_multi_rank_bucket_allreduce": bool,
        "zero_hpz_partition_size": int,
        "zero_quantized_gradients": bool,
        "zero_quantized_nontrainable_weights": bool,
        "zero_quantized_weights": bool,
    },
}

_UNKNOWN_HERE = "this project's handling of bad steps and checkpoints does not know it; delete it"
_OPTIMIZER_OTHER = "of another optimizer than this project's AdamW; delete it"


def _use(key: str) -> str:
    return f"set by this project; use {key} instead"


REFUSED = {
    "activation_checkpointing": "without effect; use train.activation_checkpointing instead",
    "bf16": _use("train.precision"),
    "bfloat16": _use("train.precision"),
    "checkpoint.load_universal": _use("run.resume"),
    "csv_monitor": _use("tracking"),
    "data_types.param_dtype": _use("train.precision"),
    "fp16": _use("train.precision"),
    "gradient_accumulation_steps": _use("train.tokens_per_step"),
    "gradient_clipping": _use("optimizer.gradient_clip"),
    "managed_gradient_accumulation": _use("train.tokens_per_step"),
    "monitor_config": _use("tracking"),
    "optimizer": _use("optimizer"),
    "scheduler": _use("schedule"),
    "tensorboard": _use("tracking"),
    "torch_autocast": _use("train.precision"),
    "train_batch_size": _use("train.tokens_per_step"),
    "train_micro_batch_size_per_gpu": _use("train.micro_batch"),
    "wandb": _use("tracking"),
    "zero_force_ds_cpu_optimizer": _use("train.offload"),
    "zero_optimization.compute_grad_norm": "the norm is always computed; delete it",
    "zero_optimization.cpu_offload": f"deprecated; {_use('train.offload')}",
    "zero_optimization.cpu_offload_param": f"deprecated; {_use('train.offload')}",
    "zero_optimization.cpu_offload_use_pin_memory": "deprecated; set offload_optimizer.pin_memory instead",
    "zero_optimization.elastic_checkpoint": "checkpoints of this project load at any world size; delete it",
    "zero_optimization.legacy_stage1": "DeepSpeed raises an error for it; delete it",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _OPTIMIZER_OTHER,
    "zero_optimization.offload_optimizer.ratio": _UNKNOWN_HERE,
    "zero_optimization.offload_optimizer.super_offload": _UNKNOWN_HERE,
    "zero_optimization.pipeline_loading_checkpoint": _UNKNOWN_HERE,
    "zero_optimization.save_muon_momentum_buffer_in_memory": _OPTIMIZER_OTHER,
    "zero_optimization.stage": _use("train.zero_stage"),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _use("checkpoint.export_model"),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _use("checkpoint.export_model"),
    "zero_optimization.zenflow": _UNKNOWN_HERE,
}

REMOVED = {
    "aio.thread_count",
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
    "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.mics_shard_size",
    "zero_optimization.zeropp_loco_param",
}

SHORT_NAMES = {
    "gather_16bit_weights_on_model_save",
    "allgather_sequential",
    "max_live_parameters",
    "max_reuse_distance",
    "model_persistence_threshold",
    "module_granularity_threshold",
    "param_persistence_threshold",
    "prefetch_bucket_size",
    "use_all_reduce_for_fetch_params",
}
"""Keys of zero_optimization that DeepSpeed also takes without stage3_ in front; here they have one name."""
