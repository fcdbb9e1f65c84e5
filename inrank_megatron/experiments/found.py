"""What an experiment on one of the papers' systems finds."""

from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """``rows``: the table, one dictionary a line, equal keys. ``curves``: the points of the picture."""

    rows: list[Record]
    curves: list[Record]


def rounded(values) -> list[float]:
    """Five significant digits, which is more than a picture shows."""
    return [float(f"{value:.5g}") for value in values]
