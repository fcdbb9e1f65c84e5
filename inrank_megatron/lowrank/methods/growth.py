"""When InRank checks the ranks, and how far a check raises them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from inrank_megatron.errors import UserError
from inrank_megatron.fields import Count, Section, Share, Steps, setting
from inrank_megatron.lowrank.criteria.buffer import default_buffer, default_capacity
from inrank_megatron.lowrank.criteria.explained_ratio import Growth, eq7_ratio, grow, update_ratio
from inrank_megatron.lowrank.methods.changes import LayerView
from inrank_megatron.lowrank.methods.factorising import width
from inrank_megatron.lowrank.methods.settings import Run


class GrowthSettings(Section):
    """When ranks are checked, and what a check requires."""

    initial_rank: Count = setting("rank r at the start", 2)
    buffer: Count | None = setting(
        "columns b that train beyond the rank; left out: 100 x width / 768, at most 100; with a "
        "factor-optimizer other than adamw 3/8 of the width",
        None,
    )
    threshold: Share = setting("explained ratio that the rank must reach (the paper's alpha)", 0.9)
    rank_check_interval: Count = setting("steps between rank checks", 25)
    rank_check_start: Steps = setting("no rank check up to this step", 0)
    overlap_rank_check: bool | None = setting(
        "compute a rank check on the host during the next step and carry it out after that step; left "
        "out: on GPUs only",
        None,
    )
    max_rank: Count | None = setting("largest rank; left out: half the width minus the buffer", None)
    rank_criterion: Literal["update", "released", "eq7"] = setting(
        "what a check judges: update, the change since the columns were added; released, U V as in the "
        "authors' code; eq7, U V by the paper's equation 7",
        "update",
    )
    eq7_window: Literal["sliding", "fixed"] = setting(
        "window of singular values in equation 7: moves with the candidate rank, or ends at r + b", "sliding"
    )


@dataclass(frozen=True)
class GrowthRule:
    """Every ``interval`` steps each layer's rank rises until its explained ratio reaches the threshold.

    Args:
        initial_rank: r at the start (paper: 2).
        buffer: b, trained columns beyond r; None: as ``default_buffer``.
        threshold: alpha, the explained ratio to reach (paper: 0.9).
        interval: checks come at the multiples of this.
        after: checks come later than this step.
        criterion: ``update``, the released formula on the cumulative update ``U V - U0 V0``; ``released``,
            the same formula on ``U V`` (the authors' code); ``eq7``, equation 7 on ``U V``.
        window: reading of equation 7, ``sliding`` or ``fixed``.
        max_rank: the largest rank; None: r + b is half of min(O, I).
        orthogonalised: whether the optimizer orthogonalises the factors' steps; the default buffer depends
            on it.
    """

    initial_rank: int
    buffer: int | None
    threshold: float
    interval: int
    after: int = 0
    criterion: str = "update"
    window: str = "sliding"
    max_rank: int | None = None
    orthogonalised: bool = False

    @classmethod
    def from_config(cls, config: Run) -> "GrowthRule":
        inrank = config.inrank
        return cls(
            initial_rank=inrank.initial_rank,
            buffer=inrank.buffer,
            threshold=inrank.threshold,
            interval=inrank.rank_check_interval,
            after=inrank.rank_check_start,
            criterion=inrank.rank_criterion,
            window=inrank.eq7_window,
            max_rank=inrank.max_rank,
            orthogonalised=config.optimizer.factor_optimizer != "adamw",
        )

    def check_settings(self, min_dim: int) -> None:
        """Refuses ranks and a buffer that do not fit into a linear of this smaller dimension.

        Raises:
            UserError: the value, the rule and the remedy.
        """
        rank, buffer = self.initial_rank, self.buffer_of(min_dim)
        if rank + buffer > min_dim:
            raise UserError(
                f"initial_rank {rank} + buffer {buffer} = {rank + buffer}: must not exceed "
                f"{width(min_dim)}; lower --initial-rank or --buffer"
            )
        if self.max_rank is not None and not rank <= self.max_rank <= min_dim - buffer:
            raise UserError(
                f"max_rank = {self.max_rank}: must lie between initial_rank = {rank} and {min_dim - buffer} "
                f"({width(min_dim)}, less the buffer {buffer}); change --max-rank or --buffer"
            )

    @property
    def spectrum(self) -> Literal["update", "product"]:
        """The spectrum that a check judges."""
        return "update" if self.criterion == "update" else "product"

    def buffer_of(self, min_dim: int) -> int:
        if self.buffer is not None:
            return self.buffer
        return default_buffer(min_dim, orthogonalised=self.orthogonalised)

    def capacity(self, min_dim: int) -> int:
        """Columns to allocate for a linear of this smaller dimension."""
        b = self.buffer_of(min_dim)
        if self.max_rank is None:
            return default_capacity(min_dim, initial_rank=self.initial_rank, buffer=b)
        return min(min_dim, self.max_rank + b)

    def due(self, step: int) -> bool:
        """Whether a check follows ``step``."""
        return step > self.after and step % self.interval == 0

    def quiet_checks(self, step: int, layers: Sequence[LayerView]) -> int:
        """Checks since a rank last grew, or a check was lost, in any layer; a check at ``step`` counts."""
        last = max([self.after, *(layer.grown_at for layer in layers)])
        return max(0, step // self.interval - last // self.interval)

    def check(self, layer: LayerView) -> Growth:
        """The rank that the layer's spectrum requires, as far as one check may raise it."""
        b, r = self.buffer_of(layer.min_dim), layer.rank
        # The authors' code searches [r, r + b). Equation 7 is 1 at r + b: no trained column is left out.
        reach = b if self.criterion == "eq7" else max(1, b - 1)
        limit = max(r, min(r + reach, layer.capacity - b))
        return grow(partial(self.explained_ratio, layer), r, threshold=self.threshold, limit=limit)

    def re_estimated_rank(self, layer: LayerView) -> int:
        """The smallest rank that the layer's spectrum asks for, which may lie below the present one."""
        ratio = partial(self.explained_ratio, layer)
        return grow(ratio, 1, threshold=self.threshold, limit=layer.attainable_rank).rank

    def explained_ratio(self, layer: LayerView, rank: int) -> float:
        """The share of the layer's spectrum that ``rank`` explains by the criterion; 1: all of it."""
        s = layer.singular_values
        if self.criterion != "eq7":
            return update_ratio(s, rank, length=layer.min_dim)
        buffer = self.buffer_of(layer.min_dim)
        return eq7_ratio(s, rank, start=layer.rank, buffer=buffer, window=self.window)
