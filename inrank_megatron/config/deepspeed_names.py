"""The names that DeepSpeed looks for in its JSON. It skips others without a word, at the top level and in
some sections, so that a mistyped setting would be none.
"""

from typing import Any

_SCALARS = {
    **dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), int
    ),
    **dict.fromkeys(("steps_per_print", "vocabulary_size", "sequence_parallel_size", "autotp_size"), int),
    **dict.fromkeys(("gradient_clipping", "gradient_predivide_factor"), float),
    **dict.fromkeys(("gradient_allreduce_op", "log_level"), str),
    **dict.fromkeys(("communication_data_type", "seq_parallel_communication_data_type"), str),
    **dict.fromkeys(("dump_state", "disable_python_gc", "disable_allgather", "prescale_gradients"), bool),
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dataloader_drop_last"), bool),
    **dict.fromkeys(("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"), bool),
    **dict.fromkeys(("use_data_before_expert_parallelism", "graph_harvesting", "sparse_gradients"), bool),
    "managed_gradient_accumulation": bool,
}
# What DeepSpeed checks itself, takes as it is, or no longer takes at all.
_CHECKED = (
    "amp", "bf16", "bfloat16", "comet", "comms_logger", "compile", "compression_training", "csv_monitor",
    "curriculum_learning", "data_efficiency", "datastates_ckpt", "eigenvalue", "elasticity",
    "expert_parallel", "fp16", "hybrid_engine", "nebula", "optimizer", "pipeline", "progressive_layer_drop",
    "quantize_training", "scheduler", "sparse_attention", "tensor_parallel", "tensorboard", "torch_autocast",
    "wandb", "weight_quantization", "zero_optimization",
)  # fmt: skip
SECTIONS: dict[str, tuple[str, ...]] = {
    "activation_checkpointing": (
        "contiguous_memory_optimization", "cpu_checkpointing", "number_checkpoints", "partition_activations",
        "profile", "synchronize_checkpoint_boundary",
    ),
    "aio": (
        "block_size", "intra_op_parallelism", "overlap_events", "queue_depth", "single_submit", "use_gds",
    ),
    "autotuning": (
        "arg_mappings", "enabled", "end_profile_step", "exps_dir", "fast", "max_train_batch_size",
        "max_train_micro_batch_size_per_gpu", "metric", "metric_path", "min_train_batch_size",
        "min_train_micro_batch_size_per_gpu", "model_info", "model_info_path", "mp_size",
        "num_tuning_micro_batch_sizes", "overwrite", "results_dir", "start_profile_step",
        "tuner_early_stopping", "tuner_num_trials", "tuner_type",
    ),
    "checkpoint": (
        "checkpoint_serialization", "load_universal", "parallel_write", "tag_validation",
        "use_node_local_storage", "writer",
    ),
    "data_types": ("buffer_dtype", "grad_accum_dtype", "keep_in_fp32_modules", "param_dtype"),
    "flops_profiler": (
        "detailed", "enabled", "module_depth", "output_file", "profile_step", "recompute_fwd_factor",
        "top_modules",
    ),
    "timers": ("throughput",),
}  # fmt: skip
"""Sections of which DeepSpeed skips what it does not know, and the names in them."""
TOP_LEVEL: dict[str, type] = _SCALARS | dict.fromkeys((*_CHECKED, *SECTIONS), dict)
"""Name -> what its value is; DeepSpeed itself never looks at the type of one that is not a section."""


def is_of_type(name: str, value: Any) -> bool:
    """Whether a value at the top level can be meant; "auto" and null leave it to DeepSpeed or the run."""
    kind = TOP_LEVEL[name]
    if value in (None, "auto") or kind is dict:
        return True  # sections are looked at one by one
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float if kind is float else kind)
