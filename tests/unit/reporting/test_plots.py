"""What the figures show, read back from their axes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot

from inrank_megatron.reporting.plots import figures, whole_numbers
from inrank_megatron.reporting.run import depth, kind_of, read_run


def test_a_low_rank_run_has_every_figure_and_leaves_no_global_state(make_run: Callable[..., Path]) -> None:
    made = figures(read_run(make_run()))
    assert list(made) == ["loss", "ranks", "spectrum", "cost", "throughput"]
    assert pyplot.get_fignums() == []


def test_a_dense_run_has_neither_ranks_nor_a_comparison(make_run: Callable[..., Path]) -> None:
    assert list(figures(read_run(make_run(method="dense")))) == ["loss", "throughput"]


def test_loss_shows_all_splits_the_switch_and_perplexity(make_run: Callable[..., Path]) -> None:
    figure = figures(read_run(make_run()))["loss"]
    [axes] = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert len(lines["training"].get_xdata()) == 120
    assert list(lines["validation"].get_xdata()) == [40, 80, 120]
    assert list(lines["test"].get_ydata()) == [4.15]
    assert lines["unigram model (validation)"].get_ydata()[0] == pytest.approx(np.log(402))
    assert any(list(line.get_xdata()) == [60, 60] for line in axes.lines), "the switch"
    figure.draw_without_rendering()
    ticks = axes.child_axes[0].get_yticks()
    assert {100, 200, 500} <= set(ticks)


@pytest.mark.parametrize(
    "kind", ["mlp.linear_fc1", "self_attention.linear_qkv", "self_attention.linear_qkv.q"]
)
def test_a_layer_is_named_by_its_linear_and_its_block(kind: str) -> None:
    layer = f"decoder.layers.12.{kind}"
    assert (depth(layer), kind_of(layer)) == (12, kind.partition(".")[2])


def test_ranks_are_one_line_a_layer_in_a_panel_a_kind(make_run: Callable[..., Path]) -> None:
    first, second, _ = figures(read_run(make_run()))["ranks"].axes
    assert [first.get_title(), second.get_title()] == ["linear_fc1", "linear_fc2"]
    layers = [line for line in first.lines if len(line.get_xdata()) > 2]
    assert len(layers) == 4
    assert list(layers[0].get_xdata()) == [0, 10, 20, 30, 40, 50, 60]
    assert layers[0].get_ydata()[0] == 2 and layers[0].get_ydata()[-1] == 9
    assert (
        len(
            {
                line.get_color() if isinstance(line.get_color(), str) else tuple(line.get_color())
                for line in layers
            }
        )
        == 4
    )


def test_ticks_of_ranks_are_whole_numbers_and_few_in_narrow_panels() -> None:
    for panels, most in ((2, 5), (6, 3)):
        axes = pyplot.Figure().subplots()
        axes.plot([0, 160], [8, 8])
        whole_numbers(axes, panels=panels)
        shown = [tick for tick in axes.get_yticks() if 7.7 < tick < 8.3]
        assert shown == [8] and len([tick for tick in axes.get_xticks() if 0 <= tick <= 160]) <= most


def test_the_spectrum_is_normalised_and_solid_up_to_the_rank(make_run: Callable[..., Path]) -> None:
    panels = figures(read_run(make_run()))["spectrum"].axes
    assert len(panels) == 8, "two linears of the first and the last block, two checks"
    whole, solid, _ = (patch.get_data() for patch in panels[1].patches)
    assert panels[1].get_title() == "block 0, linear_fc1: step 50"
    assert sum(whole.values) == pytest.approx(1)
    assert len(whole.values) == 32 and len(solid.values) == 9
    assert "explained 0.900" in panels[1].texts[0].get_text()


def test_no_bar_of_a_spectrum_is_cut_off(make_run: Callable[..., Path]) -> None:
    """Both checks of a layer share an axis; it once was as high as the bars of the first."""
    run = read_run(make_run())
    ranks = [
        {
            **record,
            "singular_values": [9.0 if record["step"] >= 50 else 2.0, 1.0, 1.0],
            "singular_value_sum": None,
        }
        for record in run.ranks
    ]
    for panel in figures(replace(run, ranks=ranks))["spectrum"].axes:
        bottom, top = panel.get_ylim()
        assert bottom == 0 and top > max(panel.patches[0].get_data().values)


def test_a_long_run_is_averaged_and_a_diverged_one_leaves_a_gap(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run())
    values = {"kind": "train", "tokens_per_second": 1.0, "phase": 1}
    train = [{**values, "step": step, "loss": None if step == 4500 else 2.0} for step in range(1, 9001)]
    [axes] = figures(replace(run, train=train))["loss"].axes
    steps, losses = axes.lines[0].get_data()
    assert len(steps) == 1000
    assert (steps[0], steps[-1]) == (5, 8996)
    assert np.isnan(losses).sum() == 1 and np.nanmax(losses) == 2.0


def test_a_spectrum_of_zeros_can_be_drawn(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run())
    ranks = [{**record, "singular_values": [0.0] * 5} for record in run.ranks]
    figures(replace(run, ranks=ranks))["spectrum"].draw_without_rendering()
