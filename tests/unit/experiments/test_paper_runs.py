"""The rows of the InRank paper's tables: the page that has them, and finished runs that fill them."""

import json
import runpy
import subprocess
import sys

import pytest
import yaml

from inrank_megatron.config.loading import flatten
from inrank_megatron.errors import UserError
from inrank_megatron.experiments import paper_runs as paper
from inrank_megatron.experiments.command import main
from tests.harness import ROOT

SCRIPT = runpy.run_path(str(ROOT / "docs/scripts/paper_runs.py"))
NAMES = [run.name for run in paper.RUNS]
TIMED = [run for run in paper.RUNS if run.reported.hours is not None]


def test_the_page_has_the_tables_of_today():
    written = SCRIPT["PAGE"].read_text(encoding="utf-8")
    assert SCRIPT["page"](written) == written, "run python docs/scripts/paper_runs.py"


def test_a_row_has_its_rank_and_the_parameters_that_the_paper_reports():
    rows, remarks = paper.rows()
    assert len(rows) == 17 and not remarks
    for run, row in zip(paper.RUNS, rows, strict=True):
        if run.reported.parameters:  # three digits, cut off rather than rounded
            assert 0 <= row["parameters"] / 1e6 - run.reported.parameters < 1
        assert run.settings.inrank.rank in (None, run.reported.rank)
        assert row["predicted_hours"] > 0 and row["measured_hours"] is None


@pytest.mark.parametrize("run", TIMED, ids=lambda run: run.name)
def test_two_terms_explain_hours_and_memory(run):
    """The rate of products and the micro-batch, as the page claims."""
    if run.flags != ("--fp16",):
        assert paper.hours_at_the_rate_of_full_rank(run) == pytest.approx(run.reported.hours, rel=0.09)
    micro, memory = paper.micro_batch_of(run)
    assert micro == {"small": 32, "medium": 32, "large": 16}[run.size]
    assert memory == pytest.approx(run.reported.memory, rel=0.2)


def leave(folder, config, *, finished=True, **changed):
    """The parts of a run folder that are read."""
    folder.mkdir(parents=True)
    settings = {**flatten(config), "save": str(folder), "zero_stage": 2, "micro_batch_size": 1, **changed}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    sizes = {"dense": 124_439_808, "phase_1": 1, "phase_2": 91_225_344}
    memory = {"phase_1": {"max_memory_allocated": 9e9}, "phase_2": {"max_memory_allocated": 7e9}}
    summary = {"finished": finished, "parameters": sizes, "peak_memory": memory, "train_seconds": 7200.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    test = {"kind": "eval", "step": 22500, "split": "test", "perplexity": 19.876, "loss": 2.99}
    (folder / "metrics.jsonl").write_text(f"{json.dumps(test)}\n")


def test_finished_runs_fill_their_rows_and_others_are_named(tmp_path, capsys):
    small = next(run for run in paper.RUNS if run.name == "small, InRank-Efficient, threshold 0.9")
    leave(tmp_path / "a", small.settings)
    leave(tmp_path / "b", small.settings)
    leave(tmp_path / "c", small.settings, threshold=0.8, finished=False)
    leave(tmp_path / "d", small.settings, threshold=0.7, train_iters=10)
    (tmp_path / "no_run").mkdir()
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "config.yaml").write_text("[")
    main(["table1", "--json", "--collect", str(tmp_path)])
    shown = capsys.readouterr()
    rows = {row["run"]: row for row in json.loads(shown.out)}
    assert list(rows) == NAMES
    filled = {name: row for name, row in rows.items() if row["measured_folder"]}
    assert list(filled) == [small.name]
    row = filled[small.name]
    assert (row["measured_perplexity"], row["measured_hours"], row["measured_memory"]) == (19.88, 2.0, 9.0)
    assert row["measured_parameters"] == row["parameters"] == 91_225_344
    damaged, first, second, third = shown.err.splitlines()
    assert f"{tmp_path / 'e' / 'config.yaml'}: not valid YAML" in damaged and "left out" in damaged
    assert "b: small" in first and "already is; left out" in first
    assert "c: small, InRank-Efficient, threshold 0.8, which has not finished" in second
    assert "d: no run of the tables; the nearest is small" in third
    assert "train_iters = 10, threshold = 0.7" in third
    main(["table1", "--collect", str(tmp_path / "a")])
    assert "| 19.88 |" in capsys.readouterr().out


def test_a_reader_that_leaves_early_ends_it_without_a_word():
    command = f"{sys.executable} tools/reproduce.py table1 --json | head -c 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[", "")


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--collect .*: no run folder, and none in it"):
        main(["table1", "--collect", str(tmp_path)])
    (tmp_path / "config.yaml").write_text("[")
    with pytest.raises(UserError, match="not valid YAML"):
        main(["table1", "--collect", str(tmp_path)])
