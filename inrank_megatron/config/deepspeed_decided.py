"""What the settings of a run decide of DeepSpeed's configuration, by DeepSpeed's keys.

A user's JSON must agree with all of it; the engine passes on the rest of the JSON alone.
"""

import math
from collections.abc import Mapping
from typing import Any

from inrank_megatron.config.deepspeed_values import lookup
from inrank_megatron.config.schema import Config, TrainingConfig
from inrank_megatron.config.topology import Topology

Decided = Mapping[str, tuple[Any, str]]
"""DeepSpeed key -> (the run's value, the setting that it comes from)."""
DECAY_STYLES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
# DeepSpeed's name of each optimizer, and of its options those that are fixed.
OPTIMIZERS = {
    "adamw": ("AdamW", {"torch_adam": True}),
    "fused-adam": ("AdamW", {"torch_adam": False}),
    "cpu-adam": ("AdamW", {"torch_adam": False}),
    "apex-fused-adam": ("AdamW", {"torch_adam": False}),
    "sgd": ("SGD", {}),
}
ADAMW = {"adam_w_mode": True, "amsgrad": False, "bias_correction": True}
SETTINGS = {
    "lr": "lr",
    "betas": "adam_beta1, adam_beta2",
    "eps": "adam_eps",
    "weight_decay": "weight_decay",
    "momentum": "sgd_momentum",
}
# What the schedule of the run always is.
WARMUP = {
    "scheduler.params.warmup_min_lr": (0.0, "warm-up"),
    "scheduler.params.warmup_min_ratio": (0.0, "warm-up"),
    "scheduler.params.warmup_type": ("linear", "warm-up"),
}


def decided(config: Config, topology: Topology) -> dict[str, tuple[Any, str]]:
    """All but the schedule."""
    optimizer, training, parallel = config.optimizer, config.training, config.parallel
    name, fixed = OPTIMIZERS[optimizer.optimizer]
    options: dict[str, Any] = dict(fixed)
    if name == "AdamW":
        options |= ADAMW | {"betas": [optimizer.adam_beta1, optimizer.adam_beta2], "eps": optimizer.adam_eps}
    else:
        options |= {"momentum": optimizer.sgd_momentum, "nesterov": False, "dampening": 0.0}
    options |= {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
    return {
        "train_batch_size": (topology.global_batch_size, "global_batch_size"),
        "train_micro_batch_size_per_gpu": (training.micro_batch_size, "micro_batch_size"),
        "gradient_accumulation_steps": (topology.accumulation_steps, "accumulation"),
        "gradient_clipping": (optimizer.clip_grad, "clip_grad"),
        "bf16.enabled": (training.bf16, "bf16"),
        "bfloat16.enabled": (training.bf16, "bf16"),
        "bf16.check_grad_overflow": (True, "stop at a gradient that is not finite"),
        "bfloat16.check_grad_overflow": (True, "stop at a gradient that is not finite"),
        "fp16.enabled": (training.fp16, "fp16"),
        **(_fp16(training) if training.fp16 else {}),
        "data_types.grad_accum_dtype": ("fp32", "gradient accumulation"),
        "zero_optimization.compute_grad_norm": (True, "stop at a gradient that is not finite"),
        "zero_optimization.stage": (parallel.zero_stage, "zero_stage"),
        "zero_optimization.offload_optimizer.device": (
            "cpu" if parallel.offload_optimizer else "none",
            "offload_optimizer",
        ),
        **{
            f"optimizer.params.{key}": (value, SETTINGS.get(key, f"optimizer {name}"))
            for key, value in options.items()
        },
    }


def _fp16(training: TrainingConfig) -> dict[str, tuple[Any, str]]:
    return {
        "fp16.loss_scale": (0, "dynamic loss scaling"),
        "fp16.initial_scale_power": (round(math.log2(training.initial_loss_scale)), "initial_loss_scale, 2^"),
        "fp16.loss_scale_window": (training.loss_scale_window, "loss_scale_window"),
        "fp16.hysteresis": (training.hysteresis, "hysteresis"),
        "fp16.min_loss_scale": (1, "smallest loss scale"),
    }


def decided_of_schedule(given: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, str]]:
    """The schedule, where the JSON has one; the run itself sets the learning rate."""
    if lookup(given, "scheduler.type") in (None, "auto"):
        return {}
    optimizer = config.optimizer
    return {
        "scheduler.params.warmup_num_steps": (optimizer.lr_warmup_iters, "lr_warmup_iters"),
        "scheduler.params.total_num_steps": (config.decay_iters, "lr_decay_iters"),
        "scheduler.params.warmup_max_lr": (optimizer.lr, "lr"),
        "scheduler.params.cos_min_ratio": (optimizer.min_lr / (optimizer.lr or 1.0), "min_lr / lr"),
        **WARMUP,
    }
