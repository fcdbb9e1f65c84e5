"""From the run's settings to its method.

A new method is one file, one entry here, and its name in ``config/schema.py``. Rules for single methods are
in ``config/checks.py`` and ``config/plan.py``.
"""

from typing import Any

from inrank_megatron.lowrank.methods.changes import Method
from inrank_megatron.lowrank.methods.dense import Dense
from inrank_megatron.lowrank.methods.fixed_rank import FixedRank
from inrank_megatron.lowrank.methods.inrank import InRank, InRankEfficient
from inrank_megatron.lowrank.methods.lora import LoRA
from inrank_megatron.lowrank.methods.relora import ReLoRA
from inrank_megatron.lowrank.methods.settings import InRankConfig, Run
from inrank_megatron.lowrank.methods.warm_start import WarmStart

_CLASSES: tuple[Any, ...] = (Dense, FixedRank, LoRA, ReLoRA, InRank, InRankEfficient, WarmStart)
METHODS: dict[str, type[Method]] = {method.name: method for method in _CLASSES}


def make_method(config: Run, *, switch_step: int | None) -> Method:
    """The method that ``config.training.method`` names; ``switch_step`` from ``schedule.py``."""
    return METHODS[config.training.method].from_config(config, switch_step=switch_step)


def idle_settings(method: str) -> frozenset[str]:
    """Settings that belong to methods and that this one does not read."""
    return frozenset({*InRankConfig.model_fields, "factor_lr_multiplier"}) - METHODS[method].settings
