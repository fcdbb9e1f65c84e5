"""Theorem 2 and figure 2 of InRank: equation 4 beside networks that are integrated by gradient flow."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from inrank_megatron.experiments.found import Found, Record, rounded
from inrank_megatron.reporting.plots import VERMILION, styled
from inrank_megatron.spectra.picture import draw_spectra
from inrank_megatron.theory.theorem2 import Array, aligned_network, equation_4, unequal_mode

STRENGTHS = (0.1, 0.5, 1.0)  # a in s_i = a i, i = 1 to 10
SPREADS = (0.01, 0.1, 1.0)  # b in u0 = |N(0, b^2)|
RATIOS = {"M1 = M2": 1.0, "M1 = 4 M2": 2.0}  # sqrt(M1 / M2)
MODES, POINTS = 10, 60


def measure(*, quick: bool, notify: Callable[[str], None]) -> Found:
    """All strengths and spreads with both starts; quick: the first and last of each."""
    found = Found([], [])
    for a in STRENGTHS[:: 2 if quick else 1]:
        for b in SPREADS[:: 2 if quick else 1]:
            for start in RATIOS:
                notify(f"a = {a:g}, b = {b:g}, {start}")
                _one(found, a, b, start)
    return found


def setting(a: float, b: float) -> tuple[Array, Array, Array]:
    """s, u0 and times. A normal u0 would be negative for half of the modes, where equation 4 has a pole."""
    s = a * np.arange(1, MODES + 1)
    u0 = np.abs(np.random.default_rng(0).normal(0, b, MODES))
    end, step = 6 / a, 0.05 / max(s.max(), u0.max())
    return s, u0, np.linspace(0, end, round(end / step))


def _one(found: Found, a: float, b: float, start: str) -> None:
    (s, u0, times), ratio = setting(a, b), RATIOS[start]
    m1, m2 = np.sqrt(u0) * ratio, np.sqrt(u0) / ratio
    network = aligned_network(s, m1, m2, seed=round(100 * a))
    measured, _ = network.modes(network.trajectory(times))
    equation = np.array([equation_4(times, *mode) for mode in zip(s, u0, strict=True)]).T
    expected = (
        equation
        if ratio == 1
        else np.array([unequal_mode(times, *mode) for mode in zip(s, m1, m2, strict=True)]).T
    )
    errors, of_equation_4 = largest_errors(measured, expected), largest_errors(measured, equation)
    for mode in range(MODES):
        found.rows.append(
            {
                "s": float(s[mode]),
                "u0": float(u0[mode]),
                "start": start,
                "largest_relative_error": float(errors[mode]),
                "error_of_equation_4": float(of_equation_4[mode]),
            }
        )
    for place in np.linspace(0, len(times) - 1, POINTS).round().astype(int):
        found.curves.append(
            {
                "a": a,
                "b": b,
                "start": start,
                "time": float(f"{times[place]:.5g}"),
                "expected": rounded(expected[place]),
                "network": rounded(measured[place]),
            }
        )


def largest_errors(measured: Array, expected: Array) -> Array:
    """Per mode, from [times, modes]: the largest difference over the largest value."""
    return np.abs(measured - expected).max(axis=0) / np.abs(expected).max(axis=0)


def draw(curves: Sequence[Record]) -> Figure:
    """Figure 2, with the network's values as dots on the lines of the equation."""
    strengths, spreads = (sorted({point[name] for point in curves}) for name in "ab")
    figure = Figure(figsize=(3.2 * len(spreads), 2.6 * len(strengths)), layout="constrained")
    panels = figure.subplots(len(strengths), len(spreads), squeeze=False)
    for line, a in zip(panels, strengths, strict=True):
        for panel, b in zip(line, spreads, strict=True):
            points = [p for p in curves if (p["a"], p["b"], p["start"]) == (a, b, "M1 = M2")]
            # Lines of the strongest mode first, as those of a spectrum.
            draw_spectra(panel, {p["time"]: p["expected"][::-1] for p in points})
            for point in points[::4]:
                panel.plot([point["time"]] * MODES, point["network"], ".", color=VERMILION, markersize=2)
            styled(panel, x=r"time ($\tau$)", y="$u_f(t)$", title=f"a = {a:g}, b = {b:g}")
    figure.suptitle("InRank, figure 2: equation 4 (lines) and a linear network (dots)", fontsize=10)
    return figure
