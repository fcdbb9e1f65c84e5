"""Parameter groups, AdamW and the DeepSpeed configuration of a run. The only caller of
``deepspeed.initialize``.
"""

import copy

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from torch import nn

from inrank_megatron.config import Config
from inrank_megatron.engine import zero_state
from inrank_megatron.errors import UserError
from inrank_megatron.layers.factorised import FactorisedLinear
from inrank_megatron.parallel import DeepSpeedMPU, Parallel


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trained parameters in up to three named groups, each with its own step count in Adam.

    ``factors``: U and V of factorised linears, with decay; apart from the rest, because the switch restarts
    their bias correction alone. ``decay``: other matrices. ``no_decay``: biases and norms.
    """
    factors = {id(p) for m in model.modules() if isinstance(m, FactorisedLinear) for p in (m.U, m.V)}
    groups: dict[str, list] = {"factors": [], "decay": [], "no_decay": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            name = "factors" if id(parameter) in factors else "decay" if parameter.dim() > 1 else "no_decay"
            groups[name].append(parameter)
    return [
        {"name": name, "params": params, "weight_decay": 0.0 if name == "no_decay" else weight_decay}
        for name, params in groups.items()
        if params
    ]


def deepspeed_config(config: Config, *, accumulation: int, extra: dict | None = None) -> dict:
    """The DeepSpeed JSON of the run. ``extra``: what of a user's file is passed through
    (``deepspeed_json.py``).
    """
    own = {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.clip_grad,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": config.training.bf16},
        "steps_per_print": 2**31,
    }
    if config.training.bf16:
        own["data_types"] = {"grad_accum_dtype": "fp32"}
    merged = dict(extra or {})
    for key, value in own.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def start_deepspeed(
    model: nn.Module, config: Config, parallel: Parallel, *, accumulation: int, extra: dict | None = None
):
    """``model`` under a DeepSpeed engine with AdamW whose state exists from the start."""
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optimizer.weight_decay),
        lr=config.optimizer.lr,
        betas=(config.optimizer.adam_beta1, config.optimizer.adam_beta2),
        eps=config.optimizer.adam_eps,
        fused=True,
    )
    settings = deepspeed_config(config, accumulation=accumulation, extra=extra)
    try:
        DeepSpeedConfig(copy.deepcopy(settings), DeepSpeedMPU(parallel))
    except (ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:
        raise UserError(
            f"DeepSpeed refuses its configuration: {' '.join(str(error).split())}; mend the file given with "
            "--deepspeed_config"
        ) from error
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        mpu=DeepSpeedMPU(parallel),
        dist_init_required=False,
        config=settings,
    )
    zero_state.create_adam_state(engine.optimizer)
    return engine


def stop_deepspeed(engine) -> None:
    """Release an engine's hooks and references. ``destroy`` alone leaves the engine's own module hooks
    behind.
    """
    for hook in ("module_forward_pre_hook", "module_forward_post_hook"):
        if (handle := getattr(engine, hook, None)) is not None:
            handle.remove()
    engine.destroy()
