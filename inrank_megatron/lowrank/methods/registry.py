"""From the run's settings to its method.

A new method is one file and one entry here.
"""

from collections.abc import Mapping

from inrank_megatron.lowrank.methods.base import Method
from inrank_megatron.lowrank.methods.dense import Dense
from inrank_megatron.lowrank.methods.fixed_rank import FixedRank
from inrank_megatron.lowrank.methods.inrank import InRank, InRankEfficient
from inrank_megatron.lowrank.methods.lora import LoRA
from inrank_megatron.lowrank.methods.relora import ReLoRA
from inrank_megatron.lowrank.methods.settings import InRankConfig, Run
from inrank_megatron.lowrank.methods.warm_start import WarmStart

_CLASSES: tuple[type[Method], ...] = (Dense, FixedRank, LoRA, ReLoRA, InRank, InRankEfficient, WarmStart)
METHODS: Mapping[str, type[Method]] = {method.name: method for method in _CLASSES}
"""The methods by the names of ``--method``: what validates, lists or explains names reads them here."""


def make_method(config: Run, *, switch_step: int | None) -> Method:
    """The method that ``config.training.method`` names; ``switch_step`` from below."""
    return METHODS[config.training.method].from_config(config, switch_step=switch_step)


def switch_step(config: Run, steps_per_epoch: int) -> int | None:
    """Optimizer steps of the run's first phase, as its method has them (``Method.switch_step``)."""
    return METHODS[config.training.method].switch_step(config, steps_per_epoch)


def idle_settings(method: str) -> frozenset[str]:
    """Settings that belong to methods and that this one does not read."""
    return frozenset({*InRankConfig.model_fields, "factor_lr_multiplier"}) - METHODS[method].settings
