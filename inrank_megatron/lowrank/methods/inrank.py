"""InRank (paper, algorithm 2) and InRank-Efficient (algorithm 3)."""

from dataclasses import dataclass, replace
from typing import ClassVar

from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.methods.base import Method
from inrank_megatron.lowrank.methods.changes import InitialiseFactors, LostCheck, NewMoments, SetRank, Source
from inrank_megatron.lowrank.methods.growth import GrowthRule
from inrank_megatron.lowrank.methods.switch import Switch


@dataclass(frozen=True)
class InRank(Method):
    """Train ``W0 + U V`` and raise each layer's rank by the growth rule.

    Args:
        source: where the starting columns come from (``InitialiseFactors``).
        initial_column_norm, new_column_norm: norm of each starting column, and of those added later.
        new_column_moments: second moments of columns added later (``SetRank``).
        frozen_base: whether W0 stands beside the factors; without it ``W = U V`` (the authors' code).
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
    settings: ClassVar[frozenset[str]] = GrowthRule.settings | {
        "inrank_preset",
        "factorised_linears",
        "qkv_factors",
        "factor_init",
        "frozen_base",
        "initial_column_norm",
        "new_column_norm",
        "new_column_moments",
        "absorb_columns",
        "factor_lr_multiplier",
    }

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
                columns=rule.columns(d),
                active=rule.initial_rank + rule.buffer_of(d),
                rank=rule.initial_rank,
                base=self.frozen_base,
                tracked=rule.criterion == "update",
            )
            for name, d in min_dims.items()
        }

    def start(self):
        norm = None if self.source == "kaiming" else self.initial_column_norm
        return [InitialiseFactors(source=self.source, column_norm=norm, absorb=self.absorb)]

    def acts_at(self, step):
        last = None if self.switch is None else self.switch.step
        if last is not None:
            return step == last or (step < last and self.growth.due(step))
        # The switch for patience follows one step after the check that runs out of it.
        after_check = self.switch is not None and self.growth.due(step - 1)
        return self.growth.due(step) or after_check

    def spectrum_at(self, step, layers):
        if not self.acts_at(step) or any(layer.final for layer in layers):
            return None
        if self._switches(step, layers):
            if self.switch.judges_outputs:
                return self.switch.metric
            if self.switch.refound:
                return self.growth.spectrum
            if self.switch.step is None:  # patience has run out: no further look at growth
                return None
        return self.growth.spectrum if self.growth.due(step) else None

    def changes(self, step, layers):
        spectrum, switches = self.spectrum_at(step, layers), self._switches(step, layers)
        seen = layers if spectrum == self.growth.spectrum else []
        refinds = switches and self.switch.refound
        checks = [] if refinds else [self._check(layer) for layer in seen]
        if not switches:
            return checks
        ranks = {check.layer: check.rank for check in checks if isinstance(check, SetRank)}
        if refinds:
            ranks = {layer.name: self.growth.refound(layer) for layer in seen}
        layers = [replace(layer, rank=ranks.get(layer.name, layer.rank)) for layer in layers]
        return [*checks, self.switch.refactor(layers)]

    def unfinished(self, layers):
        if self.switch is None:
            return None
        if any(layer.final for layer in layers):
            return self._without_checks()
        return (
            f"the ranks did not stand still for {self.switch.patience} checks before the last step: "
            "no switch, the run ends in its first phase"
        )

    def _without_checks(self) -> str | None:
        """Of a first phase too short for any: its final ranks say nothing of the text."""
        step = self.switch.step
        chosen = self.switch.refound or self.switch.judges_outputs
        if step is None or chosen or any(self.growth.due(n) for n in range(1, step + 1)):
            return None
        plural = "" if step == 1 else "s"
        return (
            f"no rank check came in the {step} step{plural} of the first phase, so all ranks are still "
            f"{self.growth.initial_rank}; lower --rank-check-interval or raise --train-iters"
        )

    def _switches(self, step, layers) -> bool:
        if self.switch is None or any(layer.final for layer in layers):
            return False
        if self.switch.step is not None:
            return step == self.switch.step
        return self.growth.quiet_checks(step - 1, layers) >= self.switch.patience

    def _check(self, layer) -> SetRank | LostCheck:
        if not layer.updated:
            return LostCheck(layer.name)
        growth = self.growth.check(layer)
        return SetRank(
            layer=layer.name,
            rank=growth.rank,
            active=max(layer.active, growth.rank + self.growth.buffer_of(layer.min_dim)),
            explained_ratio=growth.explained_ratio,
            capped=growth.capped,
            column_norm=None if self.source == "kaiming" else self.new_column_norm,
            absorb=self.absorb,
            moments=self.new_column_moments,
        )


@dataclass(frozen=True)
class InRankEfficient(InRank):
    """InRank that refactors its matrices into ``U* V*`` once."""

    name: ClassVar[str] = "inrank-efficient"
    settings: ClassVar[frozenset[str]] = InRank.settings | Switch.settings | {"switch_patience"}

    @classmethod
    def from_config(cls, config, *, switch_step):
        inrank = super().from_config(config, switch_step=switch_step)
        return replace(inrank, switch=Switch.from_config(config, switch_step=switch_step))
