"""The contract of every method: it trains the same on every layout of ranks.

A new method is one row of ``METHODS`` in ``sessions.py``. Gradients are accumulated over micro-batches and
clipped at every step.
"""

import functools
import itertools

import pytest

from tests.contract.sessions import LAYOUTS, METHODS, SIZES, first_losses, run
from tests.harness import run_ranks

STEPS = dict.fromkeys(METHODS, 25) | dict.fromkeys(("dense", "fixed-rank", "fixed-rank-random", "lora"), 15)
STEPS |= {"inrank": 20, "inrank-efficient": 50}
"""Checks come every 5 steps, the switch after 20, restarts every 10; fewer steps where nothing changes."""


@functools.cache
def results(method: str, layout: str, bf16: bool = False) -> list[dict]:
    return run_ranks(
        run, LAYOUTS[layout].world_size, method, LAYOUTS[layout], bf16, STEPS[method], timeout=240
    )


def largest_difference(values: list[float], reference: list[float]) -> float:
    """Relative, over the steps."""
    return max(abs(a - b) / abs(b) for a, b in zip(values, reference, strict=True))


EVERYWHERE = ("TP2 SP", "TP2 without SP", "DP2", "TP2 SP DP2")
PAIRS = [
    *itertools.product(METHODS, EVERYWHERE),
    ("inrank-efficient", "TP2 SP apart"),
    ("inrank-efficient", "TP4 SP"),
]


@pytest.mark.parametrize(("method", "layout"), PAIRS)
def test_fp32_is_the_serial_training(method, layout):
    """Losses to 2e-6, gradient norms to 3e-5, the same ranks at every check: only rounding differs."""
    serial = results(method, "TP1 DP1")[0]
    for result in results(method, layout):
        assert largest_difference(result["losses"], serial["losses"]) < 2e-6
        assert largest_difference(result["grad_norms"], serial["grad_norms"]) < 3e-5
        assert result["ranks"] == serial["ranks"]


@pytest.mark.parametrize("layout", ["TP2 SP", "DP2", "TP2 SP DP2"])
def test_bf16_is_the_serial_training(layout):
    """BF16 keeps 8 bits (a relative 4e-3 a value), so sums over ranks in another order change every gradient;
    the mean loss over many tokens stays within 3e-3 of the serial one, and ranks within 1."""
    method = "inrank-efficient"
    serial = results(method, "TP1 DP1", bf16=True)[0]
    for result in results(method, layout, bf16=True):
        assert largest_difference(result["losses"], serial["losses"]) < 3e-3
        for ranks, expected in zip(result["ranks"], serial["ranks"], strict=True):
            assert all(abs(ranks[name] - expected[name]) <= 1 for name in expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_under_clipping(method):
    """Also a guard of this suite: a comparison of runs that stand still or never clip would show little."""
    result = results(method, "TP1 DP1")[0]
    assert result["losses"][-1] < 0.99 * result["losses"][0]
    assert min(result["grad_norms"]) > SIZES["clip_grad"]


@pytest.mark.parametrize("method", [name for name in METHODS if name.startswith("inrank")])
def test_ranks_grow_and_never_fall(method):
    history = results(method, "TP1 DP1")[0]["ranks"]
    for earlier, later in itertools.pairwise(history):
        assert all(later[name] >= earlier[name] for name in earlier)
    assert max(history[-1].values()) > 2


@pytest.mark.parametrize("layout", ["TP1 DP1", "TP2 SP"])
def test_inrank_starts_at_the_standard_initialisation(layout):
    """The first factors are absorbed into W0: before the first step the loss is the dense model's."""
    losses = run_ranks(first_losses, LAYOUTS[layout].world_size, LAYOUTS[layout])[0]
    for method in ("lora", "relora", "inrank", "inrank-efficient", "inrank-efficient-eq7"):
        assert losses[method] == pytest.approx(losses["dense"], rel=1e-6)
    assert losses["fixed-rank"] != pytest.approx(losses["dense"], rel=1e-6)
