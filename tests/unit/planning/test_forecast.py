"""Forecasts of whole runs: the rows of the plot over GPUs, and what they have in common."""

import csv
import io
import runpy

from tests.harness import ROOT

SCRIPT = runpy.run_path(str(ROOT / "docs/scripts/scaling.py"))


def test_the_rows_of_the_plot_are_those_of_the_planner_today():
    written = SCRIPT["DATA"].read_text(encoding="utf-8")
    assert SCRIPT["text"]() == written, "run python docs/scripts/scaling.py, then docs/scripts/plots.py"
    found = list(csv.DictReader(io.StringIO(written)))
    times = {(row["scaling"], row["method"], int(row["gpus"])): float(row["step_seconds"]) for row in found}
    assert {gpus for _, _, gpus in times} == {8, 16, 32, 64, 128, 256, 512, 1024}
    for (scaling, method, gpus), seconds in times.items():
        if gpus > 8:  # more GPUs are faster at one batch, but never more than in proportion
            half = times[scaling, method, gpus // 2]
            assert half / 2 <= seconds < half if scaling == "strong" else abs(seconds / half - 1) < 0.01
        assert times[scaling, "InRank-Efficient", gpus] < times[scaling, "dense", gpus]
