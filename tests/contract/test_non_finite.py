"""What becomes of a value that is not finite: an error before the update, or, in FP16, a skipped step.

It appears on one rank alone. All ranks must say and do the same, or the next collective would hang.
"""

import math

import pytest

from tests.contract.layouts import LAYOUTS
from tests.contract.non_finite import (
    CHECK,
    CULPRIT,
    MODULE,
    PARAMETER,
    SWITCHED,
    gives_up,
    left_out,
    overflowing,
    scaling_over_changes,
    spoilt_steps,
)
from tests.harness import run_ranks

OFFLOAD = {"offload_optimizer": True}
ENGINES = [
    ("DP2", {"zero_stage": 0}),
    ("TP2 SP", {"zero_stage": 0}),
    ("DP2", {"zero_stage": 1}),
    ("TP2 SP", {"zero_stage": 2}),
    ("DP2", {"zero_stage": 2, **OFFLOAD}),
    ("DP2", {"zero_stage": 3}),
    ("TP2 SP", {"zero_stage": 3, **OFFLOAD}),
    ("DP2", {"zero_stage": 0, "bf16": True}),
    ("TP2 SP", {"zero_stage": 1, "bf16": True}),
    ("DP2", {"zero_stage": 1, "bf16": True, **OFFLOAD}),
    ("DP2", {"zero_stage": 2, "bf16": True}),
    ("TP2 SP", {"zero_stage": 3, "bf16": True}),
]
PLACES = {
    "parameter": ("the loss is nan", f"the parameter {PARAMETER} is not finite on rank"),
    "output": ("the loss is nan", f"the output of {MODULE} is not finite on rank {CULPRIT}"),
    "gradient": (
        "but the gradient norm is not finite",
        f"the loss's gradient at the output of {MODULE} is not finite on rank {CULPRIT}",
    ),
}


@pytest.mark.parametrize(("layout", "settings"), ENGINES, ids=str)
def test_non_finite_value_stops_every_rank_before_the_update(layout, settings):
    value = math.inf if settings["zero_stage"] in (0, 3) else math.nan
    results = run_ranks(spoilt_steps, 2, LAYOUTS[layout], settings, value, timeout=60)
    for place, (what, where) in PLACES.items():
        messages = {result[place][0] for result in results}
        assert len(messages) == 1, messages
        message = messages.pop()
        assert message.startswith("step 2: ") and what in message and where in message, message
        assert "\n" not in message and "--lr" in message and "--resume auto" in message
        assert [result[place][1] for result in results] == [[], []], place


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("TP2 SP", {"zero_stage": 1}),  # runs as stage 0
        ("TP2 SP", {"zero_stage": 1, "bf16": True}),
        ("DP2", {"zero_stage": 1}),
        ("TP2 SP", {"zero_stage": 0, "factor_optimizer": "muon", "matrix_optimizer": "muon"}),
        ("DP2", {"zero_stage": 2, **OFFLOAD}),
        ("DP2", {"zero_stage": 2, "fp16": True}),
        ("DP2", {"zero_stage": 3}),
    ],
    ids=str,
)
def test_a_forbidden_update_leaves_no_trace(layout, settings):
    results = run_ranks(left_out, 2, LAYOUTS[layout], settings)
    for result in results:
        assert result["forbidden"] and result["changed"] == [] and result["after"] == []
        assert result["same scale"]
        assert len(result["times"]) == 2 and min(result["times"]) > 0
    assert results[0]["times"] == results[1]["times"]


SCALED = [
    ("DP2", {"zero_stage": 1}),
    ("TP2 SP", {"zero_stage": 1}),
    ("DP2", {"zero_stage": 2, **OFFLOAD}),
    ("TP2 SP", {"zero_stage": 2}),
    ("DP2", {"zero_stage": 3}),
    ("TP2 SP", {"zero_stage": 3, **OFFLOAD}),
]


@pytest.mark.parametrize(("layout", "settings"), SCALED, ids=str)
def test_loss_scaling_skips_the_same_steps_on_every_rank(layout, settings):
    one, other = run_ranks(overflowing, 2, LAYOUTS[layout], settings, 30)
    assert one["skipped"] == other["skipped"] and one["scales"] == other["scales"]
    first, lost = one["skipped"].index(False), sum(one["skipped"])
    # At the largest scale that a step has borne, a later one of larger gradients may overflow. With 2^40 and
    # 30 steps that is neither the last step nor the only one with a rank check, which an overflow loses.
    assert 5 < first <= lost <= first + 1 < 25
    # Each overflow halves the scale, but for the first, which is forgiven (hysteresis).
    assert one["scales"] == [2.0 ** (41 - max(1, sum(one["skipped"][:n]))) for n in range(1, 31)]
    for result in (one, other):
        assert result["changed"] == []
        assert result["counted"] == (lost, 0)
        for number, (before, after) in enumerate(result["ranks"], start=1):
            grew = any(a > b for a, b in zip(after, before, strict=True))
            assert grew or before != result["ranks"][0][0] if CHECK * number > first else after == before
        assert result["losses"][1] < result["losses"][0] - 0.01
        assert result["spoilt"] == (True, math.inf, [])
        assert result["next"] is False
        # A lost check counts for patience as growth does.
        in_vain = range(CHECK, first + 1, CHECK)
        assert result["grown_at"][: len(in_vain)] == [{step} for step in in_vain]
        assert max(result["grown_at"][-1]) > first
    assert one["ranks"] == other["ranks"]
    assert one["ranks"][-1][1] != one["ranks"][0][0], "no rank grew at all"


@pytest.mark.parametrize(("layout", "settings"), SCALED[::2], ids=str)
def test_loss_scaling_state_survives_switch_and_resume(layout, settings):
    one, other = run_ranks(scaling_over_changes, 2, LAYOUTS[layout], settings)
    for result in (one, other):
        before, switched, resumed = result["records"]
        assert before == switched == resumed
        assert before["skipped"] == result["skipped"] > 2
        assert before["state"] == result["state"]
        assert before["state"]["cur_iter"] == SWITCHED and before["state"]["last_overflow_iter"] >= 2
        assert result["base"] is False, "it has not switched"
        assert result["steps"][0] == result["steps"][1]
    assert one["records"] == other["records"]


STOPS = [
    ("DP2", {"overflow_limit": 3}, 3, "3 steps in a row overflowed float16", "overflow_limit = 3"),
    ("TP2 SP", {"overflow_limit": 1, "zero_stage": 3}, 1, "1 steps in a row", "overflow_limit = 1"),
    ("DP2", {"initial_loss_scale": 1.0, "hysteresis": 1}, 1, "loss scale 1 (", "the smallest there is"),
    ("TP2 SP", {"initial_loss_scale": 2.0, "zero_stage": 2}, 3, "loss scale 1 (", "the smallest there is"),
    ("DP2", {"initial_loss_scale": 1.0, "zero_stage": 3}, 2, "loss scale 1 (", "the smallest there is"),
]


@pytest.mark.parametrize(("layout", "settings", "at", "what", "why"), STOPS, ids=str)
def test_endless_overflow_stops_every_rank_with_advice(layout, settings, at, what, why):
    one, other = run_ranks(gives_up, 2, LAYOUTS[layout], settings)
    assert one == other
    step, message = one
    assert step == at and message.startswith(f"step {at}: "), one
    assert what in message and why in message and "--lr" in message and "--bf16" in message, message
    assert "\n" not in message
