"""From the run's settings to its method. A new method is one file and one line here."""

from inrank_megatron.config import Config
from inrank_megatron.methods.changes import Method
from inrank_megatron.methods.dense import Dense
from inrank_megatron.methods.fixed_rank import FixedRank
from inrank_megatron.methods.inrank import InRank


def make_method(config: Config, *, switch_step: int | None) -> Method:
    """The method that ``config.training.method`` names; ``switch_step`` from ``methods/schedule.py``."""
    if config.training.method == "dense":
        return Dense()
    if config.training.method == "fixed-rank":
        return FixedRank(config.inrank.rank)
    inrank = config.inrank
    return InRank(
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
    )
