"""The rows of the tables: what the launcher is given, and the picture."""

import pytest

from inrank_megatron.config.cli import parse
from inrank_megatron.experiments.small_runs import SETTINGS
from inrank_megatron.experiments.tables2_3_5 import ARMS, draw, flags_of


@pytest.mark.parametrize("arm", ARMS, ids=[f"{arm.method}, {arm.precision}" for arm in ARMS])
def test_each_row_is_a_run_that_the_launcher_accepts(arm):
    rows = [
        {"arm": "dense", "rank": None},
        {"arm": "InRank 0.8", "rank": 7.0},
        {"arm": "InRank 0.9", "rank": 11.25},
    ]
    flags = flags_of(arm, rows, steps=200)
    config = parse(f"{SETTINGS} --train-iters 200 {flags}".split(), world_size=1).config
    assert config.training.fp16 == (arm.precision == "FP16")
    if arm.method == "fixed rank":
        assert config.inrank.rank == 12
    if arm.method.startswith("InRank"):
        assert config.inrank.threshold == float(arm.method.split()[1])
        assert (config.inrank.switch_iters, config.inrank.rank_check_interval) == (50, 10)


def test_the_picture_has_a_line_for_each_row():
    rows = [
        {"arm": arm.method, "precision": arm.precision, "test_perplexity": 100.0 + place, "rank": None}
        for place, arm in enumerate(ARMS)
    ]
    (axes,) = draw(rows).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        f"{arm.method}, {arm.precision}" for arm in ARMS
    ]
