"""Parameter groups and the DeepSpeed configuration of a run. The only caller of ``deepspeed.initialize``."""

import copy
import inspect
import math
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import nn

from inrank_megatron.config.costs import (
    LARGEST_BUCKET,
    overlaps_reductions,
    reduction_bucket,
    zero_stage_in_use,
)
from inrank_megatron.config.schema import Config
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine.deepspeed_mpu import DeepSpeedMPU
from inrank_megatron.engine.optimizers import build_optimizer, kind_of, rule_of
from inrank_megatron.engine.orthogonalised import OrthogonalisedMomentum
from inrank_megatron.engine.overlap import await_reductions_on_the_device, bf16_as_other_precisions
from inrank_megatron.engine.step_report import leave_overflow_to_the_norm
from inrank_megatron.engine.zero_state import MasterWeights
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.layers.factorised import FactorisedLinear
from inrank_megatron.model.vocabulary import OF_THE_VOCABULARY


def parameter_groups(model: nn.Module, config: Config) -> list[dict]:
    """Trained parameters in up to four named groups, each with its own step count in Adam, with the multiple
    of the learning rate, ``lr_multiplier``, that it trains at, and with its ``rule``.

    ``factors``: U and V of factorised linears, with decay; apart from the rest, because the switch restarts
    their bias correction alone. ``matrices``: weights of other linears, with decay, where they have a rule of
    their own. ``decay``: other matrices. ``no_decay``: biases and norms.
    """
    factors = {id(p) for m in model.modules() if isinstance(m, FactorisedLinear) for p in (m.U, m.V)}
    groups: dict[str, list] = {"factors": [], "matrices": [], "decay": [], "no_decay": []}
    linears = "matrices" if rule_of(config, "matrices") != "adamw" else "decay"
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in factors:
            group = "factors"
        elif parameter.dim() == 1:
            group = "no_decay"
        else:  # but for those of the vocabulary, what tensor parallelism shards are linears
            sharded = getattr(parameter, "tensor_model_parallel", False)
            group = linears if sharded and name not in OF_THE_VOCABULARY else "decay"
        groups[group].append(parameter)
    settings = config.optimizer
    return [
        {
            "name": name,
            "params": params,
            "rule": rule_of(config, name),
            "weight_decay": 0.0 if name == "no_decay" else settings.weight_decay,
            "lr_multiplier": settings.factor_lr_multiplier if name == "factors" else 1.0,
        }
        for name, params in groups.items()
        if params
    ]


def deepspeed_config(
    config: Config,
    *,
    accumulation: int,
    trained: int,
    largest: int,
    replicas: int,
    device: torch.device,
    extra: dict | None = None,
) -> dict:
    """The DeepSpeed JSON of the run.

    Args:
        trained, largest: entries of this rank's shards of all trained parameters, and of the largest.
        replicas: the data-parallel size.
        device: what the run trains on.
        extra: what of a user's file is passed through (``config/deepspeed_json.py``).
    """
    stage = zero_stage_in_use(config, replicas)
    half = config.training.bf16 or config.training.fp16
    zero = (extra or {}).get("zero_optimization", {})
    overlapping = stage > 0 and overlaps_reductions(config, device.type)
    bucket = zero.get("reduce_bucket_size", reduction_bucket(trained, largest, overlapping=overlapping))
    unless_asked: dict[str, Any] = {
        "zero_optimization": {"reduce_bucket_size": bucket},
        # It waits for the device around every micro-batch, and nothing uses its figures.
        "timers": {"throughput": {"enabled": False}},
    }
    if overlapping and int(bucket) >= largest:  # `reduction_bucket` says why
        unless_asked["zero_optimization"]["overlap_comm"] = True
    own: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # In FP32 without ZeRO the engine clips by the norm that it computes itself.
        "gradient_clipping": config.optimizer.clip_grad if stage or half else 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # SGD, whose state it keeps as it keeps Adam's
        "bf16": {"enabled": config.training.bf16},
        "fp16": _fp16(config),
        "steps_per_print": 2**31,
    }
    if config.parallel.offload_optimizer:
        if device.type != "cpu":
            unless_asked["zero_optimization"]["offload_optimizer"] = {"pin_memory": True}  # or copies wait
        own["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        own["zero_force_ds_cpu_optimizer"] = False  # the run names its optimizer itself
    if stage and half:
        own["data_types"] = {"grad_accum_dtype": "fp32"}  # without ZeRO DeepSpeed cannot
    return _merged(_merged(unless_asked, extra or {}), own)


def _merged(below: dict, above: dict) -> dict:
    """``above`` over ``below``, section by section."""
    sections = {key: _merged(below.get(key, {}), v) for key, v in above.items() if isinstance(v, dict)}
    return below | above | sections


def _fp16(config: Config) -> dict:
    training = config.training
    return {
        "enabled": training.fp16,
        "loss_scale": 0,  # dynamic
        "initial_scale_power": int(math.log2(training.initial_loss_scale)),
        "loss_scale_window": training.loss_scale_window,
        "hysteresis": training.hysteresis,
        "min_loss_scale": 1,
    }


def check_deepspeed(config: Config, *, accumulation: int, extra: dict) -> None:
    """Raise UserError unless DeepSpeed takes the run's configuration with ``extra``, a user's, below it.
    Before anything expensive: no process group is needed.
    """
    settings = deepspeed_config(
        config,
        accumulation=accumulation,
        trained=LARGEST_BUCKET,
        largest=1,
        replicas=1,
        device=torch.device("cpu"),
        extra=extra,
    )
    try:
        DeepSpeedConfig(copy.deepcopy(settings))
    except Exception as error:  # what it raises for a wrong value depends on where it comes across it
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise UserError(
            f"DeepSpeed refuses its configuration: {reason}; correct the file given with --deepspeed-config"
        ) from error


def start_deepspeed(
    model: nn.Module, config: Config, parallel: Parallel, *, accumulation: int, extra: dict | None = None
):
    """``model`` under a DeepSpeed engine, and the FP32 side of its parameters.

    Each trained parameter carries that as ``parameter.master_weights``.
    """
    groups = parameter_groups(model, config)
    sizes = [parameter.numel() for group in groups for parameter in group["params"]]
    optimizer = build_optimizer(groups, config)
    settings = deepspeed_config(
        config,
        accumulation=accumulation,
        trained=sum(sizes),
        largest=max(sizes),
        replicas=parallel.dp_size,
        device=next(model.parameters()).device,
        extra=extra,
    )
    with bf16_as_other_precisions(settings["zero_optimization"]):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            mpu=DeepSpeedMPU(parallel),
            dist_init_required=False,
            config=settings,
        )
    if parallel.dp_size == 1 and engine.zero_optimization_stage() == 0:
        engine.enable_backward_allreduce = False  # it would copy every gradient to average it over one
    await_reductions_on_the_device(engine.optimizer)
    leave_overflow_to_the_norm(engine.optimizer)
    master_weights = MasterWeights(engine.optimizer, partial(kind_of, config), parallel.dp_group)
    if isinstance(optimizer, OrthogonalisedMomentum):
        optimizer.bind(model, master_weights.shard_map, parallel)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.master_weights = master_weights
    return engine, master_weights


def stop_deepspeed(engine) -> None:
    """Release an engine, its optimizer and its hold on the model's parameters.

    ``destroy`` alone leaves the engine's own module hooks behind. Under ZeRO 3 it leaves more: hooks of the
    autograd graph, which Python's collector does not see into, hold the optimizer, parameters hold it as
    methods, and a list and a cache of the library's hold the model.
    """
    for hook in ("module_forward_pre_hook", "module_forward_post_hook"):
        if (handle := getattr(engine, hook, None)) is not None:
            handle.remove()
    engine.destroy()
    parameters = list(engine.module.parameters())
    for holder in (*parameters, engine.optimizer, engine):
        vars(holder).clear()
    parameter_offload.FWD_MODULE_STACK.clear()
    wrapper = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(wrapper).nonlocals["func"].cache_clear()
