"""Choosing a rate from results worked out by hand, and a real sweep of a model of a few parameters."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from inrank_megatron.experiments import sweep
from inrank_megatron.experiments.arms import Result
from tests.harness import ROOT
from tools.sweep import main

TINY = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16"
TINY += " --optimizer adamw"
TINY += " --micro-batch-size 2 --global-batch-size 2 --train-iters 2 --eval-iters 1 --vocab-size 512"


def result(valid):
    return Result(valid=valid, test=valid + 1, size=None, parameters=1000, flops=2e6, seconds=2.0)


def test_the_best_rate_has_the_lowest_mean_and_finished_with_every_seed():
    found = {1e-3: [result(9.0), result(10.0)], 2e-3: [result(8.0), result(8.5)], 4e-3: [result(1.0), None]}
    assert sweep.best_of(found) == 2e-3
    assert sweep.verdict(found) == "best: lr 0.002"
    rows = sweep.rate_rows(found)
    assert rows[1]["mean"] == 8.25 and rows[1]["deviation"] == pytest.approx(0.3536, rel=1e-3)
    assert rows[2]["valid_perplexity"] == [1.0, "diverged"] and rows[2]["mean"] is None
    assert [row["best"] for row in rows] == ["", "best", ""]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({1e-3: [9.0], 2e-3: [8.0]}, "the best rate is the highest tried: try higher, such as 0.004"),
        ({1e-3: [8.0], 2e-3: [9.0]}, "the best rate is the lowest tried: try lower, such as 0.0005"),
        ({1e-3: [8.0]}, "best: lr 0.001, the only rate tried"),
        ({1e-3: [None], 2e-3: [None]}, "no rate finished with every seed: try rates below 0.001"),
        ({1e-3: [9.0, 8.2], 2e-3: [8.0, 9.0], 4e-3: [12.0, 12.0]}, "spread does not tell it from 0.001"),
    ],
)
def test_what_is_said_of_the_best_rate(values, words):
    found = {rate: [value and result(value) for value in seeds] for rate, seeds in values.items()}
    assert words in sweep.verdict(found)
    if sweep.best_of(found) is not None:
        assert sweep.picture(found).startswith(b"\x89PNG")


def test_a_sweep_trains_what_is_missing_and_refuses_another_configuration(tmp_path, capsys):
    words = [*TINY.split(), "--output", str(tmp_path / "s"), "--data-cache-path", str(tmp_path / "cache")]
    assert main([*words, "--rates", "1e-2", "--seeds", "3"]) == 0
    assert "best: lr 0.01, the only rate tried" in capsys.readouterr().out
    assert main([*words, "--rates", "1e-2", "1e9", "--seeds", "3"]) == 0
    shown = capsys.readouterr()
    assert "lr0.01-seed3 ..." not in shown.err and "lr1e+09-seed3 ..." in shown.err
    with (tmp_path / "s" / sweep.TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["lr"], row["seed"]) for row in rows] == [("0.01", "3"), ("1000000000.0", "3")]
    assert 1 < float(rows[0]["valid_perplexity"]) < 1000 and float(rows[0]["flops"]) > 0
    assert (tmp_path / "s" / sweep.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--rates", "1e-2", "--seeds", "3", "--num-layers", "2"]) == 1
    assert "{'num_layers': 1}, not of {'num_layers': 2}: give another --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stop", "status", "words_of_it"),
    [
        (lambda pid: os.killpg(pid, signal.SIGINT), 130, "interrupted: the same command continues the sweep"),
        (
            lambda pid: os.kill(pid, signal.SIGTERM),
            143,
            "stopped by SIGTERM, and the runs with it: the same command continues",
        ),
    ],
    ids=["as a terminal does", "the sweep alone"],
)
def test_a_sweep_that_is_stopped_goes_on_where_it_was(stop, status, words_of_it, tmp_path, capsys):
    words = [*TINY.split(), "--train-iters", "400", "--data-cache-path", str(tmp_path / "cache")]
    words += ["--rates", "1e-2", "--output", str(tmp_path / "s")]
    metrics = tmp_path / "s" / "lr0.01-seed1" / "metrics.jsonl"
    sweeping = subprocess.Popen(
        [sys.executable, "tools/sweep.py", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not metrics.exists() or metrics.stat().st_size < 2000:
        assert sweeping.poll() is None, sweeping.communicate()
        time.sleep(0.1)
    stop(sweeping.pid)
    _, said = sweeping.communicate(timeout=120)
    assert sweeping.returncode == status
    assert said.splitlines()[-1] == words_of_it
    assert "Traceback" not in said
    before = metrics.read_text().splitlines()
    assert main(words) == 0
    assert "best: lr 0.01" in capsys.readouterr().out
    assert metrics.read_text().splitlines()[: len(before)] == before
    steps = [r["step"] for r in map(json.loads, metrics.read_text().splitlines()) if r["kind"] == "train"]
    assert steps == list(range(1, 401))


def test_a_run_that_fails_says_why_in_the_line_of_the_sweep(tmp_path, capsys):
    words = [*TINY.split(), "--train-data-path", str(tmp_path / "none.txt"), "--output", str(tmp_path / "s")]
    assert main([*words, "--rates", "1e-2"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"ended with status 1, not for its learning rate: data path {tmp_path}/none.txt does not exist"
        in error
    )
    assert "give the command again, which continues" in error


def test_an_empty_output_is_not_the_working_directory(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--rates", "1e-2", "--output", ""])
    assert "argument --output: an empty path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seeds", "1", "-5"], "seed = -5: must be"),
        (["--seeds", "1", "4294967296"], "seed = 4294967296: must be"),
        (["--lr", "1"], "--lr: not a flag of a sweep, as --rates gives it; leave it out"),
        (["--save=x"], "--save: not a flag of a sweep, as --output gives it"),
        (["--dry_run"], "--dry-run: not a flag of a sweep, as it has no meaning here"),
        (["--min-lr", "0.5"], "min_lr = 0.5"),
        (["--threshold", "2"], "threshold"),
    ],
)
def test_mistakes_end_it_before_anything_is_written(flags, words, tmp_path, capsys):
    assert main(["--rates", "1e-2", "--output", str(tmp_path / "s"), *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not (tmp_path / "s").exists()
