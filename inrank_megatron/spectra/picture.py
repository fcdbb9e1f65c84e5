"""The papers' picture of spectra over training: one line per singular value, darker where it ends higher."""

from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inrank_megatron.reporting.plots import styled
from inrank_megatron.spectra.recorder import Row


def spectrum_figure(rows: Sequence[Row], *, title: str = "") -> Figure:
    """A panel for each layer of a recorder's rows. Curves begin at zero at step 0."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    columns = min(3, len(layers))
    lines = -(-len(layers) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for panel, layer in zip(panels, layers, strict=False):
        draw_spectra(panel, {row["step"]: row["values"] for row in rows if row["layer"] == layer})
        styled(panel, x="optimizer step", y="singular values of $W_t - W_0$", title=layer)
    for panel in list(panels)[len(layers) :]:
        panel.set_visible(False)
    figure.suptitle(title)
    return figure


def draw_spectra(axes: Axes, spectra: Mapping[float, Sequence[float]]) -> None:
    """Lines of the values over steps (or times), from step to descending values; equal lengths or none.

    Grey levels alone tell the lines apart, so the picture survives print and any colour vision.
    """
    steps = [step for step, values in spectra.items() if values]
    if not steps:
        return
    count = max(len(spectra[step]) for step in steps)
    for place in reversed(range(count)):
        curve = [spectra[step][place] for step in steps]
        colour = colormaps["Greys"](0.95 - 0.6 * place / count)
        axes.plot([0, *steps], [0, *curve], color=colour, linewidth=1.0)
