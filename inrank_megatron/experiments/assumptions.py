"""What becomes of equation 4 where an assumption of theorem 2 does not hold."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from inrank_megatron.experiments.found import Found, Record
from inrank_megatron.experiments.theorem2 import MODES, largest_errors, setting
from inrank_megatron.reporting.plots import BLUE, VERMILION, styled
from inrank_megatron.theory.theorem2 import Array, Network, aligned_network, equation_4

EXTRA = 2
STRENGTH, SPREAD = 0.5, 0.1  # a and b of theorem 2's settings


def measure(*, quick: bool, notify: Callable[[str], None]) -> Found:
    """Every case with three seeds of U, V, O and the inputs; quick: one seed."""
    rows: list[Record] = []
    s, u0, times = setting(STRENGTH, SPREAD)
    expected = np.array([equation_4(times, *mode) for mode in zip(s, u0, strict=True)]).T
    for name, make in CASES.items():
        notify(name)
        for seed in range(1 if quick else 3):
            network = make(s, np.sqrt(u0), seed)
            updates = network.trajectory(times)
            measured, outside = network.modes(updates)
            rows.append(
                {
                    "case": name,
                    "seed": seed,
                    "largest_relative_error": float(largest_errors(measured, expected).max()),
                    "outside_modes": float(outside.max() / np.linalg.norm(updates[-1])),
                }
            )
    return Found(rows, rows)


def _correlated(rho: float) -> Callable[[Array, Array, int], Network]:
    """Inputs of unit norm with ``x_i . x_j = rho``: their second moments are those of the Gram matrix."""
    n = MODES + EXTRA
    return lambda s, m, seed: aligned_network(
        s, m, m, seed=seed, inputs=_turned(np.r_[1 - rho + n * rho, np.full(n - 1, 1 - rho)], seed)
    )


def _unequal(part: float) -> Callable[[Array, Array, int], Network]:
    """Orthogonal inputs, as assumption 1 asks, whose squared norms are evenly within ``1 +- part``."""
    norms = np.linspace(1 - part, 1 + part, MODES + EXTRA)
    return lambda s, m, seed: aligned_network(s, m, m, seed=seed, inputs=_turned(norms, seed))


def _turned(eigenvalues: Array, seed: int) -> Array:
    turn = np.linalg.qr(np.random.default_rng(500 + seed).standard_normal([len(eigenvalues)] * 2))[0]
    return turn * eigenvalues @ turn.T


def _unaligned(s: Array, m: Array, seed: int) -> Network:
    """Gaussian weights of the aligned ones' norms."""
    network, rng = aligned_network(s, m, m, seed=seed), np.random.default_rng(900 + seed)
    w1, w2 = (rng.standard_normal(w.shape) for w in (network.w1, network.w2))
    norm = np.linalg.norm(m)
    return replace(network, w1=w1 * norm / np.linalg.norm(w1), w2=w2 * norm / np.linalg.norm(w2))


CASES: dict[str, Callable[[Array, Array, int], Network]] = {
    "all hold": lambda s, m, seed: aligned_network(s, m, m, seed=seed),
    "inputs correlated by 0.01": _correlated(0.01),
    "inputs correlated by 0.1": _correlated(0.1),
    "inputs correlated by 0.5": _correlated(0.5),
    "orthogonal inputs, squared norms 0.9 to 1.1": _unequal(0.1),
    "orthogonal inputs, squared norms 0.5 to 1.5": _unequal(0.5),
    "M1 = 4 M2": lambda s, m, seed: aligned_network(s, 2 * m, m / 2, seed=seed),
    "M1 = 100 M2": lambda s, m, seed: aligned_network(s, 10 * m, m / 10, seed=seed),
    "weights not aligned with the data": _unaligned,
}


def draw(curves: Sequence[Record]) -> Figure:
    """Largest errors of equation 4, and how much of the update is outside of the modes, seed by seed."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panel = figure.subplots()
    names = list(dict.fromkeys(point["case"] for point in curves))
    series = (("largest_relative_error", "error of equation 4", "o", BLUE),
              ("outside_modes", "outside of the modes", "x", VERMILION))  # fmt: skip
    for key, label, marker, colour in series:
        panel.plot(
            [max(point[key], 1e-9) for point in curves],
            [names.index(point["case"]) for point in curves],
            marker,
            color=colour,
            fillstyle="none",
            label=label,
        )
    panel.axvline(0.01, color="black", linewidth=0.8, linestyle="--")
    panel.set_xscale("log")
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    styled(panel, x="largest relative error (dashed: 1 %; values below 1e-9 at the edge)")
    figure.legend(loc="outside lower right", ncols=2, frameon=False)
    figure.suptitle("InRank, theorem 2: where an assumption does not hold", fontsize=10)
    return figure
