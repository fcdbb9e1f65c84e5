"""Spectra of an update of known rank, read from run folders; what the summary says of them."""

from dataclasses import replace

import pytest
import torch

from inrank_megatron.experiments.relora import (
    ARMS,
    LINEARS,
    SHOWN,
    draw,
    effective_rank,
    summarised,
    update_spectra,
)
from tests.unit.interop.models import make_weights, write_run


def test_the_update_of_a_run_with_factors_is_their_product(tmp_path):
    """The same W0 in both runs, so what is between them is U V of each linear, whose ranks differ."""
    first = make_weights("gpt2", "dense, QKV separate")
    last = make_weights("gpt2", "first phase, QKV separate")
    grown = replace(last, read=lambda name: (last if name[-2:] in (".U", ".V") else first).read(name))
    folders = [write_run(weights, tmp_path / name) for name, weights in (("first", first), ("last", grown))]
    found = update_spectra(*folders, step=7)
    assert found.keys() == {(kind, block) for kind in LINEARS for block in range(2)}
    for kind, module in {"attention.k": "self_attention.linear_qkv.k", "mlp.down": "mlp.linear_fc2"}.items():
        own = f"decoder.layers.1.{module}"
        expected = torch.linalg.svdvals(last.read(f"{own}.U").double() @ last.read(f"{own}.V").double())
        values = torch.tensor(found[kind, 1], dtype=torch.float64)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5 * float(expected[0]))
        rank = last.factors[own].active_columns
        assert summarised([found[kind, 1]])["above_1_percent"] <= rank
        assert values[rank - 1] > 100 * values[rank]


def test_the_summary_counts_values_and_weighs_them():
    assert effective_rank([2.0, 2.0, 2.0, 0.0]) == pytest.approx(3)
    assert effective_rank([5.0, 0.0]) == pytest.approx(1)
    found = summarised([[1.0, 0.5, 0.05, 0.0], [1.0, 0.5, 0.05, 0.0]])
    assert found["above_1_percent"] == 3 and found["above_10_percent"] == 2
    assert 2 < found["effective_rank"] < 3


def test_every_arm_starts_from_one_that_ran_before_it():
    names = ["base"]
    for arm in ARMS:
        assert arm.start in names, arm
        names.append(arm.name)
    assert SHOWN.keys() <= set(names)


def test_the_picture_has_a_panel_for_each_linear():
    curves = [{"arm": arm, "matrix": matrix, "values": [2.0, 1.0]} for arm in SHOWN for matrix in LINEARS]
    panels = draw(curves).axes
    assert [panel.get_title() for panel in panels] == list(LINEARS)
    assert len(panels[0].get_lines()) == len(SHOWN) + 1  # and the line at a tenth
