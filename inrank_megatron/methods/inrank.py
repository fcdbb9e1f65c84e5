"""InRank (paper, algorithm 2) and InRank-Efficient (algorithm 3)."""

from dataclasses import dataclass
from typing import ClassVar

from inrank_megatron.layers.spec import FactorSpec
from inrank_megatron.methods.changes import InitialiseFactors, Refactor, SetRank
from inrank_megatron.rank.buffer import default_buffer, default_capacity
from inrank_megatron.rank.criteria import eq7_ratio, grow, update_ratio


@dataclass(frozen=True)
class InRank:
    """Train ``W0 + U V``; every ``check_interval`` steps raise each layer's rank until its explained ratio
    holds.

    Args:
        initial_rank: r at the start (paper: 2).
        buffer: b, trained columns beyond r; None: 100, scaled down below width 768.
        threshold: alpha, the explained ratio to hold (paper: 0.9).
        criterion: ``update``, the released formula on the cumulative update ``U V - U0 V0``; ``released``,
            the same formula on ``U V`` (the authors' code); ``eq7``, equation 7 on ``U V``.
        window: reading of equation 7, ``sliding`` or ``fixed``.
        max_rank: the largest rank; None: so many that r + b is half of min(O, I).
        source: where the starting columns come from (``InitialiseFactors``).
        initial_column_norm, new_column_norm: norm of each starting column, and of those added later.
        frozen_base: whether W0 stands beside the factors; without it ``W = U V`` (the authors' code).
        switch_step: completed steps after which the factors are refactored (InRank-Efficient); None: never
            (InRank).
        rank_multiple_of: columns after the switch are rounded up to a multiple of this.
        activation_batches: global batches whose activations weigh the truncation; 0: plain truncation.
    """

    initial_rank: int
    buffer: int | None
    threshold: float
    check_interval: int
    criterion: str
    window: str
    max_rank: int | None
    initial_column_norm: float
    new_column_norm: float
    switch_step: int | None
    rank_multiple_of: int = 1
    activation_batches: int = 0
    source: str = "gradient"
    frozen_base: bool = True

    name: ClassVar[str] = "inrank"
    settings: ClassVar[frozenset[str]] = frozenset(
        {
            "factorised_linears",
            "initial_rank",
            "buffer",
            "threshold",
            "rank_check_interval",
            "max_rank",
            "rank_criterion",
            "eq7_window",
            "factor_init",
            "frozen_base",
            "initial_column_norm",
            "new_column_norm",
        }
    )

    @classmethod
    def from_config(cls, config, *, switch_step):
        inrank = config.inrank
        return cls(
            initial_rank=inrank.initial_rank,
            buffer=inrank.buffer,
            threshold=inrank.threshold,
            check_interval=inrank.rank_check_interval,
            criterion=inrank.rank_criterion,
            window=inrank.eq7_window,
            max_rank=inrank.max_rank,
            initial_column_norm=inrank.initial_column_norm,
            new_column_norm=inrank.new_column_norm,
            switch_step=switch_step,
            rank_multiple_of=inrank.rank_multiple_of,
            activation_batches=inrank.activation_batches if inrank.truncation == "activation-aware" else 0,
            source=inrank.factor_init or "gradient",
            frozen_base=inrank.frozen_base,
        )

    def buffer_of(self, min_dim: int) -> int:
        return default_buffer(min_dim) if self.buffer is None else self.buffer

    def structure(self, min_dims):
        specs = {}
        for name, d in min_dims.items():
            b = self.buffer_of(d)
            columns = (
                default_capacity(d, initial_rank=self.initial_rank, buffer=b)
                if self.max_rank is None
                else min(d, self.max_rank + b)
            )
            specs[name] = FactorSpec(
                columns=columns,
                active=self.initial_rank + b,
                rank=self.initial_rank,
                base=self.frozen_base,
                tracked=self.criterion == "update",
            )
        return specs

    def start(self):
        norm = None if self.source == "kaiming" else self.initial_column_norm
        return [InitialiseFactors(source=self.source, column_norm=norm, absorb=self.frozen_base)]

    def acts_at(self, step):
        return self.spectrum_at(step) is not None or step == self.switch_step

    def spectrum_at(self, step):
        if step % self.check_interval or (self.switch_step is not None and step > self.switch_step):
            return None
        return "update" if self.criterion == "update" else "product"

    def changes(self, step, layers):
        result = []
        if self.spectrum_at(step) is not None:
            result += [self._check(layer) for layer in layers]
        if step == self.switch_step:
            ranks = {layer.name: layer.rank for layer in layers}
            ranks.update({change.layer: change.rank for change in result})
            m = self.rank_multiple_of
            # Without W0 the product's rank is at most the columns in use: more would be dead from the start.
            most = {x.name: x.min_dim if self.frozen_base else x.active for x in layers}
            columns = {name: min(-(-rank // m) * m, most[name]) for name, rank in ranks.items()}
            result.append(Refactor(ranks, columns, activation_batches=self.activation_batches))
        return result

    def _check(self, layer) -> SetRank:
        b, r, s = self.buffer_of(layer.min_dim), layer.rank, layer.singular_values
        # The authors' code searches [r, r + b). Equation 7 is 1 at r + b: no trained column is left out.
        reach = b if self.criterion == "eq7" else max(1, b - 1)

        def ratio(candidate: int) -> float:
            if self.criterion != "eq7":
                return update_ratio(s, candidate, length=layer.min_dim)
            return eq7_ratio(s, candidate, start=r, buffer=b, window=self.window)

        growth = grow(ratio, r, threshold=self.threshold, limit=max(r, min(r + reach, layer.capacity - b)))
        return SetRank(
            layer=layer.name,
            rank=growth.rank,
            active=max(layer.active, growth.rank + b),
            explained_ratio=growth.explained_ratio,
            capped=growth.capped,
            column_norm=None if self.source == "kaiming" else self.new_column_norm,
            absorb=self.frozen_base,
        )


class InRankEfficient(InRank):
    """InRank that refactors ``W0 + U V`` into ``U* V*`` after ``switch_step`` steps."""

    name = "inrank-efficient"
    settings = InRank.settings | {
        "switch_iters",
        "switch_epochs",
        "rank_multiple_of",
        "truncation",
        "activation_batches",
    }
