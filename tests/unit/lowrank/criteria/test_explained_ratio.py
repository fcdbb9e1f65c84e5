"""Explained ratios and growth, against slow oracles and against cases worked out by hand."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from inrank_megatron.lowrank.criteria.explained_ratio import eq7_ratio, grow, update_ratio
from inrank_megatron.lowrank.linalg.spectra import Product, singular_values
from tests.harness import run_ranks


def variance(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values)


def released_ratio(spectrum: list[float], r: int, length: int) -> float:
    """The authors' criterion, as slowly as can be: the whole vector, its first r entries zeroed."""
    padded = [spectrum[i] if i < len(spectrum) else 0.0 for i in range(length)]
    tail = [0.0 if i < r else value for i, value in enumerate(padded)]
    return 1.0 - variance(tail) / variance(padded)


def window_ratio(spectrum: list[float], r: int, start: int, buffer: int, window: str) -> float:
    """Equation 7: entries r+1 ... over entries 1 ..., up to r+b (sliding) or start+b (fixed)."""
    end = r + buffer if window == "sliding" else start + buffer
    padded = [spectrum[i] if i < len(spectrum) else 0.0 for i in range(end)]
    return 1.0 - variance(padded[r:]) / variance(padded) if r < end else 1.0


@pytest.fixture(params=range(5), ids="seed{}".format)
def spectrum(request) -> list[float]:
    """24 values that fall roughly geometrically."""
    numbers = np.random.default_rng(request.param)
    return sorted(numbers.exponential(0.8 ** np.arange(24)), reverse=True)


def test_update_ratio_by_hand():
    # (3, 1, 0, 0): mean 1, variance 6/4. Without the first, (0, 1, 0, 0): mean 1/4, variance 3/16.
    assert update_ratio([3.0, 1.0], 1, length=4) == pytest.approx(1 - (3 / 16) / (6 / 4))
    assert update_ratio([3.0, 1.0], 0, length=4) == 0.0
    assert update_ratio([3.0, 1.0], 2, length=4) == 1.0


def test_update_ratio_agrees_with_the_released_form(spectrum):
    for length in (24, 40):
        for r in range(25):
            expected = released_ratio(spectrum, r, length)
            assert update_ratio(spectrum, r, length=length) == pytest.approx(expected, abs=1e-12)


def test_update_ratio_ignores_values_past_the_smaller_dimension(spectrum):
    """2 k factors of Delta give more values than the matrix has; the surplus is rounding."""
    assert update_ratio([*spectrum, 1e-17], 3, length=24) == update_ratio(spectrum, 3, length=24)


def test_eq7_by_hand():
    s = [4.0, 2.0, 1.0, 1.0]
    # sliding at r = 2, b = 2: tail (1, 1), variance 0.
    assert eq7_ratio(s, 2, start=2, buffer=2) == 1.0
    # at r = 1, b = 2: tail (2, 1), variance 1/4; all (4, 2, 1), mean 7/3, variance 14/9.
    assert eq7_ratio(s, 1, start=1, buffer=2) == pytest.approx(1 - (1 / 4) / (14 / 9))
    # fixed window of start 1: the candidate 2 leaves the tail (1,), variance 0.
    assert eq7_ratio(s[:3], 2, start=1, buffer=2, window="fixed") == 1.0
    # sliding: the candidate 2 looks at a fourth value that no column carries, so the tail is (1, 0).
    expected = 1 - (1 / 4) / variance([4.0, 2.0, 1.0, 0.0])
    assert eq7_ratio(s[:3], 2, start=1, buffer=2, window="sliding") == pytest.approx(expected)


@pytest.mark.parametrize("window", ["sliding", "fixed"])
def test_eq7_agrees_with_its_window(spectrum, window):
    start, buffer = 4, 6
    trained = spectrum[: start + buffer]
    for r in range(start, start + buffer + 1):
        expected = window_ratio(trained, r, start, buffer, window)
        assert eq7_ratio(trained, r, start=start, buffer=buffer, window=window) == pytest.approx(
            expected, abs=1e-12
        )


def test_eq7_with_exactly_r_columns_is_always_1(spectrum):
    """Why the buffer exists: taken without one, equation 7 never lets a rank grow."""
    for r in (1, 2, 7):
        assert eq7_ratio(spectrum[:r], r, start=r, buffer=0) == 1.0


def test_all_zero_spectrum_is_explained():
    """Nothing was learned, so nothing is missing and no rank grows."""
    assert update_ratio([0.0] * 8, 2, length=16) == 1.0
    assert eq7_ratio([0.0] * 8, 2, start=2, buffer=6) == 1.0


def test_growth_takes_the_smallest_rank_that_suffices():
    ratios = {2: 0.1, 3: 0.5, 4: 0.92, 5: 0.95}
    growth = grow(ratios.__getitem__, 2, threshold=0.9, limit=5)
    assert (growth.rank, growth.explained_ratio, growth.capped) == (4, 0.92, False)


def test_growth_stops_at_the_limit_and_says_so():
    growth = grow(lambda r: r / 10, 2, threshold=0.9, limit=5)
    assert (growth.rank, growth.explained_ratio, growth.capped) == (5, 0.5, True)


def test_rank_never_falls():
    """A rank that explains more than enough stays."""
    assert grow(lambda r: 1.0, 7, threshold=0.5, limit=9).rank == 7


def test_rank_at_its_limit_is_capped_only_if_it_falls_short():
    assert grow(lambda r: 0.5, 5, threshold=0.9, limit=5).capped
    assert not grow(lambda r: 0.9, 5, threshold=0.9, limit=5).capped


def test_higher_thresholds_never_give_lower_ranks(spectrum):
    def rank_at(threshold):
        return grow(lambda r: update_ratio(spectrum, r, length=32), 1, threshold=threshold, limit=24).rank

    ranks = [rank_at(threshold) for threshold in np.linspace(0.05, 1.0, 20)]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1]


def test_published_rank_is_the_fixed_point_of_untrained_factors():
    """The paper's rank 152 (GPT-2 small, threshold 0.8) needs no data at all.

    The released criterion is iterated on the first r + 100 columns of an untrained product of two
    Kaiming-initialised factors, at width 768 x 3072 and starting from r = 2, until the rank stands still.
    """
    visited = run_ranks(iterate_released_criterion, 1)[0]
    assert abs(visited[-1] - 152) <= 2, visited


def iterate_released_criterion(rank: int, world_size: int) -> list[int]:
    """The ranks on the way to the fixed point."""
    left = torch.nn.init.kaiming_uniform_(torch.empty(3072, 384), a=5**0.5)
    right = torch.nn.init.kaiming_uniform_(torch.empty(384, 768), a=5**0.5)
    buffer, ranks = 100, [0, 2]
    while ranks[-1] != ranks[-2]:
        r = ranks[-1]
        product = Product("product", left[:, : r + buffer], right[: r + buffer])
        s = singular_values([product], dist.group.WORLD, step=0)[0].tolist()
        limit = min(r + buffer - 1, 384 - buffer)
        ranks.append(grow(lambda c, s=s: update_ratio(s, c, length=768), r, threshold=0.8, limit=limit).rank)
    return ranks
