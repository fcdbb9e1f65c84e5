"""Ranks at other thresholds, from what is recorded of a spectrum, against the criterion on all of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from inrank_megatron.lowrank.criteria.explained_ratio import grow, update_ratio
from inrank_megatron.reporting.run import read_run
from inrank_megatron.reporting.sureness import (
    config_of,
    mean_ranks_by_threshold,
    rank_at,
    untrained_rank,
)
from inrank_megatron.reporting.untrained import untrained_ranks

WIDTH, LEADING = 192, 64


def record(spectrum: np.ndarray) -> dict:
    return {
        "singular_values": list(spectrum[:LEADING]),
        "singular_value_sum": float(spectrum.sum()),
        "singular_value_square_sum": float((spectrum**2).sum()),
    }


@pytest.mark.parametrize("decay", [0.5, 3.0, 20.0, 60.0])
@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9, 0.95])
def test_leading_values_and_sums_give_the_rank_of_the_whole_spectrum(decay, threshold):
    spectrum = np.exp(-np.arange(150) / decay)
    expected = grow(
        lambda r: update_ratio(spectrum, r, length=WIDTH), 1, threshold=threshold, limit=len(spectrum)
    ).rank
    assert rank_at(record(spectrum), threshold, length=WIDTH) == (expected if expected <= LEADING else None)


def test_records_without_the_sum_of_squares_say_nothing():
    spectrum = np.exp(-np.arange(150) / 3)
    assert rank_at(record(spectrum) | {"singular_value_square_sum": None}, 0.9, length=WIDTH) is None


def test_a_spectrum_of_zeros_asks_for_rank_1():
    assert rank_at(record(np.zeros(5)), 0.9, length=WIDTH) == 1


def test_a_run(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run())
    found = mean_ranks_by_threshold(run)
    assert list(found) == [0.85, 0.9, 0.95]
    assert found[0.85] < found[0.9] < found[0.95]
    assert 40 < untrained_rank(run) < 96, "of the tiny preset's shapes"


def test_the_untrained_rank_is_that_of_the_layers_on_record(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run())
    ranks = untrained_ranks(config_of(run))
    assert untrained_rank(run) == pytest.approx(sum(ranks.values()) / len(ranks))


@pytest.mark.parametrize("settings", [{}, {"num_layers": 10**9, "model_preset": "tiny"}, {"lr": "many"}])
def test_settings_that_do_not_describe_the_layers_leave_it_open(make_run, settings) -> None:
    run = replace(read_run(make_run()), settings=settings)
    assert untrained_rank(run) is None and mean_ranks_by_threshold(run) == {}


def test_a_dense_run_has_nothing_to_be_sure_of(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run(method="dense"))
    assert untrained_rank(run) is None and mean_ranks_by_threshold(run) == {}
