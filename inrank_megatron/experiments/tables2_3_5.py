"""Tables 2, 3 and 5 of InRank: a fixed rank of InRank's size, the thresholds, and FP16 against FP32."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from inrank_megatron.experiments.figure4 import CRITERIA, FIXED, growing, summarised
from inrank_megatron.experiments.found import Found, Record
from inrank_megatron.experiments.small_runs import SmallRuns
from inrank_megatron.reporting.plots import BLUE, styled

STEPS = 200
THRESHOLDS = (0.8, 0.85, 0.9)


@dataclass(frozen=True)
class Arm:
    """A row of these ``tables``. {found} in ``flags``: the mean rank at the last threshold, rounded up."""

    tables: str
    method: str
    flags: str
    precision: str = "FP32"


INRANK = f"{CRITERIA['released']} --threshold"
ARMS = [
    Arm("3", "dense", "--method dense"),
    Arm("3", "InRank 0.8", f"{INRANK} 0.8"),
    Arm("3", "InRank 0.85", f"{INRANK} 0.85"),
    Arm("2, 3, 5", "InRank 0.9", f"{INRANK} 0.9"),
    Arm("2", "fixed rank", f"{FIXED} {{found}}"),
    Arm("5", "InRank 0.9", f"{INRANK} 0.9 --fp16", precision="FP16"),
    Arm("none", "dense", "--method dense --fp16", precision="FP16"),
]


def measure(*, quick: bool, notify: Callable[[str], None]) -> Found:
    """Every row, one seed; quick: dense and threshold 0.9 in FP32, the fixed rank, a fifth of the steps."""
    steps, arms = (STEPS // 5, [ARMS[0], *ARMS[3:5]]) if quick else (STEPS, ARMS)
    found = Found([], [])
    with tempfile.TemporaryDirectory() as folder:
        runs = SmallRuns(Path(folder), notify)
        for arm in arms:
            flags = flags_of(arm, found.rows, steps=steps)
            run = runs.train(f"{arm.method}-{arm.precision}".replace(" ", "_"), flags, steps=steps)
            about = {"tables": arm.tables, "precision": arm.precision}
            skipped = {"skipped_steps": run.train[-1]["skipped_steps"]}
            found.rows.append(about | summarised(arm.method, run) | skipped)
    found.curves.extend(found.rows)
    return found


def flags_of(arm: Arm, rows: Sequence[Record], *, steps: int) -> str:
    """The launcher's, given the rows so far."""
    ranks = [row["rank"] for row in rows if row["arm"].startswith("InRank")]
    flags = arm.flags.format(found=ranks and math.ceil(ranks[-1]))
    return f"{flags} {growing(steps)}" if arm.method.startswith("InRank") else flags


def draw(curves: Sequence[Record]) -> Figure:
    """Test perplexity and rank of each row."""
    names = [f"{row['arm']}, {row['precision']}" for row in curves]
    figure = Figure(figsize=(6.4, 0.4 * len(names) + 1), layout="constrained")
    axes = styled(figure.subplots(), x="test perplexity", title="InRank, tables 2, 3 and 5")
    for place, row in enumerate(curves):
        axes.plot(row["test_perplexity"], place, "o", color=BLUE, markersize=5)
        if row["rank"]:
            axes.annotate(
                f"rank {row['rank']:.4g}", (row["test_perplexity"], place), xytext=(7, -3),
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
    axes.margins(x=0.2)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    return figure
