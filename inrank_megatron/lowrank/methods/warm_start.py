"""Dense for a share of the steps, then refactored once (the idea of Cuttlefish, arXiv 2305.02538).

The switch is that of InRank-Efficient, so the two differ in the first phase alone.
"""

from dataclasses import dataclass
from typing import ClassVar

from inrank_megatron.lowrank.methods.base import Method
from inrank_megatron.lowrank.methods.switch import Switch


@dataclass(frozen=True)
class WarmStart(Method):
    """Every linear is dense up to the switch, ``U* V*`` after it; the layers' outputs choose the ranks."""

    switch: Switch

    name: ClassVar[str] = "warm-start"
    settings: ClassVar[frozenset[str]] = Switch.settings | {
        "factorised_linears",
        "qkv_factors",
        "factor_lr_multiplier",
    }

    @classmethod
    def from_config(cls, config, *, switch_step):
        return cls(Switch.from_config(config, switch_step=switch_step))

    def structure(self, min_dims):
        return {}

    def start(self):
        return []

    def plan_step(self, step, layers):
        return self.switch.plan() if step == self.switch.step else None
