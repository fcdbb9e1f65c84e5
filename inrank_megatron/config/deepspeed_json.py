"""A user's DeepSpeed JSON, checked against the run's own settings.

What the JSON says of the run's settings takes the place of their defaults and must agree with what the user
gave elsewhere; what would make it another run is refused; the rest (bucket sizes, logging, communication)
goes to DeepSpeed as it is.
"""

import copy
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from inrank_megatron.config.deepspeed_names import SECTIONS, TOP_LEVEL, is_of_type
from inrank_megatron.config.loading import nearest
from inrank_megatron.config.schema import Config, TrainingConfig
from inrank_megatron.config.topology import Topology
from inrank_megatron.errors import UserError
from inrank_megatron.pointers import refuse_pointer

DECAY_STYLES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
# Keys that change what is trained, or how, in ways that the method does not provide for yet.
UNAVAILABLE = (
    "amp.enabled",
    "bf16.bf16_master_weights_and_grads",
    "bf16.bf16_optimizer_states",
    "bfloat16.bf16_master_weights_and_grads",
    "bfloat16.bf16_optimizer_states",
    "fp16.auto_cast",
    "fp16.fp16_master_weights_and_grads",
    "autotp_size",
    "compression_training",
    "curriculum_learning.enabled",
    "data_efficiency.enabled",
    "elasticity.enabled",
    "pipeline",
    "progressive_layer_drop.enabled",
    "quantize_training.enabled",
    "sequence_parallel_size",
    "sparse_attention",
    "sparse_gradients",
    "tensor_parallel",
    "torch_autocast.enabled",
    "zero_optimization.cpu_offload",
    "zero_optimization.mics_shard_size",
    "zero_optimization.offload_param",
    "zero_optimization.zero_hpz_partition_size",
    "zero_optimization.zero_quantized_gradients",
    "zero_optimization.zero_quantized_weights",
)
OWNED = ("optimizer", "scheduler")
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
FIXED = {
    "scheduler.params.warmup_min_lr": 0.0,
    "scheduler.params.warmup_min_ratio": 0.0,
    "scheduler.params.warmup_type": "linear",
}

# Key -> the setting that it is another name of. Of the keys for one setting the first that is there counts.
SAME_SETTING = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_clipping": "clip_grad",
    "bf16.enabled": "bf16",
    "bfloat16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "fp16.loss_scale_window": "loss_scale_window",
    "fp16.hysteresis": "hysteresis",
    "zero_optimization.stage": "zero_stage",
    "optimizer.params.lr": "lr",
    "optimizer.params.eps": "adam_eps",
    "optimizer.params.weight_decay": "weight_decay",
    "optimizer.params.momentum": "sgd_momentum",
    "scheduler.params.warmup_num_steps": "lr_warmup_iters",
    "scheduler.params.total_num_steps": "lr_decay_iters",
    "scheduler.params.warmup_max_lr": "lr",
}


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The run's settings that a DeepSpeed JSON names; what makes no sense is left to ``passthrough``."""
    found: dict[str, Any] = {}
    for key, name in SAME_SETTING.items():
        value = _lookup(given, key)
        if isinstance(value, bool) == (name in ("bf16", "fp16")) and isinstance(value, int | float):
            found.setdefault(name, value)
    betas = _lookup(given, "optimizer.params.betas")
    if isinstance(betas, list) and len(betas) == 2 and all(isinstance(beta, float | int) for beta in betas):
        found |= {"adam_beta1": betas[0], "adam_beta2": betas[1]}
    if _lookup(given, "zero_optimization.offload_optimizer.device") == "cpu":
        found["offload_optimizer"] = True
    if str(_lookup(given, "optimizer.type")).lower() == "sgd":
        found["optimizer"] = "sgd"
    kind = _lookup(given, "scheduler.type")
    if isinstance(kind, str) and kind in DECAY_STYLES:
        found["lr_decay_style"] = DECAY_STYLES[kind]
    return found


LARGEST_FILE, DEEPEST = 2**20, 20
"""Bytes, and sections inside each other, that no such file has."""


def read_file(path: str) -> dict[str, Any]:
    """The object in a DeepSpeed JSON file, not yet compared with a run.

    Raises:
        UserError: no such file, no JSON, a name that is given twice, or sections nested without end.
    """
    refuse_pointer(Path(path))
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LARGEST_FILE + 1)
        if len(text) > LARGEST_FILE:
            raise ValueError(f"longer than {LARGEST_FILE} characters")
        content = json.loads(text, object_pairs_hook=_once)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; --deepspeed-config needs one JSON object") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deep; --deepspeed-config needs one JSON object") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; --deepspeed-config needs one JSON object")
    if _deeper(content, DEEPEST):
        raise UserError(f"{path}: more than {DEEPEST} sections deep; no DeepSpeed setting is")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object; of a name given twice Python would take the last."""
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{name!r} is given twice")
        content[name] = value
    return content


def _deeper(tree: Any, levels: int) -> bool:
    level = [tree]
    for _ in range(levels):
        holders = [tuple(value.values()) if isinstance(value, dict) else value for value in level]
        level = [below for values in holders for below in values if isinstance(below, dict | list)]
    return bool(level)


def passthrough(given: Mapping[str, Any], config: Config, topology: Topology) -> dict[str, Any]:
    """What of a DeepSpeed JSON may be merged into the engine's own configuration.

    Args:
        given: the JSON; the value "auto" leaves the choice to the run.

    Returns:
        A deep copy without what the run's settings decide and without "auto" values.

    Raises:
        UserError: a value that contradicts the run (both are named), or a feature that is not available.
    """
    for key in UNAVAILABLE:
        value = _lookup(given, key)
        if not _is_off(value):
            raise UserError(f"DeepSpeed JSON {key} = {_shown(value)}: not available yet; remove it")
    _refuse_unknown(given)
    decided = _decided(config, topology) | _schedule(given, config)
    _check_sections(given, decided)
    for key, (ours, source) in decided.items():
        value = _lookup(given, key)
        if value not in (None, "auto") and not _equal(value, ours):
            raise UserError(
                f"DeepSpeed JSON {key} = {_shown(value)}: contradicts the run's {source} = {ours!r}; "
                f"change one of the two, or give 'auto' in the file"
            )
    result = copy.deepcopy({key: value for key, value in given.items() if key not in OWNED})
    for key in _decided(config, topology):
        _remove(result, key)
    return _without_auto(result)


def _decided(config: Config, topology: Topology) -> dict[str, tuple[Any, str]]:
    """DeepSpeed key -> (the run's value, the setting it comes from)."""
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


def _check_sections(given: Mapping[str, Any], decided: Mapping[str, Any]) -> None:
    """Sections are objects, and those that the run owns hold nothing that nobody would read."""
    for section in sorted({str(path) for key in (*decided, *UNAVAILABLE, *OWNED) for path in _above(key)}):
        value = _lookup(given, section)
        if value not in (None, "auto") and not isinstance(value, Mapping):
            raise UserError(f"DeepSpeed JSON {section} = {_shown(value)}: must be an object; write {{...}}")
    for owned in OWNED:
        known = [key.rpartition(".")[2] for key in decided if key.startswith(f"{owned}.params.")]
        for section, names in ((owned, ["type", "params"]), (f"{owned}.params", known)):
            content = _lookup(given, section)
            for name in content if isinstance(content, Mapping) else ():
                if name not in names:
                    raise UserError(
                        f"DeepSpeed JSON {section}.{name}: the run has no such setting"
                        f"{nearest(name, names)}; remove it from the file"
                    )


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    """DeepSpeed skips what it does not know, and looks at a value's type when it needs it, if at all."""
    for name, value in given.items():
        if name not in TOP_LEVEL:
            raise _unknown(name, TOP_LEVEL)
        if not is_of_type(name, value):
            kind = TOP_LEVEL[name].__name__
            raise UserError(f"DeepSpeed JSON {name} = {_shown(value)}: must be a {kind}; change or remove it")
        if name in SECTIONS and value not in (None, "auto", False):
            if not isinstance(value, Mapping):
                raise UserError(f"DeepSpeed JSON {name} = {_shown(value)}: must be an object; write {{...}}")
            for inner in value:
                if inner not in SECTIONS[name]:
                    raise _unknown(f"{name}.{inner}", [f"{name}.{known}" for known in SECTIONS[name]])


def _unknown(name: str, known: Iterable[str]) -> UserError:
    return UserError(
        f"DeepSpeed JSON {name[:80]}: DeepSpeed has no such setting{nearest(name, known)}; correct it"
    )


def _above(key: str) -> list[str]:
    """``a.b.c`` -> ``a``, ``a.b``; an owned section is one itself."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + (key in OWNED))]


def _schedule(given: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, str]]:
    optimizer, kind = config.optimizer, _lookup(given, "scheduler.type")
    name = _lookup(given, "optimizer.type")
    ours = OPTIMIZERS[optimizer.optimizer][0]
    # DeepSpeed's Adam is AdamW too unless its adam_w_mode says otherwise.
    if name not in (None, "auto") and str(name).lower() not in (ours.lower(), ours.lower().removesuffix("w")):
        raise UserError(
            f"DeepSpeed JSON optimizer.type = {_shown(name)}: contradicts the run's optimizer = "
            f"{optimizer.optimizer!r}; give {ours} or 'auto', or change --optimizer"
        )
    if kind in (None, "auto"):
        return {}
    if not isinstance(kind, str) or kind not in DECAY_STYLES:
        raise UserError(
            f"DeepSpeed JSON scheduler.type = {_shown(kind)}: must be one of {', '.join(DECAY_STYLES)}"
            f"{nearest(str(kind), DECAY_STYLES)}; remove the section to use the run's own schedule"
        )
    style = DECAY_STYLES[kind]
    if style != optimizer.lr_decay_style:
        raise UserError(
            f"DeepSpeed JSON scheduler.type = {kind!r} ({style}): contradicts the run's lr_decay_style = "
            f"{optimizer.lr_decay_style!r}; change one of the two, or give 'auto' in the file"
        )
    return {
        "scheduler.params.warmup_num_steps": (optimizer.lr_warmup_iters, "lr_warmup_iters"),
        "scheduler.params.total_num_steps": (config.decay_iters, "lr_decay_iters"),
        "scheduler.params.warmup_max_lr": (optimizer.lr, "lr"),
        "scheduler.params.cos_min_ratio": (optimizer.min_lr / (optimizer.lr or 1.0), "min_lr / lr"),
        **{key: (value, "warm-up") for key, value in FIXED.items() if key.startswith("scheduler")},
    }


def _lookup(given: Any, key: str) -> Any:
    for part in key.split("."):
        given = given.get(part) if isinstance(given, Mapping) else None
    return given


def _remove(given: Any, key: str) -> None:
    *parents, last = key.split(".")
    for part in parents:
        given = given.get(part) if isinstance(given, dict) else None
    if isinstance(given, dict):
        given.pop(last, None)


def _without_auto(given: dict[str, Any]) -> dict[str, Any]:
    plain = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in given.items()}
    return {key: value for key, value in plain.items() if value != "auto" and value != {}}


def _is_off(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not value or value.get("device") == "none" or value.get("enabled") is False
    if isinstance(value, bool) or value is None:
        return not value
    return value == "auto" or value in (-1, 0, 1)  # a group or shard count of one process


def _equal(value: Any, ours: Any) -> bool:
    if isinstance(ours, list):
        return isinstance(value, list) and len(value) == len(ours) and all(map(_equal, value, ours))
    if isinstance(ours, bool | str) or isinstance(value, bool):
        return value == ours and type(value) is type(ours)
    if not isinstance(value, int | float):
        return False
    try:
        return math.isclose(value, ours, rel_tol=1e-9)
    except OverflowError:  # an integer beyond all floats
        return False


def _shown(value: Any) -> str:
    """A value for a message, which stays one line of some length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
