"""What a user's DeepSpeed JSON must not say. Each function raises a UserError for one kind of mistake."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from inrank_megatron.config.deepspeed_decided import DECAY_STYLES, OPTIMIZERS, Decided
from inrank_megatron.config.deepspeed_names import SECTIONS, TOP_LEVEL, is_of_type
from inrank_megatron.config.deepspeed_values import lookup, shown
from inrank_megatron.config.loading import nearest
from inrank_megatron.config.schema import OptimizerConfig
from inrank_megatron.errors import UserError

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
# Sections that the run fills alone.
OWNED = ("optimizer", "scheduler")


def refuse_unavailable(given: Mapping[str, Any]) -> None:
    """Features that the method does not provide for."""
    for key in UNAVAILABLE:
        value = lookup(given, key)
        if not _is_off(value):
            raise UserError(f"DeepSpeed JSON {key} = {shown(value)}: not available yet; remove it")


def refuse_unknown(given: Mapping[str, Any]) -> None:
    """DeepSpeed skips what it does not know, and looks at a value's type when it needs it, if at all."""
    for name, value in given.items():
        if name not in TOP_LEVEL:
            raise _unknown(name, TOP_LEVEL)
        if not is_of_type(name, value):
            kind = TOP_LEVEL[name].__name__
            raise UserError(f"DeepSpeed JSON {name} = {shown(value)}: must be a {kind}; change or remove it")
        if name in SECTIONS and value not in (None, "auto", False):
            if not isinstance(value, Mapping):
                raise UserError(f"DeepSpeed JSON {name} = {shown(value)}: must be an object; write {{...}}")
            for inner in value:
                if inner not in SECTIONS[name]:
                    raise _unknown(f"{name}.{inner}", [f"{name}.{known}" for known in SECTIONS[name]])


def refuse_other_kinds(given: Mapping[str, Any], optimizer: OptimizerConfig) -> None:
    """Another optimizer or another schedule than the run's."""
    name = lookup(given, "optimizer.type")
    ours = OPTIMIZERS[optimizer.optimizer][0]
    # DeepSpeed's Adam is AdamW too unless its adam_w_mode says otherwise.
    if name not in (None, "auto") and str(name).lower() not in (ours.lower(), ours.lower().removesuffix("w")):
        raise UserError(
            f"DeepSpeed JSON optimizer.type = {shown(name)}: contradicts the run's optimizer = "
            f"{optimizer.optimizer!r}; give {ours} or 'auto', or change --optimizer"
        )
    kind = lookup(given, "scheduler.type")
    if kind in (None, "auto"):
        return
    if not isinstance(kind, str) or kind not in DECAY_STYLES:
        raise UserError(
            f"DeepSpeed JSON scheduler.type = {shown(kind)}: must be one of {', '.join(DECAY_STYLES)}"
            f"{nearest(str(kind), DECAY_STYLES)}; remove the section to use the run's own schedule"
        )
    style = DECAY_STYLES[kind]
    if style != optimizer.lr_decay_style:
        raise UserError(
            f"DeepSpeed JSON scheduler.type = {kind!r} ({style}): contradicts the run's lr_decay_style = "
            f"{optimizer.lr_decay_style!r}; change one of the two, or give 'auto' in the file"
        )


def refuse_unread(given: Mapping[str, Any], decided: Decided) -> None:
    """Sections that are not objects, and unknown keys in those that only the run fills."""
    for section in sorted({str(path) for key in (*decided, *UNAVAILABLE, *OWNED) for path in _above(key)}):
        value = lookup(given, section)
        if value not in (None, "auto") and not isinstance(value, Mapping):
            raise UserError(f"DeepSpeed JSON {section} = {shown(value)}: must be an object; write {{...}}")
    for owned in OWNED:
        known = [key.rpartition(".")[2] for key in decided if key.startswith(f"{owned}.params.")]
        for section, names in ((owned, ["type", "params"]), (f"{owned}.params", known)):
            content = lookup(given, section)
            for name in content if isinstance(content, Mapping) else ():
                if name not in names:
                    raise UserError(
                        f"DeepSpeed JSON {section}.{name}: the run has no such setting"
                        f"{nearest(name, names)}; remove it from the file"
                    )


def refuse_contradictions(given: Mapping[str, Any], decided: Decided) -> None:
    """Values other than the run's."""
    for key, (ours, source) in decided.items():
        value = lookup(given, key)
        if value not in (None, "auto") and not _equal(value, ours):
            raise UserError(
                f"DeepSpeed JSON {key} = {shown(value)}: contradicts the run's {source} = {ours!r}; "
                f"change one of the two, or give 'auto' in the file"
            )


def _unknown(name: str, known: Iterable[str]) -> UserError:
    return UserError(
        f"DeepSpeed JSON {name[:80]}: DeepSpeed has no such setting{nearest(name, known)}; correct it"
    )


def _above(key: str) -> list[str]:
    """``a.b.c`` -> ``a``, ``a.b``; an owned section is one itself."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + (key in OWNED))]


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
