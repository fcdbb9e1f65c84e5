"""The benchmark program as a user runs it: it prints JSON of one form, and the counts in it are right."""

import json
import math
import subprocess
import sys

import pytest

from tests.forked import run_forked
from tests.harness import ROOT

BENCH = ROOT / "tools" / "bench.py"
FIELDS = {"case", "quantity", "measured", "limit", "ratio_vs_dense", "ratio_vs_reference"}
ARGUMENTS = {
    "wire": ["--tensor-model-parallel-size", "2"],
    "rank-decisions": ["--repeats", "1", "--rank", "20"],
    "switch": ["--repeats", "1"],
    "layer": ["--repeats", "1"],
    "step": ["--repeats", "1"],
    "decoding": ["--repeats", "1"],
    "optimizers": ["--repeats", "1"],
    "memory": [],
    "checkpoint": [],
}
SEQUENCE, WIDTH, INNER = 256, 192, 768  # of the preset `tiny`


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    """The rows of each subcommand on the smallest preset."""
    result = {}
    for name, arguments in ARGUMENTS.items():
        run = run_forked(BENCH, name, "--preset", "tiny", "--json", *arguments)
        assert run.returncode == 0, run.stderr
        result[name] = json.loads(run.stdout)
    return result


def value(rows: list[dict], case: str, quantity: str, field: str = "measured") -> float:
    found = [r for r in rows if r["case"] == case and r["quantity"] == quantity]
    assert len(found) == 1
    return found[0][field]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_rows_have_one_schema(rows, name):
    assert rows[name]
    for row in rows[name]:
        assert row.keys() == FIELDS
        assert isinstance(row["case"], str) and isinstance(row["quantity"], str)
        for field in FIELDS - {"case", "quantity"}:
            number = row[field]
            assert (number is None and field != "measured") or math.isfinite(number)


def test_no_figure_appears_twice(rows):
    for of_command in rows.values():
        names = [(row["case"], row["quantity"]) for row in of_command]
        assert len(names) == len(set(names))


def test_rank_decisions_agree_with_the_reference(rows):
    decided = [row for row in rows["rank-decisions"] if row["quantity"].startswith("rank decided")]
    assert len(decided) == 4
    assert all(row["measured"] == row["limit"] for row in decided)
    grown = [row["measured"] > int(row["case"].split()[0].removeprefix("k=")) - 25 for row in decided]
    assert all(grown), (
        "with a buffer of 25 these layers start at rank k - 25; the decision is to be a real one"
    )


def test_weights_read_a_step_are_all_matrices_and_no_embedding(rows):
    outside = 4 * 4 * WIDTH**2 + 4096 * WIDTH  # attention of 4 layers, and the head
    for share, name in ((1, "dense"), (1 / 2, "half the MLP"), (1 / 3, "a third of the MLP")):
        rank = round(share * WIDTH * INNER / (WIDTH + INNER))
        mlp = 2 * WIDTH * INNER if share == 1 else 2 * rank * (WIDTH + INNER)
        for batch in (1, 8):
            case = f"tiny, {name}, batch {batch}"
            assert value(rows["decoding"], case, "weights read a step") == outside + 4 * mlp


def test_operation_counts_match_the_formulas(rows):
    of_mlp = [r for r in rows["layer"] if r["case"].startswith("MLP") and r["quantity"].startswith("FLOP")]
    of_step = [r for r in rows["step"] if r["quantity"] == "FLOP per step"]
    assert len(of_mlp) == len(of_step) == 4
    assert all(row["measured"] == row["limit"] for row in of_mlp + of_step)
    second = value(rows["layer"], "MLP tiny phase-2 r=64", "FLOP, forward + backward")
    assert second == 2 * 6 * SEQUENCE * 64 * (WIDTH + INNER)


def test_a_dense_step_is_compared_with_a_plain_loop(rows):
    case, quantity = "step tiny dense", "time over a plain PyTorch loop"
    assert 0.3 < value(rows["step"], case, quantity) < 3
    assert value(rows["step"], case, quantity, "limit") == 1.0
    low, high = (value(rows["step"], case, f"the same, 95 % interval {end}") for end in ("from", "to"))
    assert low <= value(rows["step"], case, quantity) <= high


def test_memory_of_a_dense_mlp(rows):
    """W, its gradient, three more numbers for the optimizer; x and what lies before and behind the GELU."""
    case, numbers = "MLP tiny dense", 2 * WIDTH * INNER + WIDTH + INNER
    assert value(rows["memory"], case, "parameter bytes") == 4 * numbers
    assert value(rows["memory"], case, "gradient bytes") == 4 * numbers
    assert value(rows["memory"], case, "master and moment bytes") == 12 * numbers
    assert value(rows["memory"], case, "activation bytes") == 4 * SEQUENCE * (WIDTH + 2 * INNER)


def test_truncation_is_as_good_as_the_reference(rows):
    errors = [r for r in rows["switch"] if r["quantity"].startswith("truncation error")]
    assert errors
    assert all(abs(row["measured"] - row["limit"]) < 1e-9 for row in errors)


def test_a_person_gets_a_table_with_the_machine():
    command = [sys.executable, str(BENCH), "memory", "--preset", "tiny", "--rank", "8"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    machine, *table = run.stdout.splitlines()
    assert "torch" in machine and "threads" in machine
    assert any("MLP tiny phase-2 r=8" in line for line in table)


def test_a_rank_beyond_the_width_is_refused():
    run = run_forked(BENCH, "layer", "--preset", "tiny", "--rank", "193")
    assert run.returncode == 1
    assert run.stderr.splitlines() == [
        "error: --rank 193: the MLP linears of tiny have rank 192 at most; lower it"
    ]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_each_of_many_ranks_saves_its_part_and_sends_nothing(rows, stage):
    """Within a tenth of the state over the ranks, 4 x 16."""
    case = f"tiny TP 4 x DP 16, ZeRO {stage}"
    part = value(rows["checkpoint"], case, "bytes a rank writes", "limit")
    assert value(rows["checkpoint"], case, "bytes a rank writes") == pytest.approx(part, rel=0.1)
    assert value(rows["checkpoint"], case, "bytes a rank sends") == 0
