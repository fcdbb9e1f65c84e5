"""Both algorithms on one planted problem, with fewer steps than the quick run."""

import pytest

from inrank_megatron.experiments import glrl_inrank
from inrank_megatron.experiments.glrl_inrank import CASES, measure


def test_both_find_the_planted_rank_from_zero_and_w0_makes_it_another(monkeypatch):
    monkeypatch.setattr(glrl_inrank, "STEPS", 1500)
    said: list[str] = []
    found = measure(quick=True, notify=said.append)
    assert said == ["sensing, rank 4, seed 0"] and len(found.rows) == 1 + len(CASES)
    greedy, *grown = found.rows
    assert greedy["found_rank"] == 4 and greedy["relative_error"] < 1e-6
    ranks = {(row["W0"], row["alpha"]): row["found_rank"] for row in grown}
    assert ranks[0.0, 0.99] == 4 and ranks[0.0, 0.9] == 3 and ranks[1.0, 0.99] > 5
    error = {(row["W0"], row["alpha"]): row["error_of_rank"] for row in grown}
    assert error[0.0, 0.99] < 0.05 and error[1.0, 0.99] > 1
    # The smallest of 1, 0.8, 0.6 and 0.4 is left to the buffer: 0.4 over the norm of all.
    assert error[0.0, 0.9] == pytest.approx(0.4 / 2.16**0.5, abs=0.01)
    assert len(glrl_inrank.draw(found.curves).axes) == 4
