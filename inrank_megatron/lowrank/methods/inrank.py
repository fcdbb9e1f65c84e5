"""InRank (paper, algorithm 2) and InRank-Efficient (algorithm 3)."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from inrank_megatron.errors import UserError
from inrank_megatron.fields import Count, Section, setting
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.methods.base import PhaseShape, Rules, Sections
from inrank_megatron.lowrank.methods.changes import (
    Change,
    InitialiseFactors,
    LostCheck,
    NewMoments,
    Plan,
    SetRank,
    Source,
)
from inrank_megatron.lowrank.methods.growing_rank import GrowingRank
from inrank_megatron.lowrank.methods.growth import GrowthRule
from inrank_megatron.lowrank.methods.switch import Switch
from inrank_megatron.lowrank.methods.switching import Switching


@dataclass(frozen=True)
class InRank(GrowingRank):
    """Train ``W0 + U V`` and raise each layer's rank by the growth rule.

    Args:
        source: where the first columns come from (``InitialiseFactors``).
        initial_column_norm, new_column_norm: norm of each first column, and of each that is added later.
        new_column_moments: second moments of columns added later (``SetRank``).
        frozen_base: whether a frozen W0 is kept next to the factors; without it ``W = U V`` (the authors'
            code).
        absorb: whether the product of columns at their start is subtracted from W0.
        switch: how the factors are refactored (InRank-Efficient); None: never (InRank).
    """

    growth: GrowthRule
    source: Source = "gradient"
    initial_column_norm: float = 0.5
    new_column_norm: float = 0.1
    frozen_base: bool = True
    absorb: bool = False
    new_column_moments: NewMoments = "zero"
    switch: Switch | None = None

    name: ClassVar[str] = "inrank"
    page: ClassVar[str] = "concepts/inrank.md"

    @classmethod
    def from_config(cls, config, *, switch_step):
        inrank = config.inrank
        return cls(
            growth=GrowthRule.from_config(config),
            source=inrank.factor_init or "gradient",
            initial_column_norm=inrank.initial_column_norm,
            new_column_norm=inrank.new_column_norm,
            frozen_base=inrank.frozen_base,
            absorb=inrank.absorb_columns,
            new_column_moments=inrank.new_column_moments,
        )

    def structure(self, min_dims):
        rule = self.growth
        return {
            name: FactorSpec(
                capacity=rule.capacity(d),
                active_columns=rule.initial_rank + rule.buffer_of(d),
                rank=rule.initial_rank,
                frozen_base=self.frozen_base,
                tracked=rule.spectrum == "update",
            )
            for name, d in min_dims.items()
        }

    def initialisation(self):
        norm = None if self.source == "kaiming" else self.initial_column_norm
        return [InitialiseFactors(source=self.source, column_norm=norm, absorb=self.absorb)]

    def plan_step(self, step, layers):
        if any(layer.final for layer in layers):  # the second phase
            return None
        if self._switches(step, layers):
            return self._plan_switch(step)
        if self.growth.due(step):
            return Plan(self._grow, self.growth.spectrum, may_come_late=True)
        return None

    def _switches(self, step, layers) -> bool:
        if self.switch is None:
            return False
        if self.switch.step is not None:
            return step == self.switch.step
        # One step after the check with which patience runs out.
        after_check = self.growth.due(step - 1)
        return after_check and self.growth.quiet_checks(step - 1, layers) >= self.switch.patience

    def _plan_switch(self, step) -> Plan:
        """Algorithm 3, lines 4 to 6. The final ranks are the grown ranks, including a check at this step, or
        are chosen anew from the layers' outputs or spectra.
        """
        if self.switch.re_estimated:
            return Plan(self._re_estimate_and_switch, self.growth.spectrum)
        # With patience, the check at the step before was the last one.
        last_check = self.switch.step is not None and self.growth.due(step)
        if last_check and not self.switch.judges_outputs:
            return Plan(self._grow_and_switch, self.growth.spectrum)
        return self.switch.plan()

    def _grow(self, layers) -> list[Change]:
        """Algorithm 2, lines 6 to 8."""
        return [self._check(layer) for layer in layers]

    def _check(self, layer) -> SetRank | LostCheck:
        if not layer.updated:
            return LostCheck(layer.name)
        growth = self.growth.check(layer)
        return SetRank(
            layer=layer.name,
            rank=growth.rank,
            active_columns=max(layer.active_columns, growth.rank + self.growth.buffer_of(layer.min_dim)),
            explained_ratio=growth.explained_ratio,
            capped=growth.capped,
            source="kaiming" if self.source == "kaiming" else "random",
            column_norm=None if self.source == "kaiming" else self.new_column_norm,
            absorb=self.absorb,
            moments=self.new_column_moments,
        )

    def _grow_and_switch(self, layers) -> list[Change]:
        checks = self._grow(layers)
        ranks = {check.layer: check.rank for check in checks if isinstance(check, SetRank)}
        grown = [replace(layer, rank=ranks.get(layer.name, layer.rank)) for layer in layers]
        return [*checks, self.switch.refactor(grown)]

    def _re_estimate_and_switch(self, layers) -> list[Change]:
        re_estimated = [replace(layer, rank=self.growth.re_estimated_rank(layer)) for layer in layers]
        return [self.switch.refactor(re_estimated)]

    def unfinished(self, layers):
        if self.switch is None:
            return None
        if any(layer.final for layer in layers):
            return self._without_checks()
        return (
            f"the ranks did not stop growing for {self.switch.patience} checks before the last step: "
            "no switch, the run ends in its first phase"
        )

    def _without_checks(self) -> str | None:
        """The message if no check fell into the first phase, so that its ranks say nothing about the text."""
        step = self.switch.step
        chosen = self.switch.re_estimated or self.switch.judges_outputs
        if step is None or chosen or any(self.growth.due(n) for n in range(1, step + 1)):
            return None
        plural = "" if step == 1 else "s"
        return (
            f"no rank check came in the {step} step{plural} of the first phase, so all ranks are still "
            f"{self.growth.initial_rank}; lower --rank-check-interval or raise --train-iters"
        )


class PatienceSettings(Section):
    """A switch that comes when the ranks stop growing."""

    switch_patience: Count | None = setting(
        "instead of a step: switch once no rank has grown at this number of rank checks in a row "
        "(inrank-efficient)",
        None,
    )


BUDGET_OF_OUTPUTS = 0.5


def _ranks_of_flat_updates(run) -> dict[str, Any]:
    """An orthogonalised step gives all directions alike, so the spectrum of what was learnt is flat, and its
    rank is that of the columns, whatever the text. The layers' outputs tell more.
    """
    inrank = run.inrank
    chosen = inrank.final_ranks or inrank.output_threshold or inrank.parameter_budget
    if run.optimizer.factor_optimizer == "adamw" or chosen:
        return {}
    return {"final_ranks": "output", "parameter_budget": BUDGET_OF_OUTPUTS}


@dataclass(frozen=True)
class InRankEfficient(Switching, InRank):
    """InRank that refactors its matrices into ``U* V*`` once."""

    name: ClassVar[str] = "inrank-efficient"
    page: ClassVar[str] = "concepts/switch.md"
    settings: ClassVar[Sections] = (*InRank.settings, *Switching.settings, PatienceSettings)
    adaptations: ClassVar[Rules] = (*Switching.adaptations, *InRank.adaptations)
    one_phase: ClassVar[str] = InRank.name
    default_final_ranks: ClassVar[str] = "grown"

    @classmethod
    def derived(cls, run):
        return super().derived(run) | _ranks_of_flat_updates(run)

    @classmethod
    def from_config(cls, config, *, switch_step):
        inrank = super().from_config(config, switch_step=switch_step)
        switch = Switch.from_config(
            config, switch_step=switch_step, default_final_ranks=cls.default_final_ranks
        )
        return replace(inrank, switch=switch)

    @classmethod
    def check_settings(cls, run, shapes):
        super().check_settings(run, shapes)
        if run.inrank.final_ranks == "re-estimated" and run.inrank.rank_criterion == "eq7":
            raise UserError(
                "final_ranks = 're-estimated': equation 7 only judges ranks from the present one up; give "
                "--rank-criterion update or released, or --final-ranks grown"
            )

    @classmethod
    def switch_step(cls, run, steps_per_epoch):
        patient = run.inrank.switch_patience is not None
        return None if patient else super().switch_step(run, steps_per_epoch)

    @classmethod
    def phases(cls, run, columns, *, break_even):
        *first, last = super().phases(run, columns, break_even=break_even)
        if run.inrank.final_ranks == "output":  # which knows no bound but the width
            return [*first, last]
        ranks = {
            "initial rank": run.inrank.initial_rank,
            "largest rank": columns.capacity - columns.buffer,
        }
        second = [PhaseShape(f"phase 2, U V, {name}", rank, rank) for name, rank in ranks.items()]
        return [*first, *second, last]
