"""Rank checks that overlap with the step after them: a decision of step s, carried out after step s + 1."""

import pytest
import torch

from tests.contract.layouts import LAYOUTS
from tests.contract.overlapped_checks import RESUMED, STEPS, SWITCH, compare
from tests.harness import run_ranks

EVERY_STEP, EVERY_OTHER = {"rank_check_interval": 1}, {"rank_check_interval": 2}
CASES = [("TP1 DP1", EVERY_STEP), ("TP2 SP", EVERY_OTHER), ("DP2", {**EVERY_OTHER, "zero_stage": 2})]


@pytest.mark.parametrize(("layout", "settings"), CASES, ids=str)
def test_a_check_is_carried_out_one_step_after_what_it_saw(layout, settings):
    """Ranks, the steps of growth, losses and weights are those of a training that decides at once and waits a
    step; so are those of one that goes on from a state between the two, to the bit, although there all ranks
    finish together what else their threads decide. At the switch and at the last step nothing is late. A
    planted check that sees the values of the next step sees others.
    """
    results = run_ranks(compare, LAYOUTS[layout].world_size, LAYOUTS[layout], settings)
    for result in results:
        oracle, ours, resumed = (result[name] for name in ("oracle", "overlapping", "resumed"))
        for what in ("ranks", "grown_at", "losses", "spectra"):
            assert ours[what] == oracle[what], what
            later = {step: value for step, value in ours[what].items() if step in resumed[what]}
            assert resumed[what] == later, what
        assert result["under way"] and min(resumed["spectra"]) == RESUMED
        checks = len([step for step in resumed["spectra"] if step != SWITCH])
        assert result["by all ranks"] == [0, checks]
        for name, tensor in ours["tensors"].items():
            assert torch.equal(tensor, oracle["tensors"][name]), name
            assert torch.equal(tensor, resumed["tensors"][name]), name
        interval = settings["rank_check_interval"]
        starts = [("start of a rank check", step) for step in range(interval, SWITCH, interval)]
        assert [work for work in result["begun"] if work[0] == starts[0][0]] == starts
        assert {("rank check", step + 1) for _, step in starts} <= set(result["begun"])
        assert list(ours["spectra"]) == sorted({*range(interval, SWITCH, interval), SWITCH})
        assert ours["ranks"][interval] == ours["ranks"][1] != ours["ranks"][SWITCH] == ours["ranks"][STEPS]
        if len(results) == 1:
            assert result["fault"]["spectra"] != ours["spectra"]
        assert results[0]["overlapping"]["ranks"] == ours["ranks"]
