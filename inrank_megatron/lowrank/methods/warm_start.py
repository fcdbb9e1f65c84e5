"""Dense for a share of the steps, then refactored once (the idea of Cuttlefish, arXiv 2305.02538).

The switch is that of InRank-Efficient, so the two differ in the first phase alone.
"""

from dataclasses import dataclass
from typing import ClassVar

from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.dense import Dense
from inrank_megatron.lowrank.methods.inrank import InRankEfficient
from inrank_megatron.lowrank.methods.switch import Switch
from inrank_megatron.lowrank.methods.switching import Switching


@dataclass(frozen=True)
class WarmStart(Switching):
    """Every linear is dense up to the switch, ``U* V*`` after it; the layers' outputs choose the ranks."""

    switch: Switch

    name: ClassVar[str] = "warm-start"
    page: ClassVar[str] = "concepts/methods.md#warm-start"
    one_phase: ClassVar[str] = Dense.name
    triggers: ClassVar[tuple[str, ...]] = ("switch_iters", "switch_epochs")
    default_final_ranks: ClassVar[str] = "output"

    @classmethod
    def from_config(cls, config, *, switch_step):
        return cls(
            Switch.from_config(config, switch_step=switch_step, default_final_ranks=cls.default_final_ranks)
        )

    @classmethod
    def check_settings(cls, run, shapes):
        final = run.inrank.final_ranks
        if final in ("grown", "re-estimated"):
            raise UserError(
                f"final_ranks = {final!r}: no rank grows in method {cls.name}; leave it out, or give "
                f"--method {InRankEfficient.name}"
            )
        super().check_settings(run, shapes)

    def plan_step(self, step, layers):
        return self.switch.plan() if step == self.switch.step else None
