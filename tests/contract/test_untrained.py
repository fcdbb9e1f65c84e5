"""The released variant on the engine, without a single step: it grows to the untrained fixed point."""

from statistics import fmean

from inrank_megatron.reporting.untrained import untrained_ranks
from tests.contract.cases import CHECK
from tests.contract.layouts import LAYOUTS
from tests.contract.sessions import build, configuration
from tests.harness import run_ranks

LAYOUT, SETTINGS = LAYOUTS["TP1 DP1"], {"threshold": 0.8}


def grown_ranks(rank: int, world_size: int) -> dict[str, int]:
    """Ranks once checks change them no more; no weight is trained between the checks."""
    session = build("inrank-efficient-released", LAYOUT, **SETTINGS).start()
    session.step = CHECK
    ranks: dict[str, int] = {}
    while ranks != session.engine.ranks:
        ranks = dict(session.engine.ranks)
        session.apply(session.decide())
    return ranks


def test_rank_checks_without_training_converge_to_the_fixed_point():
    [ranks] = run_ranks(grown_ranks, 1)
    expected = untrained_ranks(configuration("inrank-efficient-released", LAYOUT, **SETTINGS))
    for leaf, shape in (("linear_fc1", (256, 64)), ("linear_fc2", (64, 256))):
        drawn = fmean(rank for name, rank in ranks.items() if name.endswith(leaf))
        assert abs(drawn - expected[shape]) <= 1.5
        assert drawn > 10, "grown far beyond the rank 2 of the start"
