"""``tools/reproduce.py``: its list, and what an experiment of a paper leaves."""

import json
from pathlib import Path

import pytest

from inrank_megatron.errors import UserError
from inrank_megatron.experiments.command import main
from inrank_megatron.experiments.registry import EXPERIMENTS


def test_the_list_has_each_experiment_with_source_and_cost(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--list"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)
    assert "(InRank, theorem 2, figure 2; " in lines[list(EXPERIMENTS).index("theorem2")]


def test_a_folder_that_cannot_be_made_ends_it_before_it_measures(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"--output .*taken: File exists; give another folder"):
        main(["theorem2", "--quick", "--output", str(tmp_path / "taken")])


def reproduced(name: str, folder: Path, capsys) -> tuple[list[dict], list[dict]]:
    """The rows and the curves of a quick run, after a look at what it wrote."""
    main([name, "--quick", "--json", "--output", str(folder)])
    printed = capsys.readouterr()
    rows = json.loads(printed.out)
    assert printed.err.count("\n") > 3  # how far it is
    assert [json.loads(line) for line in (folder / f"{name}.jsonl").open()] == rows
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return rows, [json.loads(line) for line in (folder / f"{name}_curves.jsonl").open()]


def test_theorem_2_holds_within_a_percent_and_equation_4_for_equal_starts_alone(tmp_path, capsys):
    rows, curves = reproduced("theorem2", tmp_path, capsys)
    assert len({(row["s"], row["u0"]) for row in rows}) == 40
    assert max(row["largest_relative_error"] for row in rows) < 0.01
    of_start = {
        start: [row["error_of_equation_4"] for row in rows if row["start"] == start]
        for start in ("M1 = M2", "M1 = 4 M2")
    }
    assert max(of_start["M1 = M2"]) < 0.01 < min(of_start["M1 = 4 M2"])
    assert len(curves[0]["network"]) == 10


def test_greedy_low_rank_learning_finds_each_planted_rank(tmp_path, capsys):
    rows, _ = reproduced("glrl", tmp_path, capsys)
    assert {(row["problem"], row["depth"]) for row in rows} == {
        (problem, depth) for problem in ("sensing", "completion") for depth in (2, 3)
    }
    for row in rows:
        assert row["found_rank"] == row["planted_rank"] and row["loss"] < 1e-10
        assert abs(row["largest_over_best"]) < 1e-6


def test_assumptions_that_do_not_hold_break_equation_4(tmp_path, capsys):
    rows, _ = reproduced("assumptions", tmp_path, capsys)
    error = {row["case"]: row["largest_relative_error"] for row in rows}
    assert error.pop("all hold") < 1e-6 and min(error.values()) > 0.01
