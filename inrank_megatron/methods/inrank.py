"""InRank (paper, algorithm 2) and InRank-Efficient (algorithm 3)."""

from dataclasses import dataclass

from inrank_megatron.layers.factorised import FactorSpec
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
        criterion: ``update`` (ratio of the cumulative update ``U V - U0 V0``) or ``eq7`` (equation 7 on ``U
        V``).
        window: reading of equation 7, ``sliding`` or ``fixed``.
        max_rank: the largest rank; None: so many that r + b is half of min(O, I).
        initial_column_norm, new_column_norm: norm of each starting column, and of those added later.
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

    @property
    def name(self) -> str:
        return "inrank" if self.switch_step is None else "inrank-efficient"

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
            specs[name] = FactorSpec(columns=columns, active=self.initial_rank + b, rank=self.initial_rank)
        return specs

    def start(self):
        return [InitialiseFactors(source="gradient", column_norm=self.initial_column_norm, absorb=True)]

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
            columns = {layer.name: min(-(-ranks[layer.name] // m) * m, layer.min_dim) for layer in layers}
            result.append(Refactor(ranks, columns, activation_batches=self.activation_batches))
        return result

    def _check(self, layer) -> SetRank:
        b, r, s = self.buffer_of(layer.min_dim), layer.rank, layer.singular_values
        # The authors' code searches [r, r + b). Equation 7 is 1 at r + b: no trained column is left out.
        reach = max(1, b - 1) if self.criterion == "update" else b

        def ratio(candidate: int) -> float:
            if self.criterion == "update":
                return update_ratio(s, candidate, length=layer.min_dim)
            return eq7_ratio(s, candidate, start=r, buffer=b, window=self.window)

        growth = grow(ratio, r, threshold=self.threshold, limit=max(r, min(r + reach, layer.capacity - b)))
        return SetRank(
            layer=layer.name,
            rank=growth.rank,
            active=max(layer.active, growth.rank + b),
            explained_ratio=growth.explained_ratio,
            capped=growth.capped,
            column_norm=self.new_column_norm,
            absorb=True,
        )
