"""The tables of several runs, cell by cell."""

from collections.abc import Callable
from pathlib import Path

from inrank_megatron.reporting.run import read_run
from inrank_megatron.reporting.several_tables import cost_table, result_table, run_table, settings_table

MakeRun = Callable[..., Path]


def test_results_and_costs(make_run: MakeRun) -> None:
    runs = {
        "A": read_run(make_run("a")),
        "B": read_run(make_run("b", method="dense")),
        "C": read_run(make_run("c", steps=47)),
    }
    rows = run_table(runs).rows
    assert [row[2:] for row in rows] == [
        ["inrank-efficient", "120 of 120", "123 k", "2 x cpu"],
        ["dense", "120 of 120", "123 k", "2 x cpu"],
        ["inrank-efficient", "47 of 120", "48,128", "-"],
    ]
    a, b, c = result_table(runs).rows
    assert a[2:] == ["62.75", "120", "62.75", "63.43", "402", "12.5 (9 to 16)"]
    assert b[-1] == "-" and c[3:6] == ["40", c[2], "-"]
    a, b, c = cost_table(runs).rows
    assert a == ["A", "1.61 M", "62%", "9.8 M", "62%", "1.47 T", "5.00 GiB", "1:12", "9,116 / 11,311"]
    assert b[1:6] == ["2.61 M", "100%", "15.7 M", "100%", "1.93 T"]
    assert c[1:7] == ["-"] * 6


def test_settings_that_differ(make_run: MakeRun) -> None:
    runs = {
        name: read_run(make_run(name, save=f"runs/{name}", **changed))
        for name, changed in (("A", {}), ("B", {"lr": 0.5, "rank": None}), ("C", {"rank": 8}))
    }
    table = settings_table(runs)
    assert table.heads == ["setting", "A", "B", "C"]
    assert table.rows == [["lr", "0.001", "0.5", "0.001"], ["rank", "-", "none", "8"]]
    assert settings_table({"A": runs["A"]}).rows == [["(none)", "-"]]
