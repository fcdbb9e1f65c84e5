"""``W = U V`` of a given rank from the first step on (the baseline of the paper's table 2)."""

from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.methods.base import PhaseShape
from inrank_megatron.lowrank.methods.changes import InitialiseFactors, Source
from inrank_megatron.lowrank.methods.factorising import OfGivenRank, StartSettings


class FixedRank(OfGivenRank):
    """``source``: ``spectral``, the truncated SVD of the standard initial weight, singular values shared
    evenly, or ``random-like-weight``, random directions whose product has that weight's norm.
    """

    name = "fixed-rank"
    page = "concepts/methods.md#fixed-rank"
    settings = (*OfGivenRank.settings, StartSettings)

    def __init__(self, rank: int, *, source: Source = "spectral"):
        super().__init__(rank)
        self.source = source

    @classmethod
    def from_config(cls, config, *, switch_step):
        random = config.inrank.factor_init == "random"
        return cls(config.inrank.rank, source="random-like-weight" if random else "spectral")

    @classmethod
    def check_settings(cls, run, shapes):
        source = run.inrank.factor_init
        if source not in (None, "spectral", "random"):
            raise UserError(
                f"factor_init = {source!r}: method {cls.name} starts from spectral or random; change "
                "--factor-init"
            )
        if source == "random" and run.training.pretrained_checkpoint is not None:
            raise UserError(
                "pretrained_checkpoint with factor_init = 'random': random factors without a W0 cannot "
                "use its weights; give --factor-init spectral, or drop --pretrained-checkpoint"
            )
        super().check_settings(run, shapes)

    @classmethod
    def phases(cls, run, columns, *, break_even):
        rank = columns.capacity
        return [PhaseShape("fixed rank", rank, rank, is_largest=True)]

    def structure(self, min_dims):
        ranks = {name: min(self.rank, d) for name, d in min_dims.items()}
        return {
            name: FactorSpec(capacity=r, active_columns=r, rank=r, frozen_base=False, final=True)
            for name, r in ranks.items()
        }

    def initialisation(self):
        return [InitialiseFactors(source=self.source)]
