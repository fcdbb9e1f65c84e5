"""From the run's settings to its method.

A new method is one file and one entry here: ``docs/guides/add_a_method.md``.
"""

from collections.abc import Mapping

from pydantic import create_model

from inrank_megatron.fields import Section
from inrank_megatron.lowrank.methods.base import Method
from inrank_megatron.lowrank.methods.dense import Dense
from inrank_megatron.lowrank.methods.factorising import Factorising
from inrank_megatron.lowrank.methods.fixed_rank import FixedRank
from inrank_megatron.lowrank.methods.inrank import InRank, InRankEfficient
from inrank_megatron.lowrank.methods.lora import LoRA
from inrank_megatron.lowrank.methods.relora import ReLoRA
from inrank_megatron.lowrank.methods.settings import Run
from inrank_megatron.lowrank.methods.warm_start import WarmStart

_CLASSES: tuple[type[Method], ...] = (
    Dense,
    FixedRank,
    LoRA,
    ReLoRA,
    InRank,
    InRankEfficient,
    WarmStart,
)
METHODS: Mapping[str, type[Method]] = {method.name: method for method in _CLASSES}
"""The methods by the names of ``--method``: what validates, lists or explains names reads them here."""


def _settings_of_all() -> type[Section]:
    """One section of all methods' settings, since files and the command line are flat."""
    sections = dict.fromkeys(section for method in METHODS.values() for section in method.settings)
    text = "Settings of the methods. r: rank of a linear; b: columns of its buffer."
    # pydantic takes the fields of the last base first.
    return create_model("InRankConfig", __base__=tuple(reversed(sections)), __doc__=text)


InRankConfig = _settings_of_all()


def make_method(config: Run, *, switch_step: int | None) -> Method:
    """The method that ``config.training.method`` names; ``switch_step`` from below."""
    return METHODS[config.training.method].from_config(config, switch_step=switch_step)


def switch_step(config: Run, steps_per_epoch: int) -> int | None:
    """Optimizer steps of the run's first phase, as its method has them (``Method.switch_step``)."""
    return METHODS[config.training.method].switch_step(config, steps_per_epoch)


def idle_settings(method: str) -> frozenset[str]:
    """Settings that belong to methods and that this one does not read."""
    read = {name for section in METHODS[method].settings for name in section.model_fields}
    if issubclass(METHODS[method], Factorising):
        read.add("factor_lr_multiplier")
    return frozenset({*InRankConfig.model_fields, "factor_lr_multiplier"}) - read
