"""Figure 3 of InRank on its own data: as ``figure3.py``, on Fashion-MNIST."""

from collections.abc import Callable

from inrank_megatron.experiments.figure3 import CASES, draw, study
from inrank_megatron.experiments.found import Found
from inrank_megatron.theory.perceptron import fashion_mnist

__all__ = ["draw", "measure"]


def measure(*, quick: bool, notify: Callable[[str], None]) -> Found:
    """The cases, seeds and steps of ``figure3.py``. The data come from the hub or its cache."""
    return study(CASES, fashion_mnist(), quick=quick, notify=notify)
