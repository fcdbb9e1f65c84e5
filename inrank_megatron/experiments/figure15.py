"""Figure 15 of InRank: spectra of cumulative updates of a perceptron trained by three optimizers."""

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from inrank_megatron.experiments.figure3 import panels, study
from inrank_megatron.experiments.found import Found, Record
from inrank_megatron.theory.perceptron import OPTIMIZERS, digits


def measure(*, quick: bool, notify: Callable[[str], None]) -> Found:
    """SGD, Adam and Adadelta from Kaiming's initialisation; three seeds. Quick: one seed, 200 steps."""
    cases = [{"initialisation": "Kaiming", "optimizer": name, "labels": "true"} for name in OPTIMIZERS]
    return study(cases, digits(), quick=quick, notify=notify)


def draw(curves: Sequence[Record]) -> Figure:
    """Figure 15."""
    return panels(curves, lambda point: point["optimizer"], title="InRank, figure 15")
