"""The rank of a sweep by hand, and a real run of each kind of arm."""

import pytest

from inrank_megatron.errors import UserError
from inrank_megatron.experiments.figure4 import CRITERIA, draw, summarised, sweep_rank
from inrank_megatron.experiments.small_runs import SmallRuns


def row(arm: str, rank: float | None, perplexity: float, untrained: float | None = None) -> dict:
    return {"arm": arm, "rank": rank, "untrained_rank": untrained, "test_perplexity": perplexity}


def test_the_rank_of_a_sweep_is_the_smallest_within_two_percent_of_the_best():
    values = {2: 130.0, 8: 103.0, 16: 101.9, 32: 100.0, 48: 100.5}
    rows = [row(f"fixed rank {rank}", float(rank), value) for rank, value in values.items()]
    assert sweep_rank([*rows, row("dense", None, 90.0)]) == 16


def test_the_picture_has_a_cross_for_each_criterion_and_the_untrained_rank():
    rows = [row("fixed rank 2", 2.0, 130.0), row("fixed rank 8", 8.0, 100.0), row("dense", None, 90.0)]
    crosses = [row(f"InRank, {name}", 5.0 + place, 95.0, 20.0) for place, name in enumerate(CRITERIA)]
    (axes,) = draw(rows + crosses).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "fixed rank",
        "dense",
        *(f"InRank, {name}" for name in CRITERIA),
        "released, untrained factors",
    ]


def test_a_run_leaves_its_rank_beside_that_of_untrained_factors(tmp_path):
    said: list[str] = []
    flags = f"{CRITERIA['released']} --switch-iters 16 --rank-check-interval 2 --lr-warmup-iters 5"
    run = SmallRuns(tmp_path, said.append).train("released", flags, steps=17)
    found = summarised("InRank, released", run)
    # After so few steps at a small rate the factors are almost those that nobody trained.
    assert found["untrained_rank"] == pytest.approx(found["rank"], abs=3)
    assert 300 < found["test_perplexity"] < 1100 and len(said) == 1
    assert found["parameters"] == run.summary["parameters"]["phase_2"]


def test_a_run_that_fails_ends_the_experiment_with_its_last_line(tmp_path):
    with pytest.raises(UserError, match=r"wrong: the run failed with status 1: rank 0: error: .*--rank"):
        SmallRuns(tmp_path, print).train("wrong", "--method fixed-rank", steps=30)
