"""A user's DeepSpeed JSON, checked against the run's own settings.

What the JSON says of the run's settings takes the place of their defaults (:func:`settings_of`) and must
agree with what the user gave elsewhere (``deepspeed_decided.py``); what would make it another run is refused
(``deepspeed_refusals.py``); the rest (bucket sizes, logging, communication) goes to DeepSpeed as it is.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inrank_megatron.config.deepspeed_decided import DECAY_STYLES, decided, decided_of_schedule
from inrank_megatron.config.deepspeed_refusals import (
    OWNED,
    refuse_contradictions,
    refuse_other_kinds,
    refuse_unavailable,
    refuse_unknown,
    refuse_unread,
)
from inrank_megatron.config.deepspeed_values import lookup
from inrank_megatron.config.schema import Config
from inrank_megatron.config.topology import Topology
from inrank_megatron.errors import UserError
from inrank_megatron.pointers import refuse_pointer

LARGEST_FILE, DEEPEST = 2**20, 20
"""Bytes, and sections inside each other, that no such file has."""
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


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The run's settings that a DeepSpeed JSON names; what makes no sense is left to ``passthrough``."""
    found: dict[str, Any] = {}
    for key, name in SAME_SETTING.items():
        value = lookup(given, key)
        if isinstance(value, bool) == (name in ("bf16", "fp16")) and isinstance(value, int | float):
            found.setdefault(name, value)
    betas = lookup(given, "optimizer.params.betas")
    if isinstance(betas, list) and len(betas) == 2 and all(isinstance(beta, float | int) for beta in betas):
        found |= {"adam_beta1": betas[0], "adam_beta2": betas[1]}
    if lookup(given, "zero_optimization.offload_optimizer.device") == "cpu":
        found["offload_optimizer"] = True
    if str(lookup(given, "optimizer.type")).lower() == "sgd":
        found["optimizer"] = "sgd"
    kind = lookup(given, "scheduler.type")
    if isinstance(kind, str) and kind in DECAY_STYLES:
        found["lr_decay_style"] = DECAY_STYLES[kind]
    return found


def passthrough(given: Mapping[str, Any], config: Config, topology: Topology) -> dict[str, Any]:
    """What of a DeepSpeed JSON may be merged into the engine's own configuration.

    Args:
        given: the JSON; the value "auto" leaves the choice to the run.

    Returns:
        A deep copy without what the run's settings decide and without "auto" values.

    Raises:
        UserError: a value that contradicts the run (both are named), or a feature that is not available.
    """
    refuse_unavailable(given)
    refuse_unknown(given)
    refuse_other_kinds(given, config.optimizer)
    ours = decided(config, topology)
    agreed = ours | decided_of_schedule(given, config)
    refuse_unread(given, agreed)
    refuse_contradictions(given, agreed)
    result = copy.deepcopy({key: value for key, value in given.items() if key not in OWNED})
    for key in ours:
        _remove(result, key)
    return _without_auto(result)


def _remove(given: Any, key: str) -> None:
    *parents, last = key.split(".")
    for part in parents:
        given = given.get(part) if isinstance(given, dict) else None
    if isinstance(given, dict):
        given.pop(last, None)


def _without_auto(given: dict[str, Any]) -> dict[str, Any]:
    plain = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in given.items()}
    return {key: value for key, value in plain.items() if value != "auto" and value != {}}
