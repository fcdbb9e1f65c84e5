"""Perplexity is the same on any number of ranks, and that of a plain loop over all tokens."""

import math

import pytest

from tests.distributed.evaluation import SEQUENCE, TOKENS, WORDS, results
from tests.harness import run_ranks


@pytest.fixture(scope="module")
def alone():
    return run_ranks(results, 1, 1)[0]


def test_one_rank_agrees_with_a_plain_loop(alone):
    found, plain = alone
    for whole in found[:2]:
        assert whole["loss"] == pytest.approx(plain, rel=1e-6)
        assert whole["tokens"] == TOKENS - 1
        assert whole["word_perplexity"] == pytest.approx(math.exp(plain * (TOKENS - 1) / WORDS), rel=1e-5)
    for part in found[2:]:
        assert part["tokens"] == 3 * SEQUENCE and part["word_perplexity"] is None
        assert part["loss"] != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize(("world_size", "tp"), [(2, 1), (2, 2), (4, 1), (4, 2)])
def test_every_topology_agrees(alone, world_size, tp):
    for found, _ in run_ranks(results, world_size, tp):
        for one, other in zip(alone[0], found, strict=True):
            assert one["tokens"] == other["tokens"]
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
