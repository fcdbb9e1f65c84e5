"""What the figures of several runs show, read back from their axes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_hex

from inrank_megatron.reporting.run import Run, flops_spent, read_run
from inrank_megatron.reporting.several_figures import line_of, several_figures

MakeRun = Callable[..., Path]


@pytest.fixture
def runs(make_run: MakeRun) -> dict[str, Run]:
    return {
        "A": read_run(make_run("a")),
        "B": read_run(make_run("b", method="dense")),
        "C": read_run(make_run("c", steps=47)),
    }


def by_label(axes) -> dict:
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_losses_over_steps_and_over_flops(runs: dict[str, Run]) -> None:
    shown = several_figures(runs)[0]
    above, below = shown.figure.axes
    assert list(by_label(above)) == ["A", "B", "C"] and list(by_label(below)) == ["A", "B"]
    assert len({(to_hex(line.get_color()), line.get_linestyle()) for line in by_label(above).values()}) == 3
    assert list(by_label(above)["A"].get_xdata()) == list(range(1, 121))
    assert above.get_xlabel() == "optimizer steps"
    low = by_label(below)["A"].get_xdata()
    assert low[59] == pytest.approx(60 * 1024 * 14.1e6)
    assert low[-1] == pytest.approx(60 * 1024 * (14.1e6 + 9.8e6))
    assert by_label(below)["B"].get_xdata()[-1] == pytest.approx(120 * 1024 * 15.7e6)
    [validated] = [line for line in below.lines if list(line.get_ydata()) == list(_validated(runs["A"]))]
    assert list(validated.get_xdata()) == pytest.approx([low[39], low[79], low[119]])
    assert "FLOPs are not known of C." in shown.caption
    assert "A ends at training loss 4.039 at step 120, validation loss 4.139 at step 120." in shown.alt
    rows = [row for row in shown.table.rows if row[0] == "A"]
    assert (len(rows), rows[-1]) == (8, ["A", "120", "123 k", "1.47 T", "4.039", "4.139"])
    assert pyplot.get_fignums() == []


def _validated(run: Run) -> list[float]:
    return [e["loss"] for e in run.evaluations if e["split"] == "valid"]


def test_losses_are_over_tokens_where_a_step_is_not_the_same_in_all(runs: dict[str, Run]) -> None:
    halved = [record | {"tokens": record["tokens"] // 2} for record in runs["B"].train]
    [above, _] = several_figures(runs | {"B": replace(runs["B"], train=halved)})[0].figure.axes
    assert above.get_xlabel() == "tokens"
    assert by_label(above)["A"].get_xdata()[-1] == 2 * by_label(above)["B"].get_xdata()[-1] == 120 * 1024
    unknown = [record | {"tokens": None} for record in runs["B"].train]
    above, below = several_figures(runs | {"B": replace(runs["B"], train=unknown)})[0].figure.axes
    assert above.get_xlabel() == "optimizer steps" and list(by_label(below)) == ["A"]


def test_ranks_are_means_over_blocks(runs: dict[str, Run]) -> None:
    shown = several_figures(runs)[1]
    first, second = shown.figure.axes
    assert [first.get_title(), second.get_title()] == ["linear_fc1", "linear_fc2"]
    assert list(by_label(first)) == ["A", "C"], "the dense run has none"
    line = by_label(first)["A"]
    assert list(line.get_xdata()) == [0, 10, 20, 30, 40, 50, 60, 120]
    own = [r["rank"] for r in runs["A"].ranks if r["step"] == 60 and r["layer"].endswith("fc1")]
    assert line.get_ydata()[0] == 2 and line.get_ydata()[-1] == np.mean(own)
    assert "A linear_fc1 12.0" in shown.alt
    assert ["A", "linear_fc1", "120", "12.0", "9", "15"] in shown.table.rows


def test_costs_of_every_run_or_that_they_are_not_known(runs: dict[str, Run]) -> None:
    shown = several_figures(runs)[-1]
    widths = {axes.get_title(): [bar.get_width() for bar in axes.patches] for axes in shown.figure.axes}
    spent = flops_spent(runs["A"])[-1]
    assert widths["parameters at the end"] == [1_610_000, 2_614_000, 0]
    assert widths["FLOPs of the training"] == [spent, pytest.approx(120 * 1024 * 15.7e6), 0]
    assert widths["peak memory of a process"] == [5 * 2**30, 5 * 2**30, 0], "the switch counts"
    assert widths["time of the training"] == pytest.approx([72.5, 72.5, 40.0])
    assert shown.table.rows[2] == ["C", "-", "-", "-", "0:40"]
    assert "A: parameters at the end 1.61 M" in shown.alt


def test_dense_runs_have_no_figure_of_ranks(make_run: MakeRun) -> None:
    runs = {name: read_run(make_run(name, method="dense")) for name in "AB"}
    assert [shown.title for shown in several_figures(runs)] == ["Loss and perplexity", "Costs"]


def test_twelve_runs_have_lines_of_their_own() -> None:
    assert len({str(line_of(place)) for place in range(12)}) == 12
