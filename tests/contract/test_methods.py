"""The contract of every method: it learns, grows and starts as it says. On the engine's settings:
`test_settings.py`.

A new method is one row of ``METHODS`` in ``sessions.py``. Gradients are accumulated over micro-batches and
clipped at every step.
"""

import functools
import itertools

import pytest

from tests.contract.compare import FEWER, largest_difference
from tests.contract.sessions import CHECK, LAYOUTS, METHODS, SIZES, first_losses, run
from tests.harness import run_ranks


@functools.cache
def results(method: str, layout: str) -> list[dict]:
    return run_ranks(run, LAYOUTS[layout].world_size, method, LAYOUTS[layout], {}, FEWER[method], timeout=240)


@pytest.mark.parametrize("layout", ["TP2 SP apart", "TP4 SP"])
def test_fp32_is_the_serial_training(layout, method="inrank-efficient"):
    """The layouts that `test_settings.py` leaves out. Losses to 2e-6, gradient norms to 3e-5, the same ranks
    at every check: only rounding differs.
    """
    serial = results(method, "TP1 DP1")[0]
    for result in results(method, layout):
        assert largest_difference(result["losses"], serial["losses"]) < 2e-6
        assert largest_difference(result["grad_norms"], serial["grad_norms"]) < 3e-5
        assert result["ranks"] == serial["ranks"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_under_clipping(method):
    """Also a guard of this suite: a comparison of runs that stand still or never clip would show little.

    What InRank lowers by its start from the first batch's gradient is that batch's loss alone, so the loss
    before training is the dense model's.
    """
    result = results(method, "TP1 DP1")[0]
    before = results("llama-dense" if "llama" in method else "dense", "TP1 DP1")[0]["losses"][0]
    assert result["losses"][-1] < 0.99 * before
    assert min(result["grad_norms"]) > SIZES["clip_grad"]


@pytest.mark.parametrize("method", [name for name in METHODS if "inrank" in name])
def test_ranks_grow_and_never_fall(method):
    """The story of an adaptive method whose ranks stayed at their initial values for a whole training,
    without a word (huggingface/peft issue 1801). Only ranks found anew at the switch may fall, there.
    """
    history = results(method, "TP1 DP1")[0]["ranks"]
    if method == "inrank-efficient-refound":
        switch = 4 * CHECK - 1
        grown, found = history[switch - 1], history[switch]
        assert all(2 < found[name] < grown[name] for name in grown)
        assert history[switch:] == [found] * len(history[switch:])
        history = history[:switch]
    for earlier, later in itertools.pairwise(history):
        assert all(later[name] >= earlier[name] for name in earlier)
    assert max(history[-1].values()) > 2


@pytest.mark.parametrize("layout", ["TP1 DP1", "TP2 SP"])
def test_inrank_starts_at_the_standard_initialisation(layout):
    """Where the first factors are absorbed into W0 the loss before the first step is the dense model's;
    else there is a step down the gradient in it.
    """
    same = ["lora", "relora", "inrank-efficient-eq7", "warm-start"]
    others = ["fixed-rank", "inrank", "inrank-efficient-paper"]
    where = LAYOUTS[layout]
    losses = run_ranks(first_losses, where.world_size, where, ["dense", *same, *others], {})[0]
    for method in same:
        assert losses[method] == pytest.approx(losses["dense"], rel=1e-6)
    for method in others:
        assert losses[method] != pytest.approx(losses["dense"], rel=1e-6)
    assert max(losses["inrank"], losses["inrank-efficient-paper"]) < losses["dense"]


def test_llama_starts_at_the_standard_initialisation():
    where = LAYOUTS["TP2 SP"]
    names = ["llama-dense", "llama-inrank", "llama-relora", "llama-lora", "llama-inrank-efficient"]
    dense, inrank, *others = run_ranks(first_losses, where.world_size, where, names, {})[0].values()
    assert others == pytest.approx([dense] * len(others), rel=1e-6)
    assert inrank < dense
